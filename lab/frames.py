"""Frames without a guest: built, written to tap fds or packet sockets, and collected with a deadline.

A frame carries a token that a test chose, which tells it from other traffic. A marker that is sent after a frame shows
that the frame did *not* arrive: collect() returns the frames that arrived before the marker.
"""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.process import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab.wire import Netns

ETHERTYPE = 0x88B5
"""IEEE 802's local experimental ethertype: no stack answers it and no firewall inspects it."""
BROADCAST = "ff:ff:ff:ff:ff:ff"
VNET_HEADER = 10
"""struct virtio_net_hdr, before each frame on a macvtap's or tap's fd (TUNSETVNETHDRSZ changes it)."""
_ETHERNET_HEADER = 14
_SHORTEST = 60
_LONGEST = 65536 + 128
_SETTLE = 0.02
"""Seconds without a frame after the marker: another CPU may deliver a frame a moment late."""


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
    """Sends a frame as the guest behind the tap fd does. header: the size of the vnet header, in bytes."""
    os.write(fd, bytes(header) + frame.pack())


def packet_socket(netns: Netns, link: str, ethertype: int = ETHERTYPE) -> socket.socket:
    """A socket that sends and captures whole frames on a link of netns; the caller closes it.

    Ethertype 0x0003 (ETH_P_ALL) captures everything, including what other sockets in netns send on the link.
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
    timeout: float = PATIENCE,
    header: int = VNET_HEADER,
) -> dict[str, list[Frame]]:
    """The frames that arrive on each port: a tap fd (int, with a vnet header) or a packet socket (without one).

    until: the marker's token, which must arrive on each port and is left out of the result; TimeoutError names the
    ports where it has not arrived within the timeout. Without it, collects for the whole timeout.
    enough: returns whether the frames so far are all that must arrive. On a busy machine the marker can overtake an
    earlier frame, if the sender moves to another CPU in between. While it returns False, collects until the timeout.
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
