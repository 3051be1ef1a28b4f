"""What is on this node, as one snapshot: source devices, attachments, their pods, the processes that hold them.

Reads records, netlink, sysfs and /proc; the record says what ADD made, the kernel says what has become of it.
`Node.document()` is the JSON that docs/vmtapctl.md describes. Must not print.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cni.config import policy
from cni.ctl import open_devices, sysfs
from cni.errors import CniError
from cni.kernel import netns, vf
from cni.kernel.rtnl import IFF_UP, Rtnl
from cni.lower import vf_discovery
from cni.spec import IO_FAILURE
from cni.state import lock
from cni.state.record import boot_id, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from cni.config.policy import Policy
    from cni.ctl.lldp import Neighbour
    from cni.ctl.locations import Settings
    from cni.ctl.open_devices import Holder
    from cni.ctl.sysfs import Sysfs
    from cni.kernel.rtnl import Link
    from cni.state.record import Record

IFF_LOWER_UP = 0x10000
_LAUNCHER_POD = re.compile(r"virt-launcher-(.+)-[a-z0-9]{5}")
_DIRECTIONS = {"macvtap": ("rx", "tx"), "tap": ("tx", "rx")}
"""Which of the link's counters is towards the guest: a tap's link receives what the guest sends."""


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


def take(settings: Settings, neighbours: Mapping[str, Neighbour] | None = None) -> Node:
    """Look at everything once. neighbours: by NIC. Raises CniError if the state folder cannot be read."""
    records, unreadable = read_records(settings.run)
    try:
        rules = policy.load(settings.policy)
    except CniError:  # doctor's business
        rules = None
    with Rtnl() as host, sysfs.of() as own:
        links = {link.name: link for link in host.links()}
        attachments = _attachments(host, settings.run, records)
        names = {dev: None for entry in rules.interfaces for dev in entry.sources} if rules else {}
        names |= {each.record.source: None for each in attachments if each.record.source}
        sources = tuple(_source(name, links, own, rules, neighbours or {}, host=host) for name in names)
    return Node(
        name=os.uname().nodename,
        time=datetime.now().astimezone(),
        sources=sources,
        attachments=tuple(sorted(attachments, key=lambda a: (a.sandbox, a.record.ifname))),
        unreadable=unreadable,
    )


def read_records(run: str) -> tuple[list[tuple[Record, datetime]], dict[str, str]]:
    """Every record with the time of its file, and the files that are none. Raises CniError 5."""
    folder = f"{run}/attachments"
    found: list[tuple[Record, datetime]] = []
    unreadable: dict[str, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:  # nothing was ever attached
        names = []
    except OSError as error:
        raise CniError(IO_FAILURE, f"{folder} cannot be read: run vmtapctl as root", str(error)) from error
    for name in names:
        path = f"{folder}/{name}"
        if name.endswith(".bad"):
            unreadable[path] = "it was set aside"
        if not name.endswith(".json"):
            continue
        try:
            with open(path, "rb") as file:
                data = file.read()
                changed = os.fstat(file.fileno()).st_mtime
            found.append((decode(name.removesuffix(".json"), data), datetime.fromtimestamp(changed, UTC)))
        except FileNotFoundError:  # DEL was quicker
            pass
        except (OSError, ValueError) as error:
            unreadable[path] = str(error)
    return found, unreadable


def living(run: str) -> list[Attachment]:
    """Those whose link is there; no more than that is looked at. Raises CniError 5."""
    with Rtnl() as host:
        return [
            Attachment(record, since, "there", link)
            for record, since in read_records(run)[0]
            if record.boot_id == boot_id() and (link := _link(host, record))
        ]


def _attachments(host: Rtnl, run: str, records: Iterable[tuple[Record, datetime]]) -> list[Attachment]:
    made: list[Attachment] = []
    macvtaps: dict[tuple[int, int], str] = {}
    taps: dict[tuple[tuple[int, int], str], str] = {}
    with ExitStack() as stack:
        seen: dict[tuple[int, int], Sysfs | None] = {}
        for record, since in records:
            if record.boot_id != boot_id():
                made.append(Attachment(record, since, "old"))
                continue
            link = _link(host, record)
            if link is None:
                made.append(Attachment(record, since, _unless_busy(run, record, "gone")))
                continue
            if record.netns_id not in seen:
                namespace = open_netns(record)
                if namespace is not None:
                    stack.callback(os.close, namespace)
                seen[record.netns_id] = (
                    None if namespace is None else stack.enter_context(sysfs.of(namespace))
                )
            own = seen[record.netns_id]
            device = _number(own, record) if own and record.device == "macvtap" else None
            if device:
                macvtaps[device] = record.id
            elif record.device == "tap":
                taps[record.netns_id, record.ifname] = record.id
            towards, back = _DIRECTIONS[record.device]
            made.append(
                Attachment(
                    record,
                    since,
                    "idle" if link.flags & IFF_UP else _unless_busy(run, record, "down"),
                    link,
                    device,
                    to_guest=_traffic(own, record.ifname, towards),
                    from_guest=_traffic(own, record.ifname, back),
                )
            )
    held = open_devices.find(macvtaps, taps)
    return [
        _judged(
            each, open_devices.with_given(f"{run}/holders/{each.record.id}", held.get(each.record.id, []))
        )
        for each in made
    ]


def _judged(each: Attachment, found: tuple[Holder, ...]) -> Attachment:
    status = each.status
    if each.link and status == "idle":
        if each.record.device == "macvtap" and not each.link.flags & IFF_LOWER_UP:
            status = "no carrier"  # a tap has one exactly while it is held
        elif any(holder.queues for holder in found):
            status = "in use"
    return Attachment(**{**vars(each), "status": status, "holders": found})


def _unless_busy(run: str, record: Record, status: str) -> str:
    """The status, unless an ADD or DEL is at work on it at this moment."""
    return "in progress" if lock.is_held(f"{run}/lock", record.id) else status


def _link(host: Rtnl, record: Record) -> Link | None:
    """The record's link, wherever its namespace is known from; proven by index and alias."""
    try:
        link = host.link(index=record.ifindex, nsid=record.nsid)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that: no namespace has the id
            raise
        return None
    return link if link and link.alias == record.alias else None


