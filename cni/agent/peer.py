"""Who is at the other end of a unix socket: a process that lives, and its network namespace.

A pid alone proves nothing: its process can end, and another one, in another pod, can have the number when we look.
So nothing that is read under the pid counts until two things are known:

1. the process that a pidfd names still lives after the reading, so that the number was its own all the time. The
   pidfd is SO_PEERPIDFD's where the kernel has it (Linux 6.5); pidfd_open(2)'s elsewhere, which may already be
   another process than the one that connected.
2. the peer says something after the pidfd was opened, the kernel says whose pid said it (SCM_CREDENTIALS), and
   1. still holds then. This closes what pidfd_open leaves open, and keeps a connection with who made it; so it is
   asked for on every kernel. The caller sends a greeting and hands what comes back to `proven`.

Must not know what is asked for.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from cni.errors import CniError
from cni.kernel import netns
from cni.spec import INVALID_NETNS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

SO_PEERPIDFD = 77  # asm-generic/socket.h
SCM_CREDENTIALS = 2  # linux/socket.h
UCRED = struct.Struct("=iII")  # pid, uid, gid

_GONE = "the process that connected has ended"


@dataclass(frozen=True)
class Process:
    """One process on this host, until it reboots: a pid can come again, a pid with a start time cannot."""

    pid: int
    start: int
    """Ticks since boot (proc_pid_stat(5), field 22)."""

    def pidfd(self) -> int | None:
        """An fd of it that the caller closes; None if it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return None
        try:
            if start_time(self.pid) == self.start and not ended(fd):
                return fd
        except OSError:
            pass
        os.close(fd)
        return None

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        fd = self.pidfd()
        if fd is not None:
            os.close(fd)
        return fd is not None


@dataclass(frozen=True)
class Peer:
    """The process that connected. A context manager that closes its fds."""

    process: Process
    uid: int
    pidfd: int
    netns: int
    """An fd of the network namespace that the process's first thread is in."""
    netns_id: tuple[int, int]

    def proven(self, credentials: list[tuple[int, int, bytes]]) -> bool:
        """Whether the ancillary data of what was received, after `identify`, is the process's own."""
        pids = [
            UCRED.unpack(data)[0]
            for level, kind, data in credentials
            if (level, kind) == (socket.SOL_SOCKET, SCM_CREDENTIALS)
        ]
        return pids == [self.process.pid] and not ended(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.netns)
        os.close(self.pidfd)


def identify(connection: socket.socket) -> Peer:
    """The peer as it is now. Raises CniError 8 if it cannot be known."""
    pid, uid, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    if pid == 0:
        raise CniError(
            INVALID_NETNS, "the agent does not see the process: it must run in the host's pid namespace"
        )
    pidfd = _pidfd(connection, pid)
    try:
        process = Process(pid, start_time(pid))
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        os.close(pidfd)
        if isinstance(error, PermissionError):
            raise CniError(
                INVALID_NETNS, "the agent may not see the process's namespace: it needs CAP_SYS_PTRACE"
            ) from error
        raise CniError(INVALID_NETNS, _GONE, str(error)) from error
    peer = Peer(process, uid, pidfd, namespace, netns.identity(namespace))
    if ended(pidfd):
        with peer:
            raise CniError(INVALID_NETNS, _GONE)
    return peer


def ended(pidfd: int) -> bool:
    """Whether the process is no more, or a zombie."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def start_time(pid: int) -> int:
    """Raises OSError if there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])  # a name may have blanks and brackets


def _pidfd(connection: socket.socket, pid: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # the process is gone, and waited for
            raise CniError(INVALID_NETNS, _GONE, str(error)) from error
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise CniError(INVALID_NETNS, _GONE, str(error)) from error
