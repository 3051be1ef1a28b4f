"""Which port of which switch a NIC is plugged into, by LLDP (IEEE 802.1AB).

lldpd knows, where it runs; else the next announcement can be waited for, which a switch sends every 30 s as a
rule. Must not send anything.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import struct
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

_ETH_P_LLDP = 0x88CC
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_MR_MULTICAST = 0
_NEAREST_BRIDGE = bytes.fromhex("0180c200000e")
_CHASSIS, _PORT, _PORT_DESCRIPTION, _SYSTEM = 1, 2, 4, 5
_MAC_SUBTYPE = {_CHASSIS: 4, _PORT: 3}


@dataclass(frozen=True)
class Neighbour:
    """The other end of a cable. port: what the switch calls it; its description where it is called by a MAC only."""

    system: str
    port: str


def known() -> dict[str, Neighbour]:
    """What lldpd knows, by NIC; nothing where it is not installed or does not run."""
    program = shutil.which("lldpcli")
    if program is None:
        return {}
    try:
        done = subprocess.run(
            [program, "-f", "json0", "show", "neighbors"], capture_output=True, timeout=5, check=True
        )
        return dict(of_lldpcli(json.loads(done.stdout)))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        return {}


def of_lldpcli(document: Any) -> Iterator[tuple[str, Neighbour]]:
    """Its json0: every element is a list, whether or not there can be several."""
    for interface in document["lldp"][0].get("interface", ()):
        chassis, port = interface["chassis"][0], interface["port"][0]
        system = (chassis.get("name") or chassis["id"])[0]["value"]
        of_mac = port["id"][0]["type"] == "mac" and "descr" in port
        yield interface["name"], Neighbour(system, port["descr" if of_mac else "id"][0]["value"])


def listen(nics: Iterable[str], seconds: float) -> dict[str, Neighbour]:
    """What is announced to these NICs of the calling thread's namespace, until each has heard or the time is over.

    Raises OSError: PermissionError without CAP_NET_RAW.
    """
    heard: dict[str, Neighbour] = {}
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        poll = select.poll()
        sockets: dict[int, tuple[str, socket.socket]] = {}
        for nic in nics:
            opened = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            opened.bind((nic, _ETH_P_LLDP))
            request = struct.pack(
                "=iHH8s",
                socket.if_nametoindex(nic),
                _PACKET_MR_MULTICAST,
                len(_NEAREST_BRIDGE),
                _NEAREST_BRIDGE,
            )
            opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
            sockets[opened.fileno()] = nic, opened
            poll.register(opened, select.POLLIN)
        while sockets and (left := until - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                nic, opened = sockets[fd]
                frame, address = opened.recvfrom(2048)
                if address[2] != socket.PACKET_OUTGOING and (found := parse(frame)):
                    heard[nic] = found
                    poll.unregister(fd)
                    del sockets[fd]
    return heard


def parse(frame: bytes) -> Neighbour | None:
    """Who sent an LLDP frame; None if it is none."""
    found: dict[int, bytes] = {}
    at = 14
    while at + 2 <= len(frame):
        (head,) = struct.unpack_from("!H", frame, at)
        kind, length = head >> 9, head & 0x1FF
        if kind == 0 or at + 2 + length > len(frame):
            break
        found.setdefault(kind, frame[at + 2 : at + 2 + length])
        at += 2 + length
    if not found.get(_CHASSIS) or not found.get(_PORT):
        return None
    system = _text(found.get(_SYSTEM, b"")) or _identifier(_CHASSIS, found[_CHASSIS])
    port = _identifier(_PORT, found[_PORT])
    if found[_PORT][0] == _MAC_SUBTYPE[_PORT]:
        port = _text(found.get(_PORT_DESCRIPTION, b"")) or port
    return Neighbour(system, port)


def _identifier(kind: int, value: bytes) -> str:
    return value[1:].hex(":") if value[0] == _MAC_SUBTYPE[kind] else _text(value[1:])


def _text(value: bytes) -> str:
    """What a stranger sent: without anything that a terminal could obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in value.decode(errors="replace"))
