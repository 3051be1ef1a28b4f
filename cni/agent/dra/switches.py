"""The switch ports at the other end of the sources' cables, as LLDP frames from the wire state them.

A switch sends a frame every 30 s as a rule. What it states is only shown, as attributes of the slices.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress

from cni.kernel import lldp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.kernel.lldp import Neighbour

_FRAMES = 16
"""Frames that are read from one NIC at a time: whoever sends more of them waits."""


class Switches:
    """The neighbours that were heard. Readable (fileno) when frames have arrived. For use by one thread."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._sockets: dict[tuple[str, int], socket.socket] = {}
        self._heard: dict[str, tuple[Neighbour, float]] = {}
        """By NIC, with the end of its validity by time.monotonic()."""

    def fileno(self) -> int:
        """For poll()."""
        return self._poll.fileno()

    def close(self) -> None:
        """Close the sockets."""
        self.listen({})
        self._poll.close()

    def listen(self, nics: Mapping[str, int]) -> None:
        """Listen on exactly these NICs, name → interface index; on one that cannot be listened on, at the next call."""
        for key in self._sockets.keys() - nics.items():
            self._heard.pop(key[0], None)
            with self._sockets.pop(key) as ended:
                self._poll.unregister(ended)
        for key in nics.items() - self._sockets.keys():
            with suppress(OSError):
                opened = lldp.heard_on(key[0])
                opened.setblocking(False)
                self._sockets[key] = opened
                self._poll.register(opened, select.EPOLLIN)

    def take(self) -> bool:
        """Read frames that have arrived; whether a neighbour is another one than before."""
        before = self.neighbours()
        for (nic, _), opened in self._sockets.items():
            for _ in range(_FRAMES):
                try:
                    frame, address = opened.recvfrom(lldp.FRAME_BYTES)
                except OSError:  # no further one; or the NIC is down, and this reported once
                    break
                if address[2] == socket.PACKET_OUTGOING:
                    continue
                if found := lldp.parse(frame):
                    self._heard[nic] = found, time.monotonic() + lldp.seconds(frame)
        return self.neighbours() != before

    def neighbours(self) -> dict[str, Neighbour]:
        """The neighbours whose time has not passed, by NIC."""
        now = time.monotonic()
        return {nic: found for nic, (found, until) in self._heard.items() if until > now}
