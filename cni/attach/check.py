"""CHECK: is the attachment as ADD left it, but for what later plugins of the chain may change (SPEC section 4)?

Must change nothing, and open no queue: an open queue takes frames.
"""

from __future__ import annotations

import os

from cni import lower
from cni.attach import plan as plans
from cni.attach import result
from cni.config import mac as mac_rules
from cni.config import schema
from cni.dataclass import replace
from cni.errors import CniError, reason
from cni.kernel import bridge_port, macvtap, netns, tapdev
from cni.kernel.rtnl import IFF_UP, Rtnl
from cni.spec import CHECK_FAILED, INVALID_NETWORK_CONFIG
from cni.state.record import alias

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.attach.call import Call
    from cni.attach.plan import Plan
    from cni.config.policy import Grant
    from cni.kernel.rtnl import Link
    from cni.state.record import Record


def check(call: Call, grant: Grant) -> None:
    """Raises CniError 108 that names what differs, 7 without a prevResult."""
    assert call.netns is not None  # noqa: S101 - plugin.py opens it for every command but DEL
    conf = call.conf
    if conf.prev_result is None:
        raise CniError(INVALID_NETWORK_CONFIG, "prevResult is missing: CHECK compares with the result of ADD")
    previous = result.parse(conf.prev_result, conf.cni_version)
    listed = [
        index
        for index, each in enumerate(previous.interfaces)
        if each.name == call.ifname and each.sandbox == call.netns_path
    ]
    if not listed:
        raise CniError(
            CHECK_FAILED,
            f"prevResult.interfaces has no {call.ifname} with sandbox {call.netns_path}: was ADD run?",
        )
    plan = plans.decide_for(call, grant, call.source(grant))
    record = call.node.store.load(call.id)
    if plan.lower and plan.source:
        if found := lower.differences(call.host, record, plan.source, plan.lower):
            raise CniError(CHECK_FAILED, f"{call.ifname}: {'; '.join(found)}")
        if record and (below := lower.device(call.host, record)):
            plan = replace(plan, source=below.link, mode=below.mode or plan.mode)
    link = _check_link(call, plan, record, previous.interfaces[listed[0]].mac)
    if plan.device == "macvtap":
        _check_device(call, record)
    elif plan.source:
        _check_port(call, plan, link.index)
    if record and record.port:
        _check_filters(call, record)
    if conf.addressing == "link":
        from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

        leased = {each.address for each in previous.ips if each.interface == listed[0]}
        if missing := leased - iproute.addresses(call.netns, link.index):
            raise CniError(
                CHECK_FAILED, f"{call.ifname}: address {', '.join(sorted(missing))} is not on it any more"
            )
    if delegate := call.delegate_after_add(record):
        delegate.run("CHECK")


def _check_link(call: Call, plan: Plan, record: Record | None, mac: str) -> Link:
    """Compare the link with the plan. mac: prevResult's; a later plugin may have changed it, and the link's with it."""
    assert call.netns is not None  # noqa: S101 - as in check
    with netns.entered(call.netns, call.host.fd):
        pod = Rtnl()
    with pod:
        link = pod.link(name=call.ifname)
        if link is None:
            raise CniError(CHECK_FAILED, f"{call.ifname} is gone from the pod: give the pod a new sandbox")
        wanted = mac
        # A plain tap's MAC differs from the guest's, unless a later plugin (tuning) has set both.
        if plan.source is None and link.mac != mac:
            wanted = mac and mac_rules.of_plain_tap(mac)
        expected: list[tuple[str, object, object]] = [
            ("ifalias", link.alias, alias(call.conf.name, call.container_id, call.ifname)),
            ("kind", link.kind, "macvtap" if plan.device == "macvtap" else "tun"),
            ("MAC", link.mac if wanted else "", wanted),
            ("state", "up" if link.flags & IFF_UP else "down", "up"),
            ("MTU", link.mtu, min(link.mtu, plan.mtu)),  # a later plugin (tuning) may lower it
        ]
        if plan.device == "macvtap" and plan.source and plan.mode:
            modes = {number: name for name, number in macvtap.MODES.items()}
            mode = modes.get(link.mode or 0)
            waits = record and record.handover and mode == "vepa"  # for its guest
            expected += [
                ("mode", mode, mode if waits else plan.mode),
                ("lower device", _lower(link.lower, link.lower_nsid), _below(plan.source, pod, call, link)),
            ]
    if record:
        expected.append(("ifindex", link.index, record.ifindex))
    for what, found, made in expected:
        if found != made:
            raise CniError(
                CHECK_FAILED,
                f"{call.ifname}: {what} is {schema.show(found)}, and should be {schema.show(made)}",
            )
    return link


def _below(source: Link, pod: Rtnl, call: Call, link: Link) -> str:
    """The lower device of a macvtap that ADD made on source, as _lower() has it; pod is a socket of its namespace."""
    if source.kind not in ("macvlan", "macvtap"):
        return _lower(source.index, pod.nsid(call.host.fd))
    # The kernel takes the lower device of that (macvlan_common_newlink). If it is in a third network namespace, as on a
    # node that is a container with a macvlan, the pod's id for that namespace is taken as it is.
    return _lower(source.lower, link.lower_nsid if source.lower_nsid is not None else pod.nsid(call.host.fd))


def _lower(index: int | None, nsid: int | None) -> str:
    return f"ifindex {index} of network namespace {nsid}"


def _check_device(call: Call, record: Record | None) -> None:
    """Check that the character device is there, and that the node which ADD made, if it did, is that device's."""
    assert call.netns is not None  # noqa: S101 - as in check
    _, major, minor = tapdev.number(call.netns, call.ifname)
    if record is None or record.node is None:
        return
    try:
        found = os.lstat(record.node).st_rdev
    except OSError as error:
        raise CniError(CHECK_FAILED, f"the device node {record.node} is gone", reason(error)) from error
    if found != os.makedev(major, minor):
        raise CniError(CHECK_FAILED, f"the device node {record.node} is another device than the link's")


def _check_filters(call: Call, record: Record) -> None:
    """Check that the filters are those of the record's profile."""
    from cni.port import guard  # noqa: PLC0415 - few attachments have any

    assert call.netns is not None  # noqa: S101 - as in check
    if record.device == "tap":
        intact = guard.is_intact(record, call.host)
    else:
        with netns.entered(call.netns, call.host.fd), Rtnl() as pod:
            intact = guard.is_intact(record, pod)
    if not intact:
        raise CniError(
            CHECK_FAILED,
            f"{call.ifname}: its filters or limits (port) are not as ADD made them: give the pod a new sandbox",
        )


def _check_port(call: Call, plan: Plan, ifindex: int) -> None:
    assert plan.source is not None  # noqa: S101 - as in check
    if bridge_port.state(call.host, ifindex) != (plan.source.index, plan.mode == "pepa"):
        name, _ = bridge_port.veth_names(ifindex)
        raise CniError(
            CHECK_FAILED,
            f"{call.ifname}: its host end {name} is not a port of {plan.source.name} in mode {plan.mode} any more",
        )
