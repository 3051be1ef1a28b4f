"""What the node keeps of one attachment, its names, and the JSON of its file.

Must not know where a record is kept: store.py does.
"""

from __future__ import annotations

import json
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start
from functools import cache, lru_cache

from cni.dataclass import dataclass
from cni.errors import reason
from cni.kernel.vf_settings import VfSettings
from cni.names import is_id, is_ifname
from cni.state.launcher_pod import vm_name
from cni.state.port_profile import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=vars)


HANDOVER_GROUP = 0x766D7470
"""The interface group (ip-link(8)) of links with handover: without a record it tells them from links of mode vepa."""


@dataclass(frozen=True)
class VlanDevice:
    """The VLAN device that an attachment's macvtap is on (lower/vlan.py)."""

    device: str
    """Its name."""
    id: int
    protocol: str
    """"802.1Q" or "802.1ad"."""


@dataclass(frozen=True)
class VfLink:
    """The network device of a virtual function as it was before ADD."""

    mac: str
    mtu: int
    flags: int
    """IFF_* of linux/if.h."""
    alias: str
    ipv6: bool
    """Whether the host's kernel had IPv6 on it."""
    pinned: bool
    """Whether the driver refuses another MAC, because the PF has set one."""


@dataclass(frozen=True)
class VirtualFunction:
    """The virtual function that carries an attachment (lower/sriov.py)."""

    pci: str
    """Its address, "0000:01:10.0"."""
    number: int
    driver: str | None
    before: VfSettings
    """What it was, of the settings that made changes."""
    made: VfSettings
    """What ADD made of it."""
    link: VfLink


@dataclass(frozen=True)
class Record:
    """One attachment. Its key is (network, container_id, ifname), SPEC section 2 "attachment"."""

    network: str
    container_id: str
    ifname: str
    netns: str
    """CNI_NETNS as the runtime gave it."""
    netns_id: tuple[int, int]
    """st_dev and st_ino of the network namespace. The kernel reuses those of a dead one: they do not prove a link."""
    nsid: int
    """The id by which the host's network namespace refers to the pod's. It works when the path is gone."""
    device: str
    """"macvtap" or "tap"."""
    ifindex: int
    mac: str
    """The guest's MAC. A macvtap has the same, a plain tap another one."""
    mtu: int
    queues: int
    boot_id: str
    interface: str | None = None
    """The policy entry's name, if the config names one."""
    source: str | None = None
    mode: str | None = None
    node: str | None = None
    """The path of the device node that ADD has made; None without one."""
    ips: tuple[dict[str, Any], ...] = ()
    """As in a CNI result of version 1.1.0: {"address": "10.1.0.5/24", "gateway": "10.1.0.1"}."""
    routes: tuple[dict[str, Any], ...] = ()
    dns: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    """The network config, for the delegate's DEL; None without a delegate."""
    args: str = ""
    """CNI_ARGS, for the delegate's DEL."""
    cni_path: str = ""
    """CNI_PATH, for the delegate's DEL."""
    device_id: str | None = None
    """The id of the kubelet's device, if the config names one."""
    cdi: str | None = None
    """The path of the CDI spec that ADD has written; None without one."""
    handover: bool = False
    """Whether the macvtap is in vepa mode while it waits for its guest (agent/handover.py); mode is bridge then."""
    vlan: VlanDevice | None = None
    vf: VirtualFunction | None = None
    port: Port | None = None
    """What is in force at the link; None: nothing."""
    claim: bool = False
    """Whether it is a device of a resource claim (claims.py): container_id is the claim's UID, and the claim keeps the
    reservation of ifindex when the attachment ends."""

    @property
    def id(self) -> str:
        """The attachment's id, which names its files in the state folder."""
        return identifier(self.network, self.container_id, self.ifname)

    @property
    def owner(self) -> str:
        """The pod, and the VM of a KubeVirt launcher's pod, for messages; outside Kubernetes the container."""
        if not self.pod:
            return f"container {self.container_id}"
        namespace, name = self.pod
        vm = vm_name(name)
        return f"pod {namespace}/{name}" + (f" (VM {vm})" if vm else "")

    @property
    def pod(self) -> tuple[str, str] | None:
        """The pod's namespace and name; None outside Kubernetes."""
        words = dict(part.partition("=")[::2] for part in self.args.split(";"))
        name = words.get("K8S_POD_NAME")
        return (words.get("K8S_POD_NAMESPACE", ""), name) if name else None

    @property
    def alias(self) -> str:
        """The link's ifalias, which proves without a record that the link is the attachment's."""
        return alias(self.network, self.container_id, self.ifname)


