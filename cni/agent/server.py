"""The CNI socket: serves one request after the other, except that a request which waits lets the next one begin.

Python runs one thread at a time and the kernel changes one link at a time (RTNL), so a hundred threads would only
compete for both: 100 ADDs at once then cost three times the CPU time that they cost one by one. So one thread waits in
accept(2) and serves. Before it waits for a delegate, a lock, the end of a link or a slow peer, it has a second thread
take over (Turn.leave), and finishes its request beside it. Must not know what a request means: plugin.handle does.
"""

from __future__ import annotations

import _socket
import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from cni.agent import wire
from cni.errors import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.attach.call import Request
    from cni.plugin import Response

    Reply = Callable[[Response, bytes], None]

SO_PEERCRED = 17
_UCRED = struct.Struct("=iII")
_REQUEST_SECONDS = 15.0
"""How long each read from a slow shim, and each write to it, may take."""
_PAUSE_SECONDS = 0.1
"""Until the next try, if accept(2) fails."""
_SPARE = 8
"""Idle threads that are kept."""
_BACKLOG = 512


def listen(
    path: str, mode: int = 0o600, prepare: Callable[[socket.socket], object] = lambda _: None
) -> socket.socket:
    """A listening unix socket that appears at path with its mode set, replacing an older one. Raises OSError.

    prepare: called with the socket before it listens.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    before = os.umask(0o177)
    try:
        listener.bind(temporary)
    finally:
        os.umask(before)
    os.chmod(temporary, mode)
    prepare(listener)
    listener.listen(_BACKLOG)
    os.rename(temporary, path)
    return listener


class Turn:
    """A request's right to be the only one served. It ends with the request, or earlier with leave()."""

    def __init__(self, start_successor: Callable[[], None]) -> None:
        self._start_successor = start_successor
        self.left = False

    def leave(self) -> None:
        """Let the next request begin. Call before a wait; a second call does nothing."""
        if not self.left:
            self.left = True
            self._start_successor()


class Server:
    """Serves answer() on a listening socket until stop()."""

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Request, Reply, Callable[[], None]], object],
        refused: Callable[[str], None],
        served: Callable[[bool], None] = lambda _: None,
        *,
        lent: bool = False,
    ) -> None:
        """answer is called with the request, a function that replies, and one to call before it waits (Turn.leave).

        refused: called with the reason for each connection that is not served. served: called after each connection,
        and when a thread takes over, with whether another connection waits; raises nothing. lent: systemd made the
        listener and keeps it open after this process.
        """
        self._listener = listener
        self._lent = lent
        self._answer = answer
        self._refused = refused
        self._served = served
        self._lock = threading.Lock()
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._stopping = False

    def start(self) -> None:
        """Start the first thread."""
        self._start_successor()

    def stop(self, seconds: float) -> bool:
        """Accept no more, and wait for the requests; whether all of them ended within seconds (if negative: no limit).

        Serves the connections that wait in the backlog, too, since an ADD whose connection breaks must be undone. The
        backlog of a lent socket is left to the next agent.
        """
        with self._lock:
            self._stopping = True
            self._idle = 0
            for _ in self._threads:
                self._wakeups.put(None)
        if self._lent:
            self._wake()
        else:
            self._listener.shutdown(socket.SHUT_RDWR)  # accept() empties the backlog, then fails
        until = time.monotonic() + (threading.TIMEOUT_MAX if seconds < 0 else seconds)
        while thread := self._any():
            if (left := until - time.monotonic()) <= 0:
                break
            thread.join(left)
        self._listener.close()
        return thread is None

    def _any(self) -> threading.Thread | None:
        """A thread that has not ended; None if all have."""
        with self._lock:
            return next(iter(self._threads), None)

    def _wake(self) -> None:
        """Wake accept() by a connection without a request: shutdown() would end the listener of systemd, too."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as empty:
            empty.setblocking(False)
            with suppress(OSError):  # EAGAIN: the backlog is full, which wakes accept() as well
                empty.connect(self._listener.getsockname())

    def _start_successor(self) -> None:
        """Have an idle thread, or a new one, serve the next request."""
        with self._lock:
            if self._stopping and self._lent:
                return
            if self._idle:
                self._idle -= 1
                self._wakeups.put(None)
                return
            thread = threading.Thread(target=self._serve, name="cni", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self) -> None:
        try:
            while self._serve_in_turn() and self._idle_until_needed():
                pass
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _serve_in_turn(self) -> bool:
        """Serve until another thread has taken over; False if the server stops."""
        turn = Turn(self._start_successor)
        self._served(self._another_waits())  # the request that left its turn may wait for long
        while not turn.left:
            if self._stopping and self._lent:  # systemd keeps the backlog for the next agent
                return False
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
                connection = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            except OSError as error:
                if self._stopping:
                    return False
                self._refused(f"a connection could not be accepted: {reason(error)}")
                time.sleep(_PAUSE_SECONDS)  # EMFILE, for example: there is no event to wait for
                continue
            try:
                self._handle(connection, turn)
            except Exception as error:  # the next requests must still be served
                self._refused(f"internal error in vmtapd: please report it: {error!r}")
            finally:
                connection.close()
            self._served(self._another_waits())
        return True

    def _another_waits(self) -> bool:
        """Whether a connection waits in the backlog."""
        poll = select.poll()  # a new one: two threads must not use one at once
        with suppress(ValueError):  # stop() has closed the listener
            poll.register(self._listener, select.POLLIN)
            return bool(poll.poll(0))
        return False

    def _idle_until_needed(self) -> bool:
        """Wait for the next turn; False if enough threads do, or the server stops."""
        with self._lock:
            if self._idle >= _SPARE or self._stopping:
                return False
            self._idle += 1
        self._wakeups.get()
        return True

    def _handle(self, connection: _socket.socket, turn: Turn) -> None:
        """Read one request, answer it, and close its netns fd."""
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
            self._refused(f"a request of process {pid} was not read: {reason(error)}")
            return
        if request is None:
            return
        if _has_hung_up(connection):
            if request.netns is not None:
                os.close(request.netns)
            self._refused(f"process {pid} has ended before its request could begin")
            return

        def reply(response: Response, stderr: bytes) -> None:
            with suppress(OSError):  # the runtime has killed its shim, and will send a DEL
                wire.reply(connection, response, stderr, late)
            os.sched_yield()  # often the shim is to run on this CPU: let it, before this thread goes on

        try:
            self._answer(request, reply, turn.leave)
        finally:
            if request.netns is not None:
                os.close(request.netns)


def _has_hung_up(connection: _socket.socket) -> bool:
    """Whether the peer has closed the connection: nobody would learn the result."""
    poll = select.poll()  # not recv(), which would wait if the connection has a timeout
    poll.register(connection.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
