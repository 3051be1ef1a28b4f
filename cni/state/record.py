"""What the node knows of one attachment, its names, and the JSON of its file.

Pure but for boot_id(). Must not know where a record is kept: store.py does.
"""

from __future__ import annotations

import json
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start
from dataclasses import dataclass, fields
from functools import cache, lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True)
class Record:
    """One attachment. Its key is (network, container_id, ifname), SPEC section 2 "attachment"."""

    network: str
    container_id: str
    ifname: str
    netns: str
    """CNI_NETNS as the runtime gave it."""
    netns_id: tuple[int, int]
    """st_dev and st_ino of the network namespace. The kernel uses a dead one's again: ifindex proves a link."""
    nsid: int
    """The id by which the host's namespace knows the pod's: reaches the link when the path is gone."""
    device: str
    """"macvtap" or "tap"."""
    ifindex: int
    mac: str
    """The guest's MAC; a macvtap has the same, a plain tap must have another."""
    mtu: int
    queues: int
    boot_id: str
    interface: str | None = None
    """The policy entry's name, if the config named one."""
    source: str | None = None
    mode: str | None = None
    node: str | None = None
    """The device node that ADD made for an owner, if it was asked to."""
    ips: tuple[dict[str, Any], ...] = ()
    """As in a CNI result of 1.1.0: {"address": "10.1.0.5/24", "gateway": "10.1.0.1"}."""
    routes: tuple[dict[str, Any], ...] = ()
    dns: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    """The network config, kept where a delegate has to be told of the end."""
    args: str = ""
    """CNI_ARGS, kept for the same reason."""
    cni_path: str = ""
    """CNI_PATH, too: where ADD found the delegate."""
    device_id: str | None = None
    """The device that the kubelet allocated, if the config named one."""
    cdi: str | None = None
    """The CDI spec file that ADD wrote for it, if it was asked to."""
    vlan: dict[str, Any] | None = None
    """The VLAN device that its macvtap is on (cni/lower/vlan.py)."""
    vf: dict[str, Any] | None = None
    """The virtual function, what it was and what was made of it (cni/lower/sriov.py)."""

    @property
    def id(self) -> str:
        """The record's name in the folder."""
        return identifier(self.network, self.container_id, self.ifname)

    @property
    def alias(self) -> str:
        """The link's ifalias, by which it is known as ours without any record."""
        return alias(self.network, self.container_id, self.ifname)


_FIELDS = tuple(field.name for field in fields(Record))


@lru_cache(maxsize=256)
def identifier(network: str, container_id: str, ifname: str) -> str:
    """A file name for an attachment: begins with the container's id, for the eye."""
    key = "\0".join((network, container_id, ifname)).encode()
    return f"{container_id[:12]}-{blake2s(key, digest_size=12).hexdigest()}"


def alias(network: str, container_id: str, ifname: str) -> str:
    """vmtap/<network>/<containerID>/<ifname>, or a digest of it where that is over IFALIASZ (256, linux/if.h)."""
    plain = f"vmtap/{network}/{container_id}/{ifname}"
    return plain if len(plain.encode()) < 256 else f"vmtap/{identifier(network, container_id, ifname)}"


def parse_alias(mark: str) -> tuple[str, str, str] | None:
    """(network, container id, ifname) of an alias(); None if it is a digest, or none of ours."""
    ours, *parts = mark.split("/")
    if ours != "vmtap" or len(parts) != 3 or not all(parts):
        return None
    return parts[0], parts[1], parts[2]


@cache
def boot_id() -> str:
    """Another one after each boot (proc(5)), which no process outlives."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def decode(id: str, data: bytes) -> Record:
    """The record in a file of that id. Raises ValueError if it cannot be understood."""
    try:
        document = json.loads(data)
        # An older or newer version of us may have written it: what one does not know has a default.
        record = Record(**{name: document[name] for name in _FIELDS if name in document})
        for name in ("netns_id", "ips", "routes"):  # JSON knows lists only
            object.__setattr__(record, name, tuple(getattr(record, name)))
        if record.id == id:
            return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no record: {error!r}") from None
    raise ValueError("its name is another attachment's")
