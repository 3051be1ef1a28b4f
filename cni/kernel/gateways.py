"""The MACs of a device's default gateways, by the node's routes and neighbour table. Two look-ups each, and no dump."""

from __future__ import annotations

import struct
import sys
from _socket import AF_INET, AF_INET6, inet_pton
from contextlib import suppress

from cni.kernel.rtnl import attr, attributes, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import Rtnl

# linux/rtnetlink.h, linux/neighbour.h
_RTM_GETROUTE, _RTM_GETNEIGH = 26, 30
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 4, 5, 18
_NDA_DST, _NDA_LLADDR = 1, 2
_RTMSG = struct.Struct("=8BI")
_NDMSG = struct.Struct("=BxxxiHBB")

_ANYWHERE = {AF_INET: inet_pton(AF_INET, "192.0.2.1"), AF_INET6: inet_pton(AF_INET6, "2001:db8::1")}
"""Addresses for documentation (RFC 5737, RFC 3849), to which only a default route leads."""


def macs(host: Rtnl, index: int) -> frozenset[str]:
    """The MACs of the gateways of the device of that index, of IPv4 and IPv6, as far as they are known."""
    found = set()
    for family, anywhere in _ANYWHERE.items():
        with suppress(OSError):  # no such route, or no such neighbour
            bits = len(anywhere) * 8
            route = _RTMSG.pack(family, bits, 0, 0, 0, 0, 0, 0, 0) + attr(_RTA_DST, anywhere)
            answer = attributes(host.ask(_RTM_GETROUTE, route + u32(_RTA_OIF, index))[_RTMSG.size :])
            # An IPv4 route by an IPv6 gateway has a struct rtvia: the family, and the address.
            via = answer.get(_RTA_VIA) or family.to_bytes(2, sys.byteorder) + answer.get(_RTA_GATEWAY, b"")
            hop = int.from_bytes(via[:2], sys.byteorder)
            if hop not in _ANYWHERE:
                continue
            neighbour = _NDMSG.pack(hop, index, 0, 0, 0)
            neighbour += attr(_NDA_DST, via[2:])
            known = attributes(host.ask(_RTM_GETNEIGH, neighbour)[_NDMSG.size :])
            found.add(known.get(_NDA_LLADDR, b"").hex(":"))
    return frozenset(found)