def open_netns(record: Record) -> int | None:
    """The record's namespace: by its path, or else by a process that is in it. The caller closes it."""
    with suppress(CniError):
        fd = netns.open_path(record.netns)
        if netns.identity(fd) == record.netns_id:
            return fd
        os.close(fd)
    for name in os.listdir("/proc"):
        with suppress(OSError, CniError):
            path = f"/proc/{name}/ns/net"
            status = os.stat(path)
            if name.isdecimal() and (status.st_dev, status.st_ino) == record.netns_id:
                return netns.open_path(path)
    return None


def _number(own: Sysfs, record: Record) -> tuple[int, int] | None:
    text = own.text(f"{record.ifname}/macvtap/tap{record.ifindex}/dev")
    if text is None:
        return None
    major, _, minor = text.partition(":")
    return int(major), int(minor)


def _traffic(own: Sysfs | None, ifname: str, direction: str) -> Traffic | None:
    if own is None:
        return None
    counts = [
        own.number(f"{ifname}/statistics/{direction}_{what}") or 0 for what in ("packets", "bytes", "dropped")
    ]
    return Traffic(*counts)


def _source(
    name: str,
    links: Mapping[str, Link],
    own: Sysfs,
    rules: Policy | None,
    neighbours: Mapping[str, Neighbour],
    *,
    host: Rtnl,
) -> Source:
    link = links.get(name)
    entries = tuple(entry for entry in rules.interfaces if name in entry.sources) if rules else ()
    if link is None:
        return Source(name, None, entries=entries)
    by_index = {each.index: each for each in links.values()}
    nics = uplinks(link, by_index)
    speeds = [own.number(f"{nic}/speed") or 0 for nic in nics]
    return Source(
        name=name,
        link=link,
        master=by_index[link.master].name if link.master in by_index else None,
        nics=nics,
        speed=max((speed for speed in speeds if speed > 0), default=None),
        driver=own.target(f"{nics[0]}/device/driver") if len(nics) == 1 else None,
        entries=entries,
        neighbours=tuple(neighbours[nic] for nic in nics if nic in neighbours),
        functions=tuple(vf_discovery.functions(name, own.path)),
        most=(most := vf_discovery.most(name, own.path)),
        switch_mode=_switch_mode(host, link) if most else None,
    )


def _switch_mode(host: Rtnl, pf: Link) -> str | None:
    number = vf.switch_mode(host, pf.index)
    return next((name for name, mode in vf.SWITCH_MODES.items() if mode == number), None)


def uplinks(link: Link, by_index: Mapping[int, Link]) -> tuple[str, ...]:
    """What link sends by, all the way down; the ports that lead to attachments are left out."""
    ports = [
        each
        for each in by_index.values()
        if each.master == link.index and not each.alias.startswith("vmtap/")
    ]
    if not ports and link.kind in ("vlan", "macvlan"):
        ports = [each for each in by_index.values() if each.index == link.lower]
    if not ports:
        return () if link.kind == "bridge" else (link.name,)
    return tuple(dict.fromkeys(nic for port in ports for nic in uplinks(port, by_index)))
