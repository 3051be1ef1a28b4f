"""The forms of a MAC address, the MAC of a guest to which nobody gives one, and which MACs a policy permits. Pure."""

from __future__ import annotations

import re
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start

from cni.dataclass import dataclass
from cni.state.launcher_pod import vm_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


@dataclass(frozen=True)
class Derivation:
    """What a node's policy gives to the derived MACs. Nodes between which VMs migrate must have the same."""

    seed: str = ""
    """Goes into each MAC: two clusters with the same VMs and different seeds have different MACs."""
    prefix: str = ""
    """The first three bytes, "02:ab:cd" in lower case; "": derived too."""


_SEPARATORS = re.compile("[:.-]")

PLAIN = Derivation()
"""Of a node without a policy, or whose policy gives nothing."""


@dataclass(frozen=True)
class Rules:
    """What a policy permits. A range is (first, last) as numbers of 48 bits."""

    deny: tuple[tuple[int, int], ...] = ()
    allow: tuple[tuple[int, int], ...] = ()
    """(): all that are not denied."""
    derived_only: bool = False
    gateway: bool = True
    """Whether the MACs of the source's default gateways are denied, too."""

    def refusal(self, mac: str, *, derived: bool) -> str | None:
        """Why a guest may not have the MAC; None if it may."""
        number = int(mac.replace(":", ""), 16)
        if self.derived_only and not derived:
            return "the policy permits derived MACs only (derivedOnly); leave it out"
        if _within(number, self.deny):
            return "the policy denies it (deny); give another"
        if self.allow and not _within(number, self.allow):
            return f"the policy permits only {', '.join(map(_shown, self.allow))} (allow)"
        return None


def rules(document: Mapping[str, Any]) -> Rules:
    """The rules in a policy's field mac, which is valid by the schema. Raises ValueError if a range is reversed."""
    return Rules(
        deny=tuple(map(_range, document.get("deny") or ())),
        allow=tuple(map(_range, document.get("allow") or ())),
        derived_only=document.get("derivedOnly", False),
        gateway=document.get("gateway", True),
    )


def with_colons(text: str) -> str:
    """The MAC, or the first bytes of one, in lower case with colons. text: hexadecimal digits with ':', '-' or '.'."""
    return bytes.fromhex(_SEPARATORS.sub("", text)).hex(":")


def _within(number: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first <= number <= last for first, last in ranges)


def _range(text: str) -> tuple[int, int]:
    digits = _SEPARATORS.sub("", text)
    first, last = (
        digits[:12],
        digits[12:] or digits,
    )  # two whole MACs, or one that may be only the first bytes
    found = int(first.ljust(12, "0"), 16), int(last.ljust(12, "f"), 16)
    if found[0] > found[1]:
        raise ValueError(text)
    return found


def _shown(each: tuple[int, int]) -> str:
    return "-".join(dict.fromkeys(number.to_bytes(6).hex(":") for number in each))


def derive(
    derivation: Derivation, network: str, container_id: str, ifname: str, args: Mapping[str, str]
) -> str:
    """A unicast address from what survives the pod. args: CNI_ARGS.

    Of a KubeVirt launcher's pod that is the Kubernetes namespace, the VM's name and the interface: the VM keeps its
    address when it restarts, migrates, or is connected to another network. Of another pod it is the pod's name instead.
    Outside Kubernetes (no K8S_POD_NAME) it is the network, the container's id and the interface.
    """
    pod = args.get("K8S_POD_NAME", "")
    namespace = args.get("K8S_POD_NAMESPACE", "")
    if vm := vm_name(pod):
        owner = ("vm", namespace, vm)
    elif pod:
        owner = ("pod", namespace, pod)
    else:
        owner = ("container", network, container_id)
    key = "\0".join((derivation.seed, *owner, ifname)).encode(errors="surrogateescape")
    digest = bytearray(blake2s(key, digest_size=6).digest())
    digest[0] = digest[0] & 0xFC | 0x02  # locally administered, unicast
    derived = digest.hex(":")
    return f"{derivation.prefix}{derived[8:]}" if derivation.prefix else derived


def of_plain_tap(guest: str) -> str:
    """The tap's own address, which must differ from the guest's: the two are ends of one wire."""
    return ("fa" if guest.startswith("fe") else "fe") + guest[2:]
