"""Puts an attachment's profile in force at its link, compares, and takes it away: filter.py and limit.py carry it out.

The link is a macvtap in the pod's network namespace, or the bridge's port of a tap in the host's, where what leaves the
link is what the guest receives. At ADD it is down until the profile is in force: no frame passes before that. The
calling thread must be in the link's network namespace.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager

from cni.errors import CniError
from cni.kernel import netns, nft
from cni.kernel.bridge_port import veth_names
from cni.kernel.rtnl import Rtnl
from cni.port import filter as filters
from cni.port import limit
from cni.spec import KERNEL_REFUSED
from cni.state.lookup import opened_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.state.record import Record

_MISSING = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT)


@contextmanager
def reached(record: Record) -> Iterator[Rtnl | None]:
    """Run the block in the network namespace that has the record's filters; None if no path leads to it any more.

    Yields a socket of that namespace. The calling thread must be in the host's. Raises OSError, CniError.
    """
    if record.device == "tap":
        with Rtnl() as own:
            yield own
        return
    with opened_netns(record) as pod:
        if pod is None:
            yield None
        else:
            with netns.entered(pod), Rtnl() as own:
                yield own


def put(record: Record, rtnl: Rtnl) -> None:
    """Put the record's profile in force, in place of an earlier one. rtnl: of the link's network namespace.

    Raises CniError 100 if the kernel cannot.
    """
    port = record.port
    if port is None:
        return
    try:
        if _is_filtered(record):
            with nft.opened() as netlink:
                filters.install(
                    netlink, _link(record), port, record.mac, _addresses(record), reverse=_is_reverse(record)
                )
        rate, burst = _shaped(record)
        if rate:
            limit.shape(rtnl, _index(record, rtnl), rate, burst)
    except OSError as error:
        raise _refusal(error) from error


def is_intact(record: Record, rtnl: Rtnl) -> bool:
    """Whether the filters and limits are as put() made them. rtnl: of the link's namespace. Raises OSError."""
    port = record.port
    if port is None:
        return True
    rate, burst = _shaped(record)
    if rate and not limit.is_shaped(rtnl, _index(record, rtnl), rate, burst):
        return False
    if not _is_filtered(record):
        return True
    with nft.opened() as netlink:
        return filters.is_intact(
            netlink, _link(record), port, record.mac, _addresses(record), reverse=_is_reverse(record)
        )


def is_there(record: Record) -> bool:
    """Whether the link has filters of vmtap's, whatever the record has. Raises OSError."""
    with nft.opened() as netlink:
        return bool(nft.rules(netlink, filters.table(_link(record))))


def refused(record: Record) -> dict[str, int]:
    """Reason → how many of the guest's frames were refused. {} without filters and limits. Raises OSError.

    A reason is a chain's name (filter.py). "rate" has what exceeds the rate, of both directions.
    """
    found: dict[str, int] = {}
    if _is_filtered(record):
        with nft.opened() as netlink:
            found = filters.refused(netlink, _link(record))
    if _shaped(record)[0]:
        with Rtnl() as own:
            found["rate"] = found.get("rate", 0) + limit.dropped(own, _index(record, own))
    return found


def remove(record: Record) -> None:
    """Remove the filters of the record's link, if there are any. What limits it ends with it. Raises OSError."""
    remove_of(_link(record))


def remove_of(link: str) -> None:
    """Remove the filters of the link of that name, or of an earlier one. Raises OSError."""
    try:
        with nft.opened() as netlink:
            filters.remove(netlink, link)
    except OSError as error:
        if error.errno not in _MISSING:  # without nf_tables, there is no table
            raise


def _is_reverse(record: Record) -> bool:
    """Whether what leaves the link is what the guest receives."""
    return record.device == "tap"


def _shaped(record: Record) -> tuple[int | None, int | None]:
    """The rate and the burst of what leaves the link."""
    port = record.port
    if port is None:
        return None, None
    return (port.in_rate, port.in_burst) if _is_reverse(record) else (port.out_rate, port.out_burst)


def _index(record: Record, rtnl: Rtnl) -> int:
    if record.device != "tap":
        return record.ifindex
    found = rtnl.link(name=_link(record))
    return found.index if found else 0


def _is_filtered(record: Record) -> bool:
    port = record.port
    policed = port and (port.out_rate if record.device == "tap" else port.in_rate)
    return bool(port and (port.filters or policed))


def _link(record: Record) -> str:
    return veth_names(record.ifindex)[0] if record.device == "tap" else record.ifname


def _addresses(record: Record) -> list[str]:
    return [each["address"] for each in record.ips]


def _refusal(error: OSError) -> CniError:
    why = "the kernel refused it"
    if error.errno in _MISSING:
        why = "the kernel has no nf_tables, no egress hook (Linux 5.16) or no tbf; load them, or leave the profile out"
    elif error.errno == errno.EPERM:
        why = "the plugin lacks CAP_NET_ADMIN in the link's network namespace"
    return CniError(KERNEL_REFUSED, f"port: the profile cannot be put in force: {why}", error.strerror or "")
