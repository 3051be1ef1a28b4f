"""The packet sockets on lower devices, by which the agent hears MACs from the wire.

The filter of one socket has room for packet.MOST MACs, so a lower device has as many sockets as its MACs need, for each
protocol. Must not decide what a frame means: handover.py does.
"""

from __future__ import annotations

import errno
import select

from cni.dataclass import dataclass
from cni.kernel import packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

_FRAMES = 64
"""Frames that are read from one socket before the others have their turn."""


@dataclass
class _Mouth:
    socket: socket.socket
    macs: frozenset[bytes]
    """What its filter passes."""


class WireSockets:
    """The open sockets, each registered with the caller's epoll object. For use by one thread."""

    def __init__(self, poll: select.epoll, close: Callable[[socket.socket], object]) -> None:
        """close: closes a socket, which may take 15 ms (packet.py)."""
        self._poll, self._close = poll, close
        self._at: dict[tuple[int, int], list[_Mouth]] = {}
        self._by_fd: dict[int, tuple[int, _Mouth]] = {}

    def __contains__(self, fd: int) -> bool:
        """Whether fd is that of one of the sockets."""
        return fd in self._by_fd

    def hear(self, lower: int, name: str, macs: Mapping[int, frozenset[bytes]]) -> None:
        """Have the sockets of a lower device hear exactly these MACs. Without any MAC, none is left open.

        A MAC stays with its socket, so that one more or less changes one filter, which costs up to 0.5 ms.

        lower, name: its interface index and name. macs: the MACs, of six bytes each, by protocol (packet.wire). Raises
        OSError; the next call goes on.
        """
        for protocol, wanted in macs.items():
            mouths = self._at.setdefault((lower, protocol), [])
            new = list(wanted.difference(*(mouth.macs for mouth in mouths)))
            for mouth in list(mouths):
                kept = mouth.macs & wanted
                heard = kept.union(new[: packet.MOST - len(kept)])
                if heard and heard != mouth.macs:
                    packet.listen_for(mouth.socket, heard)
                    mouth.macs = heard
                elif not heard:
                    mouths.remove(mouth)
                    self._end(mouth)
                del new[: packet.MOST - len(kept)]
            for at in range(0, len(new), packet.MOST):
                part = frozenset(new[at : at + packet.MOST])
                mouth = _Mouth(packet.wire(name, protocol, part), part)
                mouths.append(mouth)
                self._by_fd[mouth.socket.fileno()] = lower, mouth
                self._poll.register(mouth.socket, select.EPOLLIN)
            if not mouths:
                del self._at[lower, protocol]

    def frames(self, fd: int) -> Iterator[tuple[int, bytes]]:
        """Frames that wait at a socket: the lower device's interface index, and the first bytes. Raises OSError."""
        lower, mouth = self._by_fd[fd]
        for _ in range(_FRAMES):
            try:
                frame = mouth.socket.recv(packet.KEPT_BYTES)
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
        for mouths in self._at.values():
            for mouth in mouths:
                self._end(mouth)
        self._at.clear()

    def _end(self, mouth: _Mouth) -> None:
        self._poll.unregister(mouth.socket)
        del self._by_fd[mouth.socket.fileno()]
        self._close(mouth.socket)
