"""Records which processes hold the fds of which attachment, across restarts of the agent.

FOLDER/holders/ID exists while one of its processes lives, and no longer than the attachment's record
(Store.forget_id removes both). The file is authoritative; a pidfd for each process signals when to rewrite it. A
process counts as a holder until it ends: the agent cannot see whether it has closed the fds.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from contextlib import contextmanager, suppress
from logging import INFO, WARNING

from cni.agent.log import log
from cni.agent.peer import Process, ended
from cni.errors import CniError, reason, refused
from cni.spec import DEVICE_BUSY
from cni.state import files, lock
from cni.state.record import boot_id
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


MOST = 64
"""Holders of one attachment: the agent keeps a pidfd of each, and looks at all of them when one is added."""
_STOP_SECONDS = 5.0


class Holders:
    """Safe for threads, and for two agents at once while one replaces the other."""

    def __init__(self, store: Store) -> None:
        self._folder = store.holders
        self._file = f"{store.folder}/lock"
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[str, Process]] = {}
        self._epoll = select.epoll()
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="holders", daemon=True)

    def start(self) -> None:
        """Read the files of an earlier agent, and watch their processes. Raises OSError."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        for id in os.listdir(self._folder):
            if id.endswith(".new"):  # an agent was killed while it wrote
                os.unlink(f"{self._folder}/{id}")
                continue
            with self._exclusive():
                holders = self._read(id)
                self._write(id, holders)
                for process in holders:
                    self._follow(id, process)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the files stay for the next agent."""
        self._waker.close()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():  # it waits for the lock: another agent has it
            return
        for fd in self._watched:
            os.close(fd)
        self._watched.clear()
        self._epoll.close()
        self._woken.close()

    def add(self, id: str, ifname: str, process: Process, *, shared: bool) -> bool:
        """Record that the process holds the attachment; False if that was recorded before.

        Raises CniError DEVICE_BUSY if a process holds it already (the same one, too: more fds would be more queues)
        and shared is False; 5 if the file cannot be written.
        """
        with self._exclusive():
            holders = self._read(id)
            if holders and not shared:
                log(INFO, "attachment held", attachment=id, holders=[holder.pid for holder in holders])
                raise CniError(
                    DEVICE_BUSY,
                    f"{ifname} is held by a running process; end it, or use --shared: its frames are then shared out "
                    "between the holders",
                )
            if process in holders:
                return False
            if len(holders) >= MOST:
                raise CniError(DEVICE_BUSY, f"{ifname} is held by {len(holders)} processes: end some of them")
            try:
                self._write(id, [*holders, process])
            except OSError as error:
                raise refused(
                    error, f"the holder of {ifname} cannot be recorded in {self._folder}"
                ) from error
            self._follow(id, process)
            return True

    def remove(self, id: str, process: Process) -> None:
        """Undo add()."""
        with self._exclusive():
            for fd in [fd for fd, watched in self._watched.items() if watched == (id, process)]:
                self._forget(fd)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock, lock.held(self._file, "holders"):
            yield

    def _watch(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._woken.fileno():
                    return
                with self._exclusive():
                    # remove() may have closed it meanwhile, and the number may be another process's now.
                    if fd in self._watched and ended(fd):
                        self._forget(fd)

    def _follow(self, id: str, process: Process) -> None:
        # A process may hold one attachment after the other: no pidfd is kept for those that have ended.
        for old in [fd for fd, (_, watched) in self._watched.items() if watched == process]:
            if not os.path.exists(f"{self._folder}/{self._watched[old][0]}"):
                self._forget(old)
        fd = process.pidfd()
        if fd is None:  # it has ended meanwhile
            self._write(id, self._read(id))
            return
        self._watched[fd] = (id, process)
        self._epoll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        id, process = self._watched.pop(fd)
        self._epoll.unregister(fd)
        os.close(fd)
        try:
            self._write(id, [holder for holder in self._read(id) if holder != process])
        except OSError as error:  # harmless: _read() leaves out processes that have ended
            log(WARNING, "the end of a holder cannot be recorded", attachment=id, error=reason(error))

    def _read(self, id: str) -> list[Process]:
        """The holders in the file that are alive."""
        try:
            with open(f"{self._folder}/{id}", "rb") as file:
                boot, entries = json.loads(file.read())
            holders = [Process(*entry) for entry in entries]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            log(
                WARNING,
                "the file of an attachment's holders cannot be read",
                attachment=id,
                error=reason(error),
            )
            return []
        return [holder for holder in holders if boot == boot_id() and holder.alive()]

    def _write(self, id: str, holders: Iterable[Process]) -> None:
        path = f"{self._folder}/{id}"
        if not (entries := [(holder.pid, holder.start) for holder in holders]):
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        files.replace(path, json.dumps([boot_id(), entries]).encode())
