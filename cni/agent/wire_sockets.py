"""The packet sockets on lower devices, by which the agent hears MACs from the wire.

The filter of one socket has room for packet.MOST MACs, so a lower device has as many sockets as its MACs need, for each
protocol. Must not decide what a frame means: handover.py does.
"""

from __future__ import annotations

import errno
import select

from cni.kernel import packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

_FRAMES = 64
"""Frames that are read from one socket before the others have their turn."""


class WireSockets:
    """The open sockets, each registered with the caller's epoll object. For use by one thread."""

    def __init__(self, poll: select.epoll, close: Callable[[socket.socket], object]) -> None:
        """close: closes a socket, which may take 15 ms (packet.py)."""
        self._poll, self._close = poll, close
        self._sockets: dict[tuple[int, int], list[socket.socket]] = {}
        self._heard: dict[tuple[int, int], frozenset[bytes]] = {}
        self._by_fd: dict[int, tuple[int, socket.socket]] = {}

    def __contains__(self, fd: int) -> bool:
        """Whether fd is that of one of the sockets."""
        return fd in self._by_fd

    def hear(self, lower: int, name: str, macs: Mapping[int, frozenset[bytes]]) -> None:
        """Have the sockets of a lower device hear exactly these MACs. Without any MAC, none is left open.

        lower, name: its interface index and name. macs: the MACs, of six bytes each, by protocol (packet.wire). Raises
        OSError; the next call then sets every filter of that protocol anew.
        """
        for protocol, wanted in macs.items():
            key = lower, protocol
            if self._heard.get(key) == wanted:
                continue
            self._heard.pop(key, None)  # until all filters are set
            listed = sorted(wanted)
            parts = [listed[at : at + packet.MOST] for at in range(0, len(listed), packet.MOST)]
            sockets = self._sockets.setdefault(key, [])
            for mouth, part in zip(sockets, parts, strict=False):
                packet.listen_for(mouth, part)
            for part in parts[len(sockets) :]:
                mouth = packet.wire(name, protocol, part)
                sockets.append(mouth)
                self._by_fd[mouth.fileno()] = lower, mouth
                self._poll.register(mouth, select.EPOLLIN)
            while len(sockets) > len(parts):
                self._end(sockets.pop())
            if sockets:
                self._heard[key] = wanted
            else:
                del self._sockets[key]

    def frames(self, fd: int) -> Iterator[tuple[int, bytes]]:
        """Frames that wait at a socket: the lower device's interface index, and the first bytes. Raises OSError."""
        lower, mouth = self._by_fd[fd]
        for _ in range(_FRAMES):
            try:
                frame = mouth.recv(packet.KEPT_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENETDOWN:  # the socket goes on when the device is up again
                    return
                raise
            if len(frame) >= 14:
                yield lower, frame

    def close(self) -> None:
        """Close all sockets."""
        for sockets in self._sockets.values():
            for mouth in sockets:
                self._end(mouth)
        self._sockets.clear()
        self._heard.clear()

    def _end(self, mouth: socket.socket) -> None:
        self._poll.unregister(mouth)
        del self._by_fd[mouth.fileno()]
        self._close(mouth)
