"""The CNI socket: one request after the other, and one that has to wait for somebody lets the next begin.

Python runs one thread at a time and the kernel changes one link at a time (RTNL), so a hundred threads would only
spin for both: 100 ADDs at once cost three times the CPU that they cost one by one. So one thread waits in accept()
and serves; before it waits for a delegate, a lock, a link's end or a peer that has not said all, it calls its
successor (Turn.leave) and goes on beside it. Must not know what a request means: that is plugin.handle's.
"""

from __future__ import annotations

import _socket
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from cni.agent import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.attach.call import Request
    from cni.plugin import Response

    Reply = Callable[[Response, bytes], None]

SO_PEERCRED = 17
_UCRED = struct.Struct("=iII")
_REQUEST_SECONDS = 15.0
_PAUSE_SECONDS = 0.1
_SPARE = 8
"""Threads that stay when all is quiet."""
_BACKLOG = 512


def listen(path: str, mode: int = 0o600) -> socket.socket:
    """A listening unix socket at path, complete when it appears; an older one there is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(made)
    before = os.umask(0o177)
    try:
        listener.bind(made)
    finally:
        os.umask(before)
    os.chmod(made, mode)
    listener.listen(_BACKLOG)
    os.rename(made, path)
    return listener


class Turn:
    """A request's right to be the only one that works; given up once and for good by leave()."""

    def __init__(self, call_successor: Callable[[], None]) -> None:
        self._call_successor = call_successor
        self.left = False

    def leave(self) -> None:
        """Before a wait that the others need not share. May be called again."""
        if not self.left:
            self.left = True
            self._call_successor()


class Server:
    """Serves answer() on a listening socket until stop()."""

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Request, Reply, Callable[[], None]], object],
        refused: Callable[[str], None],
        *,
        lent: bool = False,
    ) -> None:
        """answer gets what was request, how to reply, and what to call before it waits for somebody else.

        lent: the socket is systemd's, which listens on when we are gone.
        """
        self._listener = listener
        self._lent = lent
        self._answer = answer
        self._refused = refused
        self._lock = threading.Lock()
        self._called: SimpleQueue[None] = SimpleQueue()
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._stopping = False

    def start(self) -> None:
        """Begin to serve."""
        self._successor()

    def stop(self, seconds: float) -> bool:
        """Take no more requests and wait for those that were made; whether all of them ended in time.

        Who has connected by now is served, too: an ADD whose connection breaks would have to be undone.
        """
        with self._lock:
            self._stopping = True
            self._idle = 0
            for _ in self._threads:
                self._called.put(None)
        if self._lent:
            self._wake()
        else:
            self._listener.shutdown(socket.SHUT_RDWR)  # accept() goes on to the last that waits, then fails
        until = time.monotonic() + (threading.TIMEOUT_MAX if seconds < 0 else seconds)
        while thread := self._any():
            if (left := until - time.monotonic()) <= 0:
                break
            thread.join(left)
        self._listener.close()
        return thread is None

    def _any(self) -> threading.Thread | None:
        """One that has not ended."""
        with self._lock:
            return next(iter(self._threads), None)

    def _wake(self) -> None:
        """End accept() by a connection that says nothing: shutdown() would end the socket for systemd, too."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nobody:
            nobody.setblocking(False)
            with suppress(OSError):  # so many requests wait that one of them will do
                nobody.connect(self._listener.getsockname())

    def _successor(self) -> None:
        """Let an idle thread take the next request, or a new one."""
        with self._lock:
            if self._stopping and self._lent:
                return
            if self._idle:
                self._idle -= 1
                self._called.put(None)
                return
            thread = threading.Thread(target=self._serve, name="cni", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self) -> None:
        try:
            while self._take_turns() and self._rest():
                pass
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _take_turns(self) -> bool:
        """Serve until another thread has been called to do so; False when it is all over."""
        turn = Turn(self._successor)
        while not turn.left:
            if self._stopping and self._lent:  # systemd's socket keeps who waits there for the next agent
                return False
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
                connection = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            except OSError as error:
                if self._stopping:
                    return False
                self._refused(f"a connection could not be taken: {error}")
                time.sleep(_PAUSE_SECONDS)  # no fd is free, say: there is no event to wait for
                continue
            try:
                self._one(connection, turn)
            except Exception as error:  # the last wall: whoever is next must still be served
                self._refused(f"a fault in vmtapd itself: please report it: {error!r}")
            finally:
                connection.close()
        return True

    def _rest(self) -> bool:
        """Until called; False if there are enough who wait for that."""
        with self._lock:
            if self._idle >= _SPARE or self._stopping:
                return False
            self._idle += 1
        self._called.get()
        return True

    def _one(self, connection: _socket.socket, turn: Turn) -> None:
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.geteuid()):
            self._refused(f"uid {uid} (process {pid}) may not use the CNI socket")
            return

        def late() -> None:
            turn.leave()
            connection.settimeout(_REQUEST_SECONDS)

        try:
            request = wire.receive(connection, late)
        except (wire.WireError, OSError) as error:
            self._refused(f"a request of process {pid} was not read: {error}")
            return
        if request is None:
            return

        def reply(response: Response, stderr: bytes) -> None:
            with suppress(OSError):  # a shim that is gone was killed by its runtime, which sends a DEL
                wire.reply(connection, response, stderr, late)
            os.sched_yield()  # the kernel often wakes the shim on this CPU: what is left to do here is not its wait

        try:
            self._answer(request, reply, turn.leave)
        finally:
            if request.netns is not None:
                os.close(request.netns)
