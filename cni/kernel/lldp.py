"""LLDP frames (IEEE 802.1AB), and sockets that hear them. Must not send anything."""

from __future__ import annotations

import socket
import struct

from cni.dataclass import dataclass
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FRAME_BYTES = 2048
_ETH_P_LLDP = 0x88CC
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_MR_MULTICAST = 0
_GROUPS = tuple(bytes.fromhex(f"0180c20000{last}") for last in ("0e", "03", "00"))
"""The nearest bridge, non-TPMR bridge and customer bridge (IEEE 802.1AB, 7.1); EVB is announced to the last."""
_CHASSIS, _PORT, _TIME_TO_LIVE, _PORT_DESCRIPTION, _SYSTEM = 1, 2, 3, 4, 5
_ORGANIZATION = 127
_EVB = bytes.fromhex("0080c20d")
_RRCAP, _RRCTR = 2, 1
_RRREQ = 4
_RRSTAT = {0: False, 1: True}
_MAC_SUBTYPE = {_CHASSIS: 4, _PORT: 3}


@dataclass(frozen=True)
class Neighbour:
    """The switch port at the other end of a cable. port: its name, or its description if its name is only a MAC."""

    system: str
    port: str


@dataclass(frozen=True)
class Evb:
    """What a switch announces about reflective relay at its port: the EVB TLV, IEEE 802.1Q-2014, D.2.12.

    capable (RRCAP): it can; on (RRCTR): it does. The rest is what it last heard from this node's own LLDP agent:
    requested (RRREQ), and status (RRSTAT), whether the node takes it to be on; None if unknown.
    """

    capable: bool
    on: bool
    requested: bool
    status: bool | None


def heard_on(nic: str) -> socket.socket:
    """A packet socket that gets the NIC's LLDP frames, also those that it sends itself. Raises OSError.

    PermissionError without CAP_NET_RAW. The NIC is one of the calling thread's network namespace.
    """
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        index = socket.if_nametoindex(nic)
        opened.bind((nic, _ETH_P_LLDP))
        for group in _GROUPS:
            request = struct.pack("=iHH8s", index, _PACKET_MR_MULTICAST, len(group), group)
            opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
    except BaseException:
        opened.close()
        raise
    return opened


def seconds(frame: bytes) -> int:
    """How long what an LLDP frame states is valid: its time to live (802.1AB, 8.5.4); 0: the sender ends."""
    return next(
        (
            int.from_bytes(value[:2])
            for kind, value in _tlvs(frame)
            if kind == _TIME_TO_LIVE and len(value) >= 2
        ),
        0,
    )


def parse(frame: bytes) -> Neighbour | None:
    """The sender of an LLDP frame; None if the frame is not LLDP."""
    found: dict[int, bytes] = {}
    for kind, value in _tlvs(frame):
        found.setdefault(kind, value)
    if not found.get(_CHASSIS) or not found.get(_PORT):
        return None
    system = _text(found.get(_SYSTEM, b"")) or _identifier(_CHASSIS, found[_CHASSIS])
    port = _identifier(_PORT, found[_PORT])
    if found[_PORT][0] == _MAC_SUBTYPE[_PORT]:
        port = _text(found.get(_PORT_DESCRIPTION, b"")) or port
    return Neighbour(system, port)


def parse_evb(frame: bytes) -> Evb | None:
    """The EVB TLV of an LLDP frame; None if it has none."""
    for kind, value in _tlvs(frame):
        if kind == _ORGANIZATION and value.startswith(_EVB) and len(value) >= len(_EVB) + 2:
            bridge, station = value[len(_EVB) : len(_EVB) + 2]
            return Evb(
                capable=bool(bridge & _RRCAP),
                on=bool(bridge & _RRCTR),
                requested=bool(station & _RRREQ),
                status=_RRSTAT.get(station & 3),
            )
    return None


def _tlvs(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each complete TLV, up to the end of the LLDPDU."""
    at = 14
    while at + 2 <= len(frame):
        (head,) = struct.unpack_from("!H", frame, at)
        kind, length = head >> 9, head & 0x1FF
        if kind == 0 or at + 2 + length > len(frame):
            return
        yield kind, frame[at + 2 : at + 2 + length]
        at += 2 + length


def _identifier(kind: int, value: bytes) -> str:
    return value[1:].hex(":") if value[0] == _MAC_SUBTYPE[kind] else _text(value[1:])


def _text(value: bytes) -> str:
    return escaped(value.decode(errors="replace"))
