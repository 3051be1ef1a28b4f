"""The kernel's refusals of an ADD: an error for each cause, which names the link or attachment in the way.

Only here, where no fast answer is needed, an ADD may list links.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from cni.errors import SHORTAGE, CniError
from cni.kernel import bridge_port, macvtap
from cni.kernel.rtnl import Rtnl
from cni.spec import KERNEL_REFUSED, MAC_IN_USE, NAME_IN_USE, SOURCE_BUSY, SOURCE_MISSING, TRY_AGAIN_LATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.attach.plan import Plan
    from cni.kernel.rtnl import Link
    from cni.state.record import Record
    from cni.state.store import Store


def explain(error: OSError, plan: Plan, record: Record, store: Store) -> CniError:
    """The CniError for a refusal of the kernel's while the record's link was made."""
    said = os.strerror(error.errno or 0)
    details = said if str(error.strerror) == said else f"{said}: {error.strerror}"
    code, msg = _cause(error.errno, plan, record, store)
    return CniError(code, msg, details)


def name_in_use(ifname: str) -> str:
    """The message for a link that had the name before."""
    return f"CNI_IFNAME {ifname!r}: the pod already has a link of this name; it was left alone"


def _cause(number: int | None, plan: Plan, record: Record, store: Store) -> tuple[int, str]:
    source = plan.source.name if plan.source else ""
    causes = {
        errno.ENODEV: (SOURCE_MISSING, f"source device {source!r} went away"),
        errno.EPERM: (KERNEL_REFUSED, "the plugin lacks CAP_NET_ADMIN, in the host's or the pod's namespace"),
        **dict.fromkeys(
            SHORTAGE,
            (TRY_AGAIN_LATER, "the kernel has no room for the request now: try again"),
        ),
    }
    if number == errno.EEXIST:
        if _is_name_taken(record):
            return NAME_IN_USE, name_in_use(record.ifname)
        if plan.device == "tap":
            ends = " or ".join(bridge_port.veth_names(record.ifindex))
            return KERNEL_REFUSED, f"a link that it needs exists: {ends}; delete or rename it"
    if number == errno.EADDRINUSE:
        holder = _holder(plan, record, store)
        return MAC_IN_USE, f"MAC {record.mac} is in use on {source!r} by {holder}: give this VM another"
    if plan.source and (why := _busy(number, plan.source)):
        return SOURCE_BUSY, f"source device {source!r} {why}"
    if driver := _missing_driver(number, plan):
        return (
            KERNEL_REFUSED,
            f"this kernel has no driver {driver}: load it (modprobe {driver}), or boot a kernel that has it",
        )
    if number == errno.EINVAL and _is_gone(plan.source):  # EINVAL: the bridge of a port is gone
        number = errno.ENODEV
    where = f"on {source!r}" if source else "in the pod"
    return causes.get(number or 0, (KERNEL_REFUSED, f"the kernel refused the {plan.device} {where}"))


def _holder(plan: Plan, record: Record, store: Store) -> str:
    """Who has the MAC on the lower device, which plan.source is here. The kernel compares within it (macvlan.c)."""
    assert plan.source is not None  # noqa: S101 - only a macvtap is refused for its MAC
    if plan.source.mac == record.mac:
        return f"{plan.source.name} itself"
    with Rtnl() as host:
        for other in store.records():
            if other.id == record.id:
                continue
            with suppress(OSError):  # the other's namespace has ended
                link = host.link(index=other.ifindex, nsid=other.nsid)
                if link and (link.mac, link.lower) == (record.mac, plan.source.index):
                    return f"{other.ifname} of {other.owner} in network {other.network!r}"
    return "another macvlan or macvtap, not of this plugin"


def _is_name_taken(record: Record) -> bool:
    """Whether another link than the record's has the record's name in the pod."""
    with Rtnl() as host, suppress(OSError):
        link = host.link(name=record.ifname, nsid=record.nsid)
        return link is not None and link.index != record.ifindex
    return False


def _busy(number: int | None, source: Link) -> str:
    """Why another has the source; "" if the error is another. The kernel has one receive handler for each device."""
    if number not in (errno.EINVAL, errno.EBUSY):
        return ""
    with Rtnl() as host:
        if number == errno.EBUSY and source.master:
            master = host.link(index=source.master)
            name = master.name if master else f"ifindex {source.master}"
            return f"is a port of {name!r}: name {name!r} as the source instead"
        above: list[Link] = []
        with suppress(OSError):
            above = [each for each in host.links() if (each.lower, each.lower_nsid) == (source.index, None)]
    if any(each.mode == macvtap.MODES["passthru"] for each in above):
        return "has a passthru macvlan or macvtap, which allows no other"
    if number == errno.EINVAL:
        return ""
    # macvlan_port_create: netdev_is_rx_handler_busy()
    names = [f"{each.name!r} ({each.kind})" for each in above if each.kind in ("ipvlan", "ipvtap", "macsec")]
    by = ", ".join(names) or "ipvlan, MACsec or another driver, whose link may be in a pod"
    return (
        f"is in use by {by}: the kernel allows that or macvtaps, not both; remove it, or name another device"
    )


def _missing_driver(number: int | None, plan: Plan) -> str:
    """The module that the kernel lacks; "" if the error is another."""
    if plan.device == "macvtap":
        return "macvtap" if number == errno.EOPNOTSUPP else ""  # no such kind of link
    return "tun" if number in (errno.ENODEV, errno.ENXIO) and not _is_gone(plan.source) else ""


def _is_gone(source: Link | None) -> bool:
    if source is None:
        return False
    with Rtnl() as host:
        return host.link(index=source.index) is None
