"""A ResourceClaim that the scheduler has allocated → the network config of each of its devices.

The parameters of a request are fields of the network config, checked by the same schema, in this order: those of the
DeviceClass, then those of the claim; a later one replaces an earlier one. The device that was allocated decides the
interface. The policy decides what is granted: the caller authorizes each config as for an ADD.
Source: k8s.io/api, resource/v1/types.go. Pure.
"""

from __future__ import annotations

import json
import re
from _blake2 import blake2s  # as in mac.py
from functools import cache

from cni.config import netconf, schema
from cni.config.policy import Policy
from cni.dataclass import dataclass
from cni.errors import CniError
from cni.spec import INVALID_NETWORK_CONFIG, UNSUPPORTED_FIELD, VERSIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from cni.config.netconf import NetConf
    from cni.config.policy import Interface

DRIVER = "vmtap.dev"
"""The driver's name in claims, classes and slices."""
KUBEVIRT_UID = 107
"""The user of QEMU in KubeVirt's launcher, and in many images."""
POD_CLAIM = "resource.kubernetes.io/pod-claim-name"
"""The annotation of a claim that was made of a template: its name in the pod."""
NETWORKS = "k8s.v1.cni.cncf.io/dra-networks"
"""The annotation of a pod that has the MACs of its VM, as KubeVirt's enhancement 183 proposes."""

SHARED = (
    *(
        "mode",
        "mac",
        "mtu",
        "vlan",
        "vlanProtocol",
        "vlanPriority",
        "handover",
        "queues",
        "promisc",
        "allmulti",
    ),
    *("bcqueuelen", "port", "owner", "group", "addressing", "ipam", "dns"),
)
"""The fields of a network config that parameters may set."""
_OF_THE_CLASS = ("port", "ipam")
"""Fields that a claim cannot replace if the class has them: the class's author narrows with them what a pod may do."""
_OWN = ("apiVersion", "kind", "ifname")
_DEVICE_BY_SELECTOR = 'the device that is allocated has it; select one, as by device.attributes["vmtap.dev"]'
_UNSETTABLE = {
    **dict.fromkeys(("interface", "source"), _DEVICE_BY_SELECTOR),
    "device": "a claim's device is a macvtap; leave it out",
}
_NO_FIELD = "a claim cannot set it; leave it out"
_SLUG = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_IFNAME = "net"
_SHARED = "shared"


@dataclass(frozen=True)
class Allocated:
    """One allocated device of the driver, with the parameters of its request."""

    request: str
    device: str
    pool: str
    share: str
    """The share id of a device that allows several allocations; "" without one."""
    ifname: str
    fields: Mapping[str, Any]
    """Of the network config."""
    ipam_of_claim: bool
    """Whether the claim, and not the class, has ipam."""

    @property
    def base(self) -> str:
        """The request's name, without that of a subrequest."""
        return self.request.partition("/")[0]


def device_name(interface: str, number: int | None) -> str:
    """The name in slices of an interface's device of that number: a DNS label, at most 62 characters.

    number: None for the device that stands for all of the interface's.
    """
    slug = interface
    if not _SLUG.fullmatch(interface):
        readable = re.sub(r"[^a-z0-9]+", "-", interface.lower()).strip("-")
        slug = f"{readable}-{blake2s(interface.encode(), digest_size=2).hexdigest()}"
    return f"{slug}-{_SHARED if number is None else number}"


def interface_of(policy: Policy, device: str) -> tuple[Interface, int | None]:
    """The policy's entry of a device, and the device's number as of device_name().

    Raises CniError 7 if the policy has none.
    """
    slug, _, digits = device.rpartition("-")
    number = int(digits) if re.fullmatch("0|[1-9][0-9]{0,3}", digits) else None
    found = [each for each in policy.interfaces if slug and device_name(each.name, number) == device]
    if len(found) != 1 or (number is None and found[0].functions):
        names = schema.listed([each.name for each in policy.interfaces])
        raise _refusal(
            f"device {device}: the node's policy has no interface of it now; interfaces are: {names}"
        )
    [entry] = found
    if number is not None and number >= entry.devices:
        raise _refusal(
            f"device {device}: interface {entry.name} offers {entry.devices} devices now; raise its capacity"
        )
    return entry, number


def pod_of(claim: Mapping[str, Any]) -> tuple[str, str]:
    """(name, UID) of the one pod that the claim is reserved for. Raises CniError 7 if there is none, or several."""
    reserved = _list(_object(claim, "status").get("reservedFor"))
    pods = [each for each in reserved if each.get("resource") == "pods"]
    if len(pods) != 1 or len(reserved) != 1:
        names = schema.listed([str(each.get("name")) for each in reserved])
        raise _refusal(
            f"the claim is reserved for {len(reserved)} consumers ({names}), and a device is one pod's: give each pod "
            "a claim of its own, by a ResourceClaimTemplate"
        )
    [pod] = pods
    return _text(pod, "name"), _text(pod, "uid")


def pod_claim(claim: Mapping[str, Any]) -> str | None:
    """The claim's name in its pod if it was made of a template, else None."""
    annotations = _object(claim, "metadata").get("annotations")
    found = annotations.get(POD_CLAIM) if isinstance(annotations, dict) else None
    return found if isinstance(found, str) and found and found.isascii() else None


def macs(networks: str, claim: str) -> dict[str, list[str]]:
    """Request → the MACs of its devices, of the claim of that name in the pod. networks: the annotation NETWORKS.

    A MAC is not checked. Raises CniError 7 if the annotation is not valid.
    """
    try:
        entries = [each for each in json.loads(networks or "[]") if each["claimName"] == claim]
        found = {each["requestName"]: each.get("macs") or [] for each in entries}
        valid = all(isinstance(mac, str) for each in found.values() for mac in [*each])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        valid = False
    if not valid or not all(isinstance(each, list) for each in found.values()):
        wanted = '[{"claimName": CLAIM, "requestName": REQUEST, "macs": [MAC]}]'
        raise _refusal(f"the pod's annotation {NETWORKS} is {schema.show(networks)}; its form is {wanted}")
    return found


