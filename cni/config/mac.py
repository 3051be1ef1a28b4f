"""The MAC address of a guest to which nobody gives one. Pure."""

from __future__ import annotations

from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start
from dataclasses import dataclass

from cni.config.launcher_pod import vm_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Derivation:
    """What a node's policy gives to the derived MACs. Nodes between which VMs migrate must have the same."""

    seed: str = ""
    """Goes into each MAC: two clusters with the same VMs and different seeds have different MACs."""
    prefix: str = ""
    """The first three bytes, "02:ab:cd"; "": derived too."""


PLAIN = Derivation()
"""Of a node without a policy, or whose policy gives nothing."""


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
    return f"{derivation.prefix.lower()}{derived[8:]}" if derivation.prefix else derived


def of_plain_tap(guest: str) -> str:
    """The tap's own address, which must differ from the guest's: the two are ends of one wire."""
    return ("fa" if guest.startswith("fe") else "fe") + guest[2:]
