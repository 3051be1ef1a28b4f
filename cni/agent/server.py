"""The CNI socket: each request in a thread of its own, so that a slow delegate delays nobody else.

Idle threads wait in accept(), which is the quickest way to a request; one more is started whenever none is left
waiting. Must not know what a request means: that is plugin.handle's.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress

from cni.agent import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.wire import Asked
    from cni.plugin import Response

SO_PEERCRED = 17
_UCRED = struct.Struct("=iII")
_REQUEST_SECONDS = 15.0
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


class Server:
    """Serves answer() on a listening socket until stop()."""

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Asked], tuple[Response, bytes]],
        refused: Callable[[str], None],
        *,
        lent: bool = False,
    ) -> None:
        """lent: the socket is systemd's, which listens on when we are gone."""
        self._listener = listener
        self._lent = lent
        self._answer = answer
        self._refused = refused
        self._lock = threading.Lock()
        self._waiting = 0
        self._threads: set[threading.Thread] = set()
        self._stopping = False

    def start(self) -> None:
        """Begin to serve."""
        for _ in range(_SPARE):
            self._spawn()

    def stop(self, seconds: float) -> bool:
        """Take no more requests and wait for those in flight; whether all of them ended in time."""
        with self._lock:
            self._stopping = True
            threads = list(self._threads)
            waiting = self._waiting
        if self._lent:
            self._wake(waiting)
        else:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes every accept()
        end = threading.TIMEOUT_MAX if seconds < 0 else seconds
        import time  # noqa: PLC0415

        until = time.monotonic() + end
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._listener.close()
        return not any(thread.is_alive() for thread in threads)

    def _wake(self, waiting: int) -> None:
        """End each accept() by a connection that says nothing: shutdown() would end the socket for systemd, too."""
        for _ in range(waiting):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nobody:
                nobody.setblocking(False)
                with suppress(OSError):  # so many requests wait that every thread gets one
                    nobody.connect(self._listener.getsockname())

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._serve, name="cni", daemon=True)
        with self._lock:
            if self._stopping:
                return
            self._waiting += 1
            self._threads.add(thread)
        thread.start()

    def _serve(self) -> None:
        try:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return  # stop() was called
                with self._lock:
                    self._waiting -= 1
                    alone = self._waiting == 0
                if alone:
                    self._spawn()
                with connection:
                    self._one(connection)
                with self._lock:
                    if self._waiting >= _SPARE or self._stopping:
                        return
                    self._waiting += 1
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _one(self, connection: socket.socket) -> None:
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.geteuid()):
            self._refused(f"uid {uid} (process {pid}) may not use the CNI socket")
            return
        connection.settimeout(_REQUEST_SECONDS)
        try:
            asked = wire.receive(connection)
        except (wire.WireError, OSError) as error:
            self._refused(f"a request of process {pid} was not read: {error}")
            return
        if asked is None:
            return
        try:
            response, stderr = self._answer(asked)
        finally:
            if asked.netns is not None:
                os.close(asked.netns)
        with suppress(OSError):  # a shim that is gone was killed by its runtime, which sends a DEL
            wire.reply(connection, response, stderr)
