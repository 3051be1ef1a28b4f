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
import subprocess
import time
from contextlib import ExitStack, closing

from cni.errors import reason
from cni.kernel.lldp import FRAME_BYTES, Evb, Neighbour, heard_on, parse, parse_evb
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from typing import Any


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
            opened = stack.enter_context(heard_on(nic))
            sockets[opened.fileno()] = nic, opened
            poll.register(opened, select.POLLIN)
        while sockets and (left := until - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                nic, opened = sockets[fd]
                try:
                    frame, address = opened.recvfrom(FRAME_BYTES)
                except OSError as error:
                    if error.errno != errno.ENETDOWN:  # reported once; the NIC may come up
                        raise
                    continue
                if address[2] != socket.PACKET_OUTGOING:
                    yield nic, frame