def allocated(claim: Mapping[str, Any]) -> list[Allocated]:
    """The driver's devices in the claim's allocation, in its order.

    Raises CniError 2 or 7 that names the parameter and its author, the class or the claim.
    """
    devices = _object(_object(_object(claim, "status"), "allocation"), "devices")
    name = pod_claim(claim) or _text(_object(claim, "metadata"), "name")
    results = [each for each in _list(devices.get("results")) if each.get("driver") == DRIVER]
    bases = [_text(each, "request").partition("/")[0] for each in results]
    configs = [*_configs(devices, "FromClass"), *_configs(devices, "FromClaim")]
    found = []
    for at, each in enumerate(results):
        request, base = _text(each, "request"), bases[at]
        if each.get("adminAccess"):
            raise _refusal(f"request {request}: adminAccess is refused: a device is attached, or it is not")
        fields, of_claim = _merged(configs, request, base)
        own = {key: fields.pop(key) for key in _OWN if key in fields}
        if bases.count(base) > 1 and (single := {"ifname", "mac"} & {*own, *fields}):
            raise _refusal(
                f"{min(single)}: request {base} has {bases.count(base)} devices, and each needs its own; make it a "
                "request for each device"
            )
        number = bases[:at].count(base)
        found.append(
            Allocated(
                request,
                _text(each, "device"),
                _text(each, "pool"),
                str(each.get("shareID") or ""),
                own.get("ifname") or _ifname(name, base, number),
                fields,
                "ipam" in of_claim,
            )
        )
    names = [each.ifname for each in found]
    if twice := {each for each in names if names.count(each) > 1}:
        raise _refusal(f"ifname: {min(twice)} is given to two devices of the claim")
    return found


def check(parameters: Any) -> None:
    """Raise CniError 2 or 7 that names the field if the parameters of a class or a claim are not valid."""
    if not schema.accepts(_rules(), parameters):
        schema.explain(_rules(), parameters, unknown=UNSUPPORTED_FIELD, foreign=_foreign())


def network_config(device: Allocated, entry: Interface, source: str | None = None) -> dict[str, Any]:
    """The device's network config. source: of the entry's devices the one that the allocated device is on."""
    return {
        "cniVersion": VERSIONS[-1],
        "name": f"claim-{device.request.replace('/', '.')}",
        "type": "vmtap",
        "interface": entry.name,
        **({"source": source} if source else {}),
        "device": "macvtap",
        "owner": KUBEVIRT_UID,  # with an owner, ADD makes the device node that the container gets
        "group": KUBEVIRT_UID,
        **device.fields,
    }


def parse(config: Mapping[str, Any]) -> NetConf:
    """The valid network config. Raises CniError as an ADD with it would."""
    return netconf.parse(json.dumps(config).encode())


def _configs(devices: Mapping[str, Any], source: str) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(source, requests, valid parameters) of each config of that source for the driver."""
    author = "the class" if source == "FromClass" else "the claim"
    for each in _list(devices.get("config")):
        opaque = each.get("opaque")
        if each.get("source") != source or not isinstance(opaque, dict) or opaque.get("driver") != DRIVER:
            continue
        parameters: Any = opaque.get("parameters")
        try:
            check(parameters)
        except CniError as error:
            raise CniError(error.code, f"parameters of {author}: {error.msg}", error.details) from None
        yield source, _names(each.get("requests")), dict(parameters)


def _merged(
    configs: list[tuple[str, list[str], dict[str, Any]]], request: str, base: str
) -> tuple[dict[str, Any], set[str]]:
    """The parameters of a request, and the names of those that the claim has set."""
    fields: dict[str, Any] = {}
    of_class: set[str] = set()
    of_claim: set[str] = set()
    for source, requests, parameters in configs:
        if requests and request not in requests and base not in requests:
            continue
        if source == "FromClaim" and (final := of_class & parameters.keys() & {*_OF_THE_CLASS}):
            raise _refusal(f"parameters of the claim: {min(final)}: the class sets it; leave it out")
        (of_class if source == "FromClass" else of_claim).update(parameters)
        fields |= parameters
    return fields, of_claim


@cache
def _rules() -> dict[str, Any]:
    rules, shared = schema.load("claim"), schema.load("netconf")["properties"]
    return rules | {"properties": rules["properties"] | {key: shared[key] for key in SHARED}}


@cache
def _foreign() -> dict[str, str]:
    unset = dict.fromkeys(schema.load("netconf")["properties"].keys() - {*SHARED}, _NO_FIELD)
    return {key.lower(): hint for key, hint in (unset | _UNSETTABLE).items()}


def _ifname(claim: str, request: str, number: int) -> str:
    """An interface name from what survives the pod: the derived MAC of a VM follows from it."""
    key = "\0".join((claim, request, str(number))).encode()
    return f"{_IFNAME}{blake2s(key, digest_size=4).hexdigest()}"


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    if not isinstance(found, dict):
        raise _refusal(f"the claim has no {key}: it is not allocated")
    return found


def _names(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _list(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(document: Mapping[str, Any], key: str) -> str:
    found = document.get(key)
    if not isinstance(found, str) or not found or not found.isascii():
        raise _refusal(f"the claim's allocation has an entry without {key}")
    return found


def _refusal(message: str) -> CniError:
    return CniError(INVALID_NETWORK_CONFIG, message)