@lru_cache(maxsize=256)
def identifier(network: str, container_id: str, ifname: str) -> str:
    """The id of an attachment. It begins with the container's id, for people who read the folder."""
    key = "\0".join((network, container_id, ifname)).encode()
    return f"{container_id[:12]}-{blake2s(key, digest_size=12).hexdigest()}"


def alias(network: str, container_id: str, ifname: str) -> str:
    """vmtap/<network>/<containerID>/<ifname>, or a digest of it where that is over IFALIASZ (256, linux/if.h)."""
    plain = f"vmtap/{network}/{container_id}/{ifname}"
    return plain if len(plain.encode()) < 256 else f"vmtap/{identifier(network, container_id, ifname)}"


def parse_alias(mark: str) -> tuple[str, str, str] | None:
    """(network, container id, ifname) of an alias(); None if it is a digest, or none of ours."""
    ours, *parts = mark.split("/")
    if ours != "vmtap" or len(parts) != 3:
        return None
    network, container_id, ifname = parts
    if not (is_id(network) and is_id(container_id) and is_ifname(ifname)):  # a pod may write any alias
        return None
    return network, container_id, ifname


@cache
def boot_id() -> str:
    """The id of this boot of the machine (proc(5))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def encode(record: Record) -> bytes:
    """The JSON of a record's file."""
    return _JSON.encode(vars(record)).encode()


def decode(id: str, data: bytes) -> Record:
    """The record in a file of that id. Raises ValueError if it cannot be understood."""
    try:
        document = json.loads(data)
        if document.get("vlan"):
            document["vlan"] = known(VlanDevice, document["vlan"])
        if document.get("port"):
            document["port"] = known(Port, _tuples(document["port"]))
        if document.get("vf"):
            document["vf"] = _function(document["vf"])
        for name in {"netns_id", "ips", "routes"} & document.keys():  # JSON has no tuples
            document[name] = tuple(document[name])
        record = known(Record, document)
        if record.id == id:
            return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no record: {reason(error)}") from None
    raise ValueError("its name is another attachment's")


def _function(document: dict[str, Any]) -> VirtualFunction:
    for name in ("before", "made"):
        document[name] = known(VfSettings, _tuples(document[name]))
    document["link"] = known(VfLink, document["link"])
    return known(VirtualFunction, document)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def known(kind: type[T], document: dict[str, Any], **made: Any) -> T:
    """Make the dataclass, without keys that this version does not know: another one may have written the file.

    made: fields that the caller has decoded. Raises TypeError if a field is missing or has another type than it
    declares.
    """
    declared = kind.__annotations__
    for name in declared.keys() & document.keys():
        if not _fits(document[name], declared[name]):
            raise TypeError(f"{name} is not {declared[name]}")
    return kind(**{name: document[name] for name in declared if name in document}, **made)


_KINDS = {
    "None": type(None),
    "dict[str, Any]": dict,
    **{
        kind.__name__: kind
        for kind in (str, int, bool, VlanDevice, VirtualFunction, VfLink, VfSettings, Port)
    },
}
_TUPLES = {
    "tuple[int, int]": (int, 2),
    "tuple[int, int, int]": (int, 3),
    "tuple[dict[str, Any], ...]": (dict, None),
    "tuple[str, ...]": (str, None),
}
"""The types of the fields, as they are written: what would resolve them is in typing, whose import takes 10 ms."""


def _fits(value: Any, declared: str) -> bool:
    for each in declared.split(" | "):
        if each in _KINDS:
            if type(value) is _KINDS[each]:
                return True
        elif type(value) is tuple:
            item, length = _TUPLES[each]
            if length in (None, len(value)) and all(type(member) is item for member in value):
                return True
    return False
