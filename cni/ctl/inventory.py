"""The shape of a snapshot of the node: source devices, attachments, their pods, the processes that hold them.

snapshot.py takes one. `Node.document()` is the JSON that docs/vmtapctl.md describes. Pure.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import datetime

from cni.config import policy
from cni.kernel import macvtap
from cni.kernel.rtnl import IFF_LOWER_UP, IFF_UP
from cni.lower import vf_discovery
from cni.state.launcher_pod import vm_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.ctl.open_devices import Holder
    from cni.kernel.lldp import Neighbour
    from cni.kernel.rtnl import Link
    from cni.state.claims import Claim, ClaimDevice
    from cni.state.record import Record


@dataclass(frozen=True)
class Pod:
    """The pod, from the runtime's CNI_ARGS."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Traffic:
    """Counters of a link in one direction, since it was made."""

    packets: int
    bytes: int
    dropped: int


@dataclass(frozen=True)
class Attachment:
    """A record, and the state of its link now.

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
    claim: tuple[Claim, ClaimDevice] | None = None
    """The prepared claim, and its device that is attached."""

    @property
    def pod(self) -> Pod | None:
        """The pod; None if the runtime is not Kubernetes'."""
        words = dict(part.partition("=")[::2] for part in self.record.args.split(";"))
        if "K8S_POD_NAME" not in words:
            return None
        return Pod(words.get("K8S_POD_NAMESPACE", ""), words["K8S_POD_NAME"], words.get("K8S_POD_UID", ""))

    @property
    def sandbox(self) -> str:
        """The pod as namespace/name, or else the first characters of the container's id."""
        return f"{self.pod.namespace}/{self.pod.name}" if self.pod else self.record.container_id[:12]

    @property
    def vm(self) -> str | None:
        """The VM's name: QEMU's -name, or else the one in the name of a KubeVirt launcher's pod; None without one."""
        for holder in self.holders:
            if holder.vm:
                return holder.vm
        return vm_name(self.pod.name) if self.pod else None

    @property
    def names(self) -> set[str]:
        """The names by which show and trace find the attachment."""
        record = self.record
        found = {record.id, record.ifname, record.mac, record.container_id, record.network, self.sandbox}
        found |= {_normal(address.partition("/")[0]) for address in self.addresses}
        found |= (
            {self.claim[0].name, f"{self.claim[0].namespace}/{self.claim[0].name}"} if self.claim else set()
        )
        return found | ({self.pod.name} if self.pod else set()) | ({self.vm} if self.vm else set())

    def begins(self, what: str) -> bool:
        """Whether its id, or its container's, begins so."""
        return any(text.startswith(what) for text in (self.record.id, self.record.container_id))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that IPAM leased for the guest."""
        return tuple(str(ip["address"]) for ip in self.record.ips)

    @property
    def waiting(self) -> bool:
        """Whether its link is in vepa mode until its guest is heard (agent/handover.py)."""
        return self.record.handover and self.link is not None and self.link.mode == macvtap.MODES["vepa"]

    @property
    def mode(self) -> str | None:
        """The record's mode, for people."""
        return f"{self.record.mode} (waiting)" if self.waiting else self.record.mode

    @property
    def state(self) -> str:
        """The status, for people."""
        return f"{self.status}, waiting for its guest" if self.waiting else self.status

    @property
    def claimed(self) -> str | None:
        """The resource claim and its request, as "shop/vm-nic (nic)"; None without one."""
        if not self.claim:
            return None
        claim, device = self.claim
        return f"{claim.namespace}/{claim.name} ({device.request})"

    @property
    def function(self) -> str | None:
        """The virtual function that carries the attachment, as "VF 3"; None without one."""
        return f"VF {self.record.vf.number}" if self.record.vf else None

    @property
    def vlan(self) -> int | None:
        """The VLAN id of its frames on the wire; None if they have no tag."""
        if self.record.vlan:
            return self.record.vlan.id
        tag = self.record.vf.made.vlan if self.record.vf else None
        return (tag and tag[0]) or None

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        record, pod = self.record, self.pod
        claim, device = self.claim or (None, None)
        return {
            "id": record.id,
            "network": record.network,
            "containerID": record.container_id,
            "ifname": record.ifname,
            "netns": record.netns,
            "pod": vars(pod) if pod else None,
            "claim": (
                {
                    "namespace": claim.namespace,
                    "name": claim.name,
                    "uid": claim.uid,
                    "request": device.request,
                }
                if claim and device
                else None
            ),
            "vm": self.vm,
            "status": self.status,
            "device": record.device,
            "mode": record.mode,
            "waiting": self.waiting,
            "interface": record.interface,
            "source": record.source,
            "virtualFunction": (
                {"number": record.vf.number, "address": record.vf.pci} if record.vf else None
            ),
            "vlan": self.vlan,
            "port": record.port.fields() if record.port else None,
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
    """A source device of attachments or of the policy. link: None if it does not exist.

    nics: what it sends by: the ports of a bridge or bond, the device under a VLAN; else itself.
    """

    name: str
    link: Link | None
    master: str | None = None
    nics: tuple[str, ...] = ()
    speed: int | None = None
    """In Mb/s; None if the NIC reports none."""
    driver: str | None = None
    entries: tuple[policy.Interface, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    functions: tuple[vf_discovery.Function, ...] = ()
    """Its virtual functions."""
    most: int = 0
    """How many VFs it could have; 0 if it is no PF."""
    switch_mode: str | None = None
    """The mode of the embedded switch, "bridge" or "vepa"; None if there is none, or its driver does not report it."""

    @property
    def state(self) -> str:
        """ "up", "no carrier", "down" or "missing"."""
        if self.link is None:
            return "missing"
        if not self.link.flags & IFF_UP:
            return "down"
        return "up" if self.link.flags & IFF_LOWER_UP else "no carrier"

    def document(self) -> dict[str, Any]:
        """The JSON document."""
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
    """The snapshot of a node. unreadable: path of a record → why it cannot be read."""

    name: str
    time: datetime
    sources: tuple[Source, ...]
    attachments: tuple[Attachment, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def on(self, source: str | None) -> list[Attachment]:
        """The attachments on that source; None: the plain taps."""
        return [each for each in self.attachments if each.record.source == source]

    def find(self, what: str) -> list[Attachment]:
        """The attachments that have the name, as NAME/IFNAME also one of several, or whose id begins so."""
        wanted = {what, what.lower(), _normal(what)}
        if found := [each for each in self.attachments if wanted & each.names]:
            return found
        name, _, ifname = what.rpartition("/")
        if found := [
            each for each in self.attachments if each.record.ifname == ifname and name in each.names
        ]:
            return found
        return [each for each in self.attachments if len(what) >= 4 and each.begins(what)]

    def count(self, entry: policy.Interface) -> int:
        """How many attachments that entry of the policy has granted."""
        return sum(each.record.interface == entry.name for each in self.attachments)

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "node": self.name,
            "time": self.time.isoformat(timespec="seconds"),
            "sources": [source.document() for source in self.sources],
            "attachments": [each.document() for each in self.attachments],
            "unreadable": dict(self.unreadable),
        }


def _normal(what: str) -> str:
    """An IP address as Python writes it; any other text as it is."""
    try:
        return str(ipaddress.ip_address(what))
    except ValueError:
        return what
