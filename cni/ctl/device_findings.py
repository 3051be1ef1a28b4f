"""What doctor finds of source devices and attachments. Must change nothing."""

from __future__ import annotations

from cni.ctl import virtual_functions
from cni.ctl.finding import Finding
from cni.kernel import ethtool, macvtap
from cni.kernel.rtnl import ARPHRD_ETHER, Rtnl
from cni.lower import offload, renamed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.ctl.inventory import Attachment, Node, Source
    from cni.kernel.rtnl import Link

_OFFLOADS = {
    "tx-generic-segmentation": "gso",
    "rx-checksum": "rx",
}
"""The offloads that a VM's throughput needs: the kernel's name → the name that ethtool -K takes."""


def source(node: Node, source: Source) -> Iterator[Finding]:
    check = f"source {source.name}"
    bad = list(_faults(node, source))
    yield from (Finding(check, *fault) for fault in bad)
    if not bad and source.link:
        over = f" over {', '.join(source.nics)}" if source.nics not in ((), (source.name,)) else ""
        room = [f"{e.name}: {node.count(e)} of {e.capacity} attached" for e in source.entries if e.capacity]
        if source.most:
            room.append(virtual_functions.summary(node, source))
        yield Finding(check, "ok", "; ".join([f"{source.state}{over}, MTU {source.link.mtu}", *room]))


def _faults(node: Node, source: Source) -> Iterator[tuple[str, str, str]]:
    """Each as (severity, message, next step)."""
    link = source.link
    for entry in source.entries:
        if entry.functions and link:
            yield from virtual_functions.faults(node, source, entry)
        if entry.type == "vmdq" and link:
            yield from _offload(node, source, entry.name)
        if entry.capacity and node.count(entry) > entry.capacity:
            yield (
                "warning",
                f"interface {entry.name} has {node.count(entry)} attachments, and a capacity of {entry.capacity}",
                "raise the capacity, or move VMs to another node",
            )
    if link:
        yield from _link_faults(node, source, link)
    else:
        with Rtnl() as host:
            now = renamed.name_now(host, (each.record for each in node.attachments), source.name)
        yield (
            "error",
            f"it is called {now} now" if now else "it is not on this node",
            f"{f'rename {now}' if now else 'plug it in'}, or correct source.dev in the policy (ip link lists what is "
            "there)",
        )


def _offload(node: Node, source: Source, name: str) -> Iterator[tuple[str, str, str]]:
    if not ethtool.can(source.name, offload.FEATURE):
        yield (
            "error",
            f"interface {name} is of type vmdq, and the NIC or its driver has no {offload.FEATURE}",
            "make it of type ethernet",
        )
        return
    wanted = sum(each.record.interface == name for each in node.attachments)
    if (taken := offload.taken(source.name)) < wanted:
        yield (
            "warning",
            f"the NIC has queues for {taken} of {wanted} attachments of {name}; the kernel serves the others, slower",
            "raise its number of queues (ethtool -L), or attach fewer",
        )


def _link_faults(node: Node, source: Source, link: Link) -> Iterator[tuple[str, str, str]]:
    name = source.name
    if link.arphrd != ARPHRD_ETHER or link.kind == "macvtap":
        yield (
            "error",
            "it is not an Ethernet device that can carry others",
            "name a NIC, a bond, a VLAN or a bridge",
        )
    if source.state == "down":
        yield "error", "it is down: no VM on it reaches anything", f"ip link set {name} up"
    elif source.state == "no carrier":
        yield (
            "warning",
            "it has no carrier: no VM on it reaches anything",
            "look at the cable, and at the switch's port",
        )
    if source.master:
        yield (
            "error",
            f"it is a port of {source.master}, and a port takes no macvtap",
            f"name {source.master} as the source, or take it out: ip link set {name} nomaster",
        )
    with Rtnl() as host:
        takers = [
            each.name
            for each in host.links()
            if each.lower == link.index and each.lower_nsid is None and each.mode == macvtap.MODES["passthru"]
        ]
    if takers:
        yield (
            "error",
            f"{takers[0]} uses it exclusively (mode passthru)",
            f"ip link delete {takers[0]}, or use another NIC",
        )
    small = [each for each in node.on(name) if each.link and each.link.mtu > link.mtu]
    if small:
        record = small[0].record
        yield (
            "error",
            f"its MTU {link.mtu} is less than the {record.mtu} of {record.ifname} of {small[0].sandbox}",
            f"ip link set {name} mtu {record.mtu}",
        )
    for nic in source.nics:
        try:
            offloads = ethtool.features(nic)
        except OSError:  # a device that has none to speak of
            continue
        for feature, option in _OFFLOADS.items():
            if offloads.get(feature) is False:
                what = f"the offload {feature} of {nic} is off: throughput of VMs is lower"
                yield "warning", what, f"ethtool -K {nic} {option} on"


def attachments(node: Node) -> Iterator[Finding]:
    for path, why in node.unreadable.items():
        yield Finding(
            "attachments", "warning", f"{path}: {why}", "examine and remove it; DEL does not need it"
        )
    bad = [finding for each in node.attachments for finding in _attachment(each)]
    yield from bad
    if not bad:
        yield Finding("attachments", "ok", f"{len(node.attachments)}, without a fault")


def _attachment(each: Attachment) -> Iterator[Finding]:
    record = each.record
    check = f"{each.sandbox} {record.ifname}"
    if each.link and record.vf:
        yield from (Finding(check, *found) for found in virtual_functions.changes(each))
    if each.status in ("gone", "old"):
        why = "its link is gone" if each.status == "gone" else "it was made before this boot"
        yield Finding(
            check,
            "warning",
            f"{why}, and its record {record.id} is left",
            "the agent removes it; without an agent, run DEL, or GC of its network",
        )
    elif each.status == "down":
        inside = f"nsenter --net={record.netns} ip link set {record.ifname} up"
        yield Finding(check, "error", "its link was set down", inside)
    holders = [holder for holder in each.holders if holder.queues]
    if len(holders) > 1 or sum(holder.queues for holder in holders) > record.queues:
        who = ", ".join(f"{holder.program} {holder.pid} ({holder.queues})" for holder in holders)
        yield Finding(
            check,
            "warning",
            f"queues: {record.queues}, and it is open in {who}: each gets a part of the frames",
            "end the process that should not have it",
        )
