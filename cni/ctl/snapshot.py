"""Takes the snapshot of a node: records, links, sysfs and /proc, looked at once. inventory.py has its shape.

The record shows what ADD made, the kernel what is there now. Must not print, and must not change anything.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

from cni.config import policy
from cni.ctl import open_devices
from cni.ctl.inventory import Attachment, Node, Source, Traffic
from cni.errors import CniError, reason
from cni.kernel import sysfs, vf
from cni.kernel.rtnl import IFF_LOWER_UP, IFF_UP, Rtnl
from cni.lower import vf_discovery
from cni.spec import IO_FAILURE
from cni.state import lock
from cni.state.claims import decode as decode_claim
from cni.state.lookup import find_link, opened_netns
from cni.state.record import boot_id, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeVar

    from cni.config.policy import Policy
    from cni.ctl.locations import Settings
    from cni.ctl.open_devices import Holder
    from cni.kernel.lldp import Neighbour
    from cni.kernel.rtnl import Link
    from cni.kernel.sysfs import Sysfs
    from cni.state.claims import Claim
    from cni.state.record import Record

    Kept = TypeVar("Kept")

_DIRECTIONS = {"macvtap": ("rx", "tx"), "tap": ("tx", "rx")}
"""Which counter of the link is towards the guest, and which is from it: a tap receives what the guest sends."""


def take(settings: Settings, neighbours: Mapping[str, Neighbour] | None = None) -> Node:
    """Take the snapshot. neighbours: LLDP neighbours by NIC. Raises CniError if the state folder cannot be read."""
    records, unreadable = read_records(settings.run)
    claims = {
        claim.attachment(each): (claim, each)
        for claim, _ in read_claims(settings.run)[0]
        for each in claim.devices
    }
    try:
        rules = policy.load(settings.policy)
    except CniError:  # doctor's business
        rules = None
    with Rtnl() as host, sysfs.mounted() as own:
        links = {name: link for link in host.links() for name in (link.name, *link.altnames)}
        attachments = [
            replace(each, claim=claims.get(each.record.id))
            for each in _attachments(host, settings.run, records)
        ]
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
    """Every record with its file's time of change; and path → reason of the files that are no record. CniError 5."""
    return _read(f"{run}/attachments", decode)


def read_claims(run: str) -> tuple[list[tuple[Claim, datetime]], dict[str, str]]:
    """Every prepared claim with its file's time of change; and path → reason of the files that are none. CniError 5."""
    return _read(f"{run}/claims", decode_claim)


def _read(
    folder: str, decode: Callable[[str, bytes], Kept]
) -> tuple[list[tuple[Kept, datetime]], dict[str, str]]:
    found: list[tuple[Kept, datetime]] = []
    unreadable: dict[str, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:  # nothing was ever kept there
        names = []
    except OSError as error:
        raise CniError(IO_FAILURE, f"{folder} cannot be read: run vmtapctl as root", reason(error)) from error
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
        except FileNotFoundError:  # it ended just now
            pass
        except (OSError, ValueError) as error:
            unreadable[path] = reason(error)
    return found, unreadable


def living(run: str) -> list[Attachment]:
    """The attachments whose link exists; nothing else of them is looked up. Raises CniError 5."""
    with Rtnl() as host:
        return [
            Attachment(record, since, "there", link)
            for record, since in read_records(run)[0]
            if record.boot_id == boot_id() and (link := find_link(host, record))
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
            link = find_link(host, record)
            if link is None:
                made.append(Attachment(record, since, _unless_busy(run, record, "gone")))
                continue
            if record.netns_id not in seen:
                namespace = stack.enter_context(opened_netns(record))
                seen[record.netns_id] = (
                    None if namespace is None else stack.enter_context(sysfs.mounted(namespace))
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
    """The status, or "in progress" while a request holds the attachment's lock."""
    return "in progress" if lock.is_held(f"{run}/lock", record.id) else status


def _number(own: Sysfs, record: Record) -> tuple[int, int] | None:
    """(major, minor) of the macvtap's character device; None if it is gone."""
    try:
        major, minor = own.attribute(f"{record.ifname}/macvtap/tap{record.ifindex}/dev").split(":")
    except OSError:
        return None
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
    """The NICs that carry the link's frames: through VLANs, bonds and bridges, without the ports of attachments."""
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
