"""Make the link of a record: macvtap or tap, its lower device, its device node; put addresses on it.

A failure leaves what was made so far: add.py undoes it, by the record.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from cni import lower
from cni.attach import kernel_errors, minor
from cni.config import mac as mac_rules
from cni.dataclass import replace
from cni.errors import CniError
from cni.kernel import ipv6, macvtap, netns, tap, tapdev
from cni.kernel.rtnl import IFLA_ADDRESS, IFLA_MTU, RTM_SETLINK, Rtnl, attr, link_message, mac_bytes, u32
from cni.spec import INVALID_NETWORK_CONFIG
from cni.state import cdi
from cni.state.record import HANDOVER_GROUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.attach.call import Call
    from cni.attach.plan import Plan
    from cni.state.record import Record

_KUBEVIRT_UID = 107
"""User and group qemu of KubeVirt's launcher image."""
_IPV6_MTU = 1280
"""The least for IPv6 (IPV6_MIN_MTU)."""


def make(call: Call, plan: Plan, record: Record) -> None:
    """Make it and set it up. Raises CniError that explains the kernel's refusal (kernel_errors.py)."""
    assert call.netns is not None  # noqa: S101 - plugin.py opens it for every command but DEL
    conf, store = call.conf, call.node.store
    # The other end of a plain tap is the pod's kernel.
    speaks = conf.addressing == "link" or plan.source is None
    device = None
    try:
        if found := lower.ready(call.host, store, record, allmulti=conf.allmulti):
            plan = replace(plan, source=found.link, mode=found.mode or plan.mode)
        if plan.device == "macvtap":
            assert plan.source is not None and plan.mode is not None  # noqa: S101 - plan.decide
            create = partial(
                macvtap.create,
                call.host,
                netns=call.netns,
                lower=plan.source,
                ifname=record.ifname,
                ifindex=record.ifindex,
                mode="vepa" if record.handover else plan.mode,
                mac=record.mac,
                mtu=record.mtu,
                bcqueuelen=conf.bcqueuelen,
                promisc=conf.promisc,
                allmulti=conf.allmulti,
                group=HANDOVER_GROUP if record.handover else 0,
            )
            device = minor.make(call, record, create)
        else:
            tap.create(
                call.netns,
                ifname=record.ifname,
                ifindex=record.ifindex,
                queues=record.queues,
                owner=conf.owner,
                group=conf.group,
            )
        with ExitStack() as stack:
            with netns.entered(call.netns, call.host.fd):
                ipv6.keep_out(record.ifname, speaks=speaks)
                pod = stack.enter_context(Rtnl())
                if plan.device == "macvtap":
                    _guard(record, pod)
            if plan.device == "tap":
                _connect(pod, call, plan, record)
            macvtap.bring_up(
                pod, record.ifindex, record.alias, promisc=conf.promisc, allmulti=conf.allmulti, speaks=speaks
            )
        if record.node and device:
            _make_node(call, record, record.node, device)
    except OSError as error:
        raise kernel_errors.explain(error, plan, record, store) from error


def put_addresses(call: Call, plan: Plan, record: Record) -> None:
    """Put the record's addresses and routes on the link. Raises CniError as make()."""
    assert call.netns is not None  # noqa: S101 - as in make
    call.yield_turn()  # the import takes long, the first time
    from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

    gateways = {6 if ":" in ip["gateway"] else 4: ip["gateway"] for ip in record.ips if ip.get("gateway")}
    addresses = [ip["address"] for ip in record.ips]
    try:
        if record.port and record.port.ip_spoof_check:
            _guard_again(call, record)
        _allow_ipv6(call, record)
        iproute.put_addresses(call.netns, record.ifindex, addresses, list(record.routes), gateways)
    except OSError as error:
        raise kernel_errors.explain(error, plan, record, call.node.store) from error


def _guard(record: Record, rtnl: Rtnl) -> None:
    """Put the record's profile in force, if it has one. rtnl: of the link's namespace. Raises CniError 100."""
    if record.port:
        from cni.port import guard  # noqa: PLC0415 - few attachments have any

        guard.put(record, rtnl)


def _guard_again(call: Call, record: Record) -> None:
    """Put the record's profile in force again: it has addresses now. Raises CniError 100, OSError."""
    assert call.netns is not None  # noqa: S101 - as in make
    if record.device == "tap":
        _guard(record, call.host)
        return
    with netns.entered(call.netns, call.host.fd), Rtnl() as pod:
        _guard(record, pod)


def _connect(pod: Rtnl, call: Call, plan: Plan, record: Record) -> None:
    """Give a tap its address and MTU, and make it a port of its bridge."""
    assert call.netns is not None  # noqa: S101 - as in make
    # On a bridge the tap may have the guest's own address: the redirect takes each frame before the pod's stack does.
    address = record.mac if plan.source else mac_rules.of_plain_tap(record.mac)
    pod.do(
        link_message(
            RTM_SETLINK,
            attr(IFLA_ADDRESS, mac_bytes(address)),
            u32(IFLA_MTU, record.mtu),
            index=record.ifindex,
        )
    )
    if plan.source:
        call.yield_turn()  # the import takes long, the first time
        from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

        iproute.join_bridge(
            call.netns,
            tap=record.ifindex,
            mtu=record.mtu,
            bridge=plan.source.index,
            isolated=plan.mode == "pepa",
            alias=record.alias,
            sums=not (record.port and record.port.protocols),  # a sum may be anywhere in a frame
            before_up=lambda: _guard(record, call.host),
        )


def _make_node(call: Call, record: Record, path: str, device: tuple[int, int]) -> None:
    """Make the node of the device (major, minor) at path, and its CDI spec where the record has one."""
    # The kubelet's devices are for KubeVirt's QEMU, unless the config names another owner.
    default = _KUBEVIRT_UID if record.device_id else 0
    owner = default if call.conf.owner is None else call.conf.owner
    group = default if call.conf.group is None else call.conf.group
    tapdev.make_node(path, device, owner, group)
    if record.cdi:
        cdi.write(record, device, owner, group)


def _allow_ipv6(call: Call, record: Record) -> None:
    """Switch IPv6 on, on the link that is to have an IPv6 address: a runtime may have switched it off in the pod.

    Raises CniError 7 if the MTU is too small for IPv6.
    """
    assert call.netns is not None  # noqa: S101 - as in make
    address = next((ip["address"] for ip in record.ips if ":" in ip["address"]), None)
    if address is None:
        return
    if record.mtu < _IPV6_MTU:
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"mtu: {record.mtu} is less than {_IPV6_MTU}, which address {address} needs on the link; raise it",
        )
    with netns.entered(call.netns, call.host.fd):
        ipv6.let_in(record.ifname)
