"""The VLANs of the ports of bridges with vlan_filtering, and of the bridges themselves. Source: linux/if_bridge.h."""

from __future__ import annotations

import struct

from cni.dataclass import dataclass
from cni.kernel.rtnl import IFLA_EXT_MASK, NLA_TYPE_MASK, RTM_GETLINK, attributes, link_message, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import Rtnl

_AF_BRIDGE = 7
_RTEXT_FILTER_BRVLAN = 2
_IFLA_AF_SPEC = 26
_IFLA_BRIDGE_VLAN_INFO = 2
_PVID, _UNTAGGED = 2, 4  # flags of struct bridge_vlan_info
_IFINFO_BYTES = 16
_AT_IFINDEX = 4


@dataclass(frozen=True)
class Vlans:
    """Of one port."""

    pvid: int | None
    """The VLAN of an untagged frame that comes in by the port; None: it is dropped."""
    untagged: frozenset[int]
    """Those whose frames leave by the port without a tag."""


def read(host: Rtnl) -> dict[int, Vlans]:
    """Interface index → the VLANs of each port and bridge, of all bridges. Raises OSError."""
    _, _, body = link_message(RTM_GETLINK, u32(IFLA_EXT_MASK, _RTEXT_FILTER_BRVLAN), family=_AF_BRIDGE)
    return dict(_parse(each) for each in host.dump(RTM_GETLINK, body))


def _parse(body: bytes) -> tuple[int, Vlans]:
    spec = attributes(body[_IFINFO_BYTES:]).get(_IFLA_AF_SPEC, b"")
    pvid, untagged, at = None, set(), 0
    while at + 8 <= len(spec):  # each VLAN is an attribute of one and the same type
        length, kind, flags, vid = struct.unpack_from("=HHHH", spec, at)
        if kind & NLA_TYPE_MASK == _IFLA_BRIDGE_VLAN_INFO:
            pvid = vid if flags & _PVID else pvid
            if flags & _UNTAGGED:
                untagged.add(vid)
        at += (length + 3) & ~3 or 4
    return struct.unpack_from("=i", body, _AT_IFINDEX)[0], Vlans(pvid, frozenset(untagged))
