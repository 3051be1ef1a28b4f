"""CHECK: is the attachment as ADD left it, as far as later plugins of the chain may not change it (SPEC section 4)?

Must change nothing, and open no queue: an open queue takes frames.
"""

from __future__ import annotations

import os
from dataclasses import replace

from cni.attach import plan as plans
from cni.attach import result
from cni.config import mac as mac_rules
from cni.errors import CniError
from cni.kernel import macvtap, netns, tapdev
from cni.kernel.rtnl import IFF_UP, Rtnl
from cni.spec import CHECK_FAILED, INVALID_NETWORK_CONFIG
from cni.state.record import alias

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.attach.attachment import Call
    from cni.attach.plan import Plan
    from cni.config.policy import Grant
    from cni.kernel.rtnl import Link


def check(call: Call, grant: Grant) -> None:
    """Raises CniError 108 that names what is not as it should be, 7 without a prevResult."""
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
    plan = plans.decide(
        call.source(grant), conf, grant, call.container_id, call.ifname, arguments=call.arguments
    )
    if plan.functions:
        plan = _check_function(call, plan)
    if plan.offload and plan.source:
        from cni.kernel import ethtool  # noqa: PLC0415 - most nodes have none
        from cni.lower import offload  # noqa: PLC0415 - most nodes have none

        if not ethtool.features(plan.source.name).get(offload.FEATURE):
            raise CniError(CHECK_FAILED, f"{offload.FEATURE} of {plan.source.name} is off, and ADD had it on")
    if plan.vlan and (record := call.store.load(call.id)) and record.vlan:
        from cni.lower import vlan  # noqa: PLC0415 - for those who ask for one

        plan = replace(plan, source=vlan.lower(call.host, record))
    link = _check_link(call, plan, previous.interfaces[listed[0]].mac)
    if plan.device == "macvtap":
        _check_device(call)
    elif plan.source:
        _check_port(plan, link.index, call.ifname)
    if conf.addressing == "link":
        from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

        leased = {each.address for each in previous.ips if each.interface == listed[0]}
        if missing := leased - iproute.addresses(call.netns, link.index):
            raise CniError(
                CHECK_FAILED, f"{call.ifname}: address {', '.join(sorted(missing))} is not on it any more"
            )
    if delegate := call.delegate():
        delegate.run("CHECK")


def _check_link(call: Call, plan: Plan, mac: str) -> Link:
    """The link, compared with the plan. mac is prevResult's, which a later plugin may have changed with the link's."""
    assert call.netns is not None  # noqa: S101 - as in check
    with netns.entered(call.netns, call.host.fd):
        pod = Rtnl()
    with pod:
        link = pod.link(name=call.ifname)
        if link is None:
            raise CniError(CHECK_FAILED, f"{call.ifname} is gone from the pod: give the pod a new sandbox")
        wanted = mac
        if plan.source is None and link.mac != mac:  # equal: tuning has put its own into both link and result
            wanted = mac and mac_rules.of_plain_tap(mac)
        expected: list[tuple[str, object, object]] = [
            ("ifalias", link.alias, alias(call.conf.name, call.container_id, call.ifname)),
            ("kind", link.kind, "macvtap" if plan.device == "macvtap" else "tun"),
            ("MAC", link.mac if wanted else "", wanted),
            ("state", "up" if link.flags & IFF_UP else "down", "up"),
            ("MTU", link.mtu, min(link.mtu, plan.mtu)),  # a later plugin (tuning) may lower it
        ]
        if plan.device == "macvtap" and plan.source and plan.mode:
            expected += [
                ("mode", link.mode, macvtap.MODES[plan.mode]),
                ("lower device", (link.lower, link.lower_nsid), (plan.source.index, pod.nsid(call.host.fd))),
            ]
    if record := call.store.load(call.id):
        expected.append(("ifindex", link.index, record.ifindex))
    for what, found, made in expected:
        if found != made:
            raise CniError(CHECK_FAILED, f"{call.ifname}: {what} is {found!r}, and ADD made it {made!r}")
    return link


def _check_function(call: Call, plan: Plan) -> Plan:
    """The VF as ADD left it; the plan as one of its link."""
    from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

    record = call.store.load(call.id)
    if record is None or record.vf is None:
        raise CniError(CHECK_FAILED, f"{call.ifname}: there is no record of its virtual function")
    found = sriov.differences(call.host, record)
    lower = sriov.lower(call.host, record)
    if found or lower is None:
        what = "; ".join(found) or "its link is gone"
        raise CniError(CHECK_FAILED, f"{call.ifname}: VF {record.vf['number']} of {record.source}: {what}")
    return replace(plan, source=lower, mode="passthru")


def _check_device(call: Call) -> None:
    """The character device, and the node of it that ADD made, if it did."""
    assert call.netns is not None  # noqa: S101 - as in check
    _, major, minor = tapdev.number(call.netns, call.ifname)
    record = call.store.load(call.id)
    if record is None or record.node is None:
        return
    try:
        found = os.lstat(record.node).st_rdev
    except OSError as error:
        raise CniError(CHECK_FAILED, f"the device node {record.node} is gone", str(error)) from error
    if found != os.makedev(major, minor):
        raise CniError(CHECK_FAILED, f"the device node {record.node} is another device than the link's")


def _check_port(plan: Plan, ifindex: int, ifname: str) -> None:
    from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

    assert plan.source is not None  # noqa: S101 - the caller
    name, _ = iproute.veth_names(ifindex)
    if iproute.bridge_port(name) != (plan.source.index, plan.mode == "pepa"):
        raise CniError(
            CHECK_FAILED,
            f"{ifname}: its host end {name} is not a port of {plan.source.name} in mode {plan.mode} any more",
        )
