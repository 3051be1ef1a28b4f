"""The shape of a snapshot of the node: source devices, attachments, their pods, the processes that hold them.

snapshot.py takes one. `Node.document()` is the JSON that docs/vmtapctl.md describes. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

from cni.config import policy
from cni.kernel.rtnl import IFF_UP
from cni.lower import vf_discovery

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.ctl.lldp import Neighbour
    from cni.ctl.open_devices import Holder
    from cni.kernel.rtnl import Link
    from cni.state.record import Record

IFF_LOWER_UP = 0x10000
_LAUNCHER_POD = re.compile(r"virt-launcher-(.+)-[a-z0-9]{5}")


@dataclass(frozen=True)
class Pod:
    """As the runtime named it in CNI_ARGS."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Traffic:
    """Of the link, since it was made."""

    packets: int
    bytes: int
    dropped: int


@dataclass(frozen=True)
class Attachment:
    """A record, and what the kernel says of it now.

    status: "in use" or "idle" (does a process hold the device?); "no carrier" (of the source), "down", "gone"
    (the link is not there any more), "old" (a record of an earlier boot), "in progress" (an ADD or DEL is at work).
    """

    record: Record
    since: datetime
    status: str
    link: Link | None = None
    device: tuple[int, int] | None = None
    holders: tuple[Holder, ...] = ()
    to_guest: Traffic | None = None
    from_guest: Traffic | None = None

    @property
    def pod(self) -> Pod | None:
        """None where no Kubernetes runtime made it."""
        words = dict(part.partition("=")[::2] for part in self.record.args.split(";"))
        if "K8S_POD_NAME" not in words:
            return None
        return Pod(words.get("K8S_POD_NAMESPACE", ""), words["K8S_POD_NAME"], words.get("K8S_POD_UID", ""))

    @property
    def sandbox(self) -> str:
        """The pod for a person: namespace/name, or else the beginning of the container's id."""
        return f"{self.pod.namespace}/{self.pod.name}" if self.pod else self.record.container_id[:12]

    @property
    def vm(self) -> str | None:
        """The VM's name: QEMU's, or else the one in the name of a KubeVirt launcher's pod."""
        for holder in self.holders:
            if holder.vm:
                return holder.vm
        match = self.pod and _LAUNCHER_POD.fullmatch(self.pod.name)
        return match[1] if match else None

    @property
    def names(self) -> set[str]:
        """The names by which `vmtapctl show` finds the attachment."""
        record = self.record
        found = {record.id, record.ifname, record.mac, record.container_id, record.network, self.sandbox}
        return found | ({self.pod.name} if self.pod else set()) | ({self.vm} if self.vm else set())

    @property
    def addresses(self) -> tuple[str, ...]:
        """The guest's, as IPAM leased them."""
        return tuple(str(ip["address"]) for ip in self.record.ips)

    @property
    def function(self) -> str | None:
        """The virtual function that carries it."""
        return f"VF {self.record.vf.number}" if self.record.vf else None

    @property
    def vlan(self) -> int | None:
        """What its frames are tagged with on the wire."""
        if self.record.vlan:
            return self.record.vlan.id
        tag = self.record.vf.made.vlan if self.record.vf else None
        return (tag and tag[0]) or None

    def document(self) -> dict[str, Any]:
        """For programs."""
        record, pod = self.record, self.pod
        return {
            "id": record.id,
            "network": record.network,
            "containerID": record.container_id,
            "ifname": record.ifname,
            "netns": record.netns,
            "pod": vars(pod) if pod else None,
            "vm": self.vm,
            "status": self.status,
            "device": record.device,
            "mode": record.mode,
            "interface": record.interface,
            "source": record.source,
            "virtualFunction": (
                {"number": record.vf.number, "address": record.vf.pci} if record.vf else None
            ),
            "vlan": self.vlan,
            "mac": record.mac,
            "mtu": record.mtu,
            "queues": record.queues,
            "addresses": list(self.addresses),
            "ifindex": record.ifindex,
            "deviceNumber": "{}:{}".format(*self.device) if self.device else None,
            "deviceNode": record.node,
            "since": self.since.isoformat(timespec="seconds"),
            "holders": [vars(holder) for holder in self.holders],
            "toGuest": vars(self.to_guest) if self.to_guest else None,
            "fromGuest": vars(self.from_guest) if self.from_guest else None,
        }


@dataclass(frozen=True)
class Source:
    """A device that attachments sit on, or that the policy names. link: None if it is not there.

    nics: what it sends by: the ports of a bridge or bond, the device under a VLAN; else itself.
    """

    name: str
    link: Link | None
    master: str | None = None
    nics: tuple[str, ...] = ()
    speed: int | None = None
    """Mb/s."""
    driver: str | None = None
    entries: tuple[policy.Interface, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    functions: tuple[vf_discovery.Function, ...] = ()
    """Its VFs."""
    most: int = 0
    """How many VFs it could have; 0 if it is no PF."""
    switch_mode: str | None = None
    """The embedded switch's, "bridge" or "vepa"; None where the NIC has none, or its driver does not say."""

    @property
    def state(self) -> str:
        """ "up", "no carrier", "down" or "missing"."""
        if self.link is None:
            return "missing"
        if not self.link.flags & IFF_UP:
            return "down"
        return "up" if self.link.flags & IFF_LOWER_UP else "no carrier"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "state": self.state,
            "kind": self.link.kind if self.link else None,
            "mac": self.link.mac if self.link else None,
            "mtu": self.link.mtu if self.link else None,
            "master": self.master,
            "nics": list(self.nics),
            "speed": self.speed,
            "driver": self.driver,
            "interfaces": [
                {"name": entry.name, "modes": list(entry.modes or ()), "capacity": entry.capacity}
                for entry in self.entries
            ],
            "switch": [vars(neighbour) for neighbour in self.neighbours],
            "virtualFunctions": {
                "most": self.most,
                "switchMode": self.switch_mode,
                "made": [
                    {"number": each.number, "address": each.pci, "link": each.link, "driver": each.driver}
                    for each in self.functions
                ],
            }
            if self.most
            else None,
        }


@dataclass(frozen=True)
class Node:
    """The snapshot. unreadable: path → what is wrong with that record."""

    name: str
    time: datetime
    sources: tuple[Source, ...]
    attachments: tuple[Attachment, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def on(self, source: str | None) -> list[Attachment]:
        """The attachments of that source; of none: plain taps."""
        return [each for each in self.attachments if each.record.source == source]

    def count(self, entry: policy.Interface) -> int:
        """How many were granted by that entry of the policy."""
        return sum(each.record.interface == entry.name for each in self.attachments)

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "node": self.name,
            "time": self.time.isoformat(timespec="seconds"),
            "sources": [source.document() for source in self.sources],
            "attachments": [each.document() for each in self.attachments],
            "unreadable": dict(self.unreadable),
        }
