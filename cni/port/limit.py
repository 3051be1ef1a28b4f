"""How much a link sends: a token bucket (tc-tbf(8), net/sched/sch_tbf.c) as its only queueing discipline.

It shapes what leaves the link by its hook egress: what the guest of a macvtap sends, and what a tap's guest receives
from the bridge's port. The other direction is policed by filter.py, which drops what exceeds the rate.
"""

from __future__ import annotations

import errno
import struct
import sys

from cni.kernel.rtnl import NLM_F_ACK, NLM_F_CREATE, attr, attributes, nest, text
from cni.state.port_profile import burst_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import Rtnl

_RTM_NEWQDISC, _RTM_GETQDISC = 36, 38
_NLM_F_REPLACE = 0x100
_TC_H_ROOT = 0xFFFFFFFF
_TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 1, 2, 7
_TCA_STATS_QUEUE = 3  # linux/gen_stats.h
_DROPS = slice(8, 12)  # in struct gnet_stats_queue
_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6  # linux/pkt_sched.h
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET: the kernel needs no rate table
_TCMSG = struct.Struct("=BxxxiIII")
_RATESPEC = struct.Struct("=BBHhHI")
_RATE, _LIMIT = slice(8, 12), slice(24, 28)
"""In struct tc_tbf_qopt: the rate of its first struct tc_ratespec, and limit."""
_MOST = (1 << 32) - 1
_QUEUE_SECONDS = 0.05


def shape(rtnl: Rtnl, ifindex: int, rate: int, burst: int | None) -> None:
    """Limit what the link sends to rate bit/s, after a burst in bytes. rtnl is of its namespace. Raises OSError."""
    bytes_ = rate // 8
    options = nest(
        _TCA_OPTIONS,
        attr(_TCA_TBF_PARMS, _parameters(rate, burst)),
        attr(_TCA_TBF_BURST, struct.pack("=I", burst or burst_of(rate))),
        attr(_TCA_TBF_RATE64, struct.pack("=Q", bytes_)) if bytes_ > _MOST else b"",
    )
    head = _TCMSG.pack(0, ifindex, 0x10000, _TC_H_ROOT, 0)
    rtnl.do(
        (_RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | _NLM_F_REPLACE, head + text(_TCA_KIND, "tbf") + options)
    )


def is_shaped(rtnl: Rtnl, ifindex: int, rate: int, burst: int | None) -> bool:
    """Whether the link has the bucket of shape(). Raises OSError."""
    found = _root(rtnl, ifindex)
    options = attributes(found.get(_TCA_OPTIONS, b""))
    parameters = options.get(_TCA_TBF_PARMS, b"")
    most = _parameters(rate, burst)
    rate64 = int.from_bytes(options.get(_TCA_TBF_RATE64, b""), sys.byteorder)
    return (
        found.get(_TCA_KIND) == b"tbf\0"
        and parameters[_RATE] == most[_RATE]
        and parameters[_LIMIT] == most[_LIMIT]
        and rate64 == (rate // 8 if rate // 8 > _MOST else 0)
    )


def dropped(rtnl: Rtnl, ifindex: int) -> int:
    """How many frames the link's bucket has dropped; 0 if it has none. Raises OSError."""
    found = _root(rtnl, ifindex)
    queue = attributes(found.get(_TCA_STATS2, b"")).get(_TCA_STATS_QUEUE, b"")
    return int.from_bytes(queue[_DROPS], sys.byteorder) if found.get(_TCA_KIND) == b"tbf\0" else 0


def _root(rtnl: Rtnl, ifindex: int) -> dict[int, bytes]:
    """The attributes of the link's root queueing discipline; {} if it is one of the kernel's own, or there is none."""
    try:
        answer = rtnl.ask(_RTM_GETQDISC, _TCMSG.pack(0, ifindex, 0, _TC_H_ROOT, 0), surely=False)
    except OSError as error:
        if error.errno in (errno.EPROTO, errno.EINVAL, errno.ENOENT):
            return {}
        raise
    return attributes(answer[_TCMSG.size :])


def _parameters(rate: int, burst: int | None) -> bytes:
    """struct tc_tbf_qopt (linux/pkt_sched.h); the bytes that may wait for the burst and for 50 ms."""
    bytes_ = rate // 8
    spec = _RATESPEC.pack(0, _ETHERNET, 0, 0, 0, min(_MOST, bytes_))
    waiting = min(_MOST, (burst or burst_of(rate)) + int(bytes_ * _QUEUE_SECONDS))
    return spec + bytes(_RATESPEC.size) + struct.pack("=III", waiting, 0, 0)
