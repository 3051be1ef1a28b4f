"""Frames without a guest: built, written to tap fds or packet sockets, and collected with a deadline.

A frame carries a token that a test chose, so that what arrives can be told from anything else. That a frame
did *not* arrive is shown by a marker sent after it: collect() returns what came with the marker.
"""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab.wire import Netns

ETHERTYPE = 0x88B5
"""IEEE 802's local experimental ethertype: no stack answers it and no firewall looks into it."""
BROADCAST = "ff:ff:ff:ff:ff:ff"
VNET_HEADER = 10
"""struct virtio_net_hdr, before each frame on a macvtap's or tap's fd (TUNSETVNETHDRSZ changes it)."""
_ETHERNET_HEADER = 14
_SHORTEST = 60
_LONGEST = 65536 + 128
_SETTLE = 0.02
"""How long all must be quiet after the marker: another CPU may deliver a frame a moment late."""


@dataclass(frozen=True)
class Frame:
    """An Ethernet frame; the token is its payload without the padding."""

    dst: str
    src: str
    token: str
    ethertype: int = ETHERTYPE

    def pack(self) -> bytes:
        head = mac_bytes(self.dst) + mac_bytes(self.src) + self.ethertype.to_bytes(2, "big")
        return (head + self.token.encode()).ljust(_SHORTEST, b"\0")


def unpack(raw: bytes) -> Frame:
    """The frame in raw bytes; the token of a foreign ethertype is its payload in hex."""
    ethertype = int.from_bytes(raw[12:14], "big")
    payload = raw[_ETHERNET_HEADER:]
    token = payload.rstrip(b"\0").decode() if ethertype == ETHERTYPE else payload.hex()
    return Frame(raw[:6].hex(":"), raw[6:12].hex(":"), token, ethertype)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def write_tap(fd: int, frame: Frame, *, header: int = VNET_HEADER) -> None:
    """Sends as the guest behind fd would."""
    os.write(fd, bytes(header) + frame.pack())


def packet_socket(netns: Netns, link: str, ethertype: int = ETHERTYPE) -> socket.socket:
    """A socket that sends and captures whole frames on a link of netns; the caller closes it.

    Ethertype 0x0003 (ETH_P_ALL) captures everything, also what others in netns send on the link.
    """

    def open_there() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        raw.bind((link, ethertype))
        return raw

    return netns.call(open_there)


def collect(
    ports: Mapping[str, int | socket.socket],
    *,
    until: str | None = None,
    enough: Callable[[dict[str, list[Frame]]], bool] = lambda _: True,
    timeout: float = 30,
    header: int = VNET_HEADER,
) -> dict[str, list[Frame]]:
    """What arrives on each port: tap fds (int, with a vnet header) and packet sockets (without one).

    until: a token that must arrive on each port, and is left out of the answer; TimeoutError names the ports
    that have not seen it when the time is up. Without it, collects for the whole timeout.
    enough: says of what has come if all that must is among it: on a busy machine the marker can overtake what was sent
    before it, when the sender was moved to another CPU in between. Where it never says so, the time is used up.
    """
    got: dict[str, list[Frame]] = {name: [] for name in ports}
    missing = set(ports) if until is not None else set()
    poll = select.poll()
    names: dict[int, str] = {}
    for name, port in ports.items():
        fd = port if isinstance(port, int) else port.fileno()
        names[fd] = name
        poll.register(fd, select.POLLIN)

    deadline = time.monotonic() + timeout
    while True:
        wait = deadline - time.monotonic()
        if until is not None and not missing and enough(got):
            wait = min(wait, _SETTLE)
        ready = poll.poll(max(wait, 0) * 1000)
        if not ready:
            break
        for fd, _ in ready:
            port = ports[names[fd]]
            skip = header if isinstance(port, int) else 0
            frame = unpack(os.read(fd, _LONGEST)[skip:])
            if until is not None and frame.token == until:
                missing.discard(names[fd])
            else:
                got[names[fd]].append(frame)
    if missing:
        raise TimeoutError(
            f"{until!r} did not arrive at {', '.join(sorted(missing))} in {timeout} s; got {got}"
        )
    return got
