"""Finds the switch port behind a NIC by LLDP (IEEE 802.1AB): from lldpd, or by listening.

A switch normally sends a frame every 30 s. The frame may contain the state of reflective relay (EVB TLV). Must not
send anything.
"""

from __future__ import annotations

import errno
import json
import select
import shutil
import socket
import struct
import subprocess
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass

from cni.errors import reason
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from typing import Any

_ETH_P_LLDP = 0x88CC
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_MR_MULTICAST = 0
_GROUPS = tuple(bytes.fromhex(f"0180c20000{last}") for last in ("0e", "03", "00"))
"""The nearest bridge, non-TPMR bridge and customer bridge (IEEE 802.1AB, 7.1); EVB is announced to the last."""
_CHASSIS, _PORT, _PORT_DESCRIPTION, _SYSTEM = 1, 2, 4, 5
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


def known() -> dict[str, Neighbour]:
    """The neighbours that lldpd knows, by NIC; {} if it is not installed or not running."""
    program = shutil.which("lldpcli")
    if program is None:
        return {}
    try:
        done = subprocess.run(
            [program, "-f", "json0", "show", "neighbors"], capture_output=True, timeout=5, check=True
        )
        return of_lldpcli(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def of_lldpcli(output: bytes) -> dict[str, Neighbour]:
    """Parse lldpcli's json0 format, in which every element is a list. Raises ValueError if it has another form."""
    try:
        return dict(map(_of_interface, json.loads(output)["lldp"][0].get("interface", ())))
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not lldpcli's json0: {reason(error)}") from None


def _of_interface(interface: Any) -> tuple[str, Neighbour]:
    chassis, port = interface["chassis"][0], interface["port"][0]
    system = (chassis.get("name") or chassis["id"])[0]["value"]
    of_mac = port["id"][0]["type"] == "mac" and "descr" in port
    name = port["descr" if of_mac else "id"][0]["value"]
    return escaped(interface["name"]), Neighbour(escaped(system), escaped(name))


def listen(nics: Iterable[str], seconds: float) -> dict[str, Neighbour]:
    """Listen on these NICs of the calling thread's namespace until each has a neighbour, or the time is over.

    Raises OSError: PermissionError without CAP_NET_RAW.
    """
    heard: dict[str, Neighbour] = {}
    wanted = set(nics)
    with closing(_frames(wanted, seconds)) as frames:
        for nic, frame in frames:
            if found := parse(frame):
                heard[nic] = found
            if heard.keys() == wanted:
                break
    return heard


def listen_for_evb(nics: Iterable[str], seconds: float) -> tuple[dict[str, Neighbour], dict[str, Evb]]:
    """Listen until each NIC has an EVB TLV, which a switch may send in a frame of its own, or the time is over."""
    heard: dict[str, Neighbour] = {}
    evbs: dict[str, Evb] = {}
    wanted = set(nics)
    with closing(_frames(wanted, seconds)) as frames:
        for nic, frame in frames:
            if neighbour := parse(frame):
                heard[nic] = neighbour
                if evb := parse_evb(frame):
                    evbs[nic] = evb
            if evbs.keys() == wanted:
                break
    return heard, evbs


def _frames(nics: Iterable[str], seconds: float) -> Generator[tuple[str, bytes], None, None]:
    """Yield (NIC, LLDP frame) as they arrive, until the time is over. Raises OSError."""
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        poll = select.poll()
        sockets: dict[int, tuple[str, socket.socket]] = {}
        for nic in nics:
            opened = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            opened.bind((nic, _ETH_P_LLDP))
            for group in _GROUPS:
                request = struct.pack(
                    "=iHH8s", socket.if_nametoindex(nic), _PACKET_MR_MULTICAST, len(group), group
                )
                opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
            sockets[opened.fileno()] = nic, opened
            poll.register(opened, select.POLLIN)
        while sockets and (left := until - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                nic, opened = sockets[fd]
                try:
                    frame, address = opened.recvfrom(2048)
                except OSError as error:
                    if error.errno != errno.ENETDOWN:  # reported once; the NIC may come up
                        raise
                    continue
                if address[2] != socket.PACKET_OUTGOING:
                    yield nic, frame


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
