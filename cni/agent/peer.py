"""Identifies the process at the other end of a unix socket, and its network namespace.

A pid alone proves nothing: its process may have ended, and the pid may belong to a process of another pod by now. So
what is read from /proc/PID counts only if both of these hold:

1. The process of a pidfd is alive after the reading, so the pid was its own meanwhile. The pidfd comes from
   SO_PEERPIDFD where the kernel has it (Linux 6.5), else from pidfd_open(2), which may already return another process
   than the one that connected.
2. The peer sends data after the pidfd was opened, the kernel reports the pid of the sender (SCM_CREDENTIALS), and 1
   still holds. This covers the gap of pidfd_open, and a socket that was passed to another process; so it is required
   on every kernel. The caller sends a greeting and gives the ancillary data of the answer to Peer.proven().

Must not know what is requested.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from cni.dataclass import dataclass
from cni.errors import CniError, reason
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
    """One process of this boot. A pid may be reused, a pid with a start time is not."""

    pid: int
    start: int
    """Ticks since boot (proc_pid_stat(5), field 22)."""

    def pidfd(self) -> int | None:
        """A pidfd that the caller closes; None if the process has ended."""
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
        """Whether the process is running. A zombie is not."""
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
    """An fd of the network namespace of the process's main thread."""
    netns_id: tuple[int, int]

    def proven(self, credentials: list[tuple[int, int, bytes]]) -> bool:
        """Whether the ancillary data of a message received after identify() shows this process as the sender."""
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


def claimed_netns(connection: socket.socket) -> tuple[int, int] | None:
    """The network namespace of the process that has the peer's pid now, if any: for limits, not for access."""
    pid, _, _ = _credentials(connection)
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def identify(connection: socket.socket) -> Peer:
    """The peer of the connection. Raises CniError 8 if it cannot be identified."""
    pid, uid, _ = _credentials(connection)
    if pid == 0:
        raise CniError(
            INVALID_NETNS, "the agent cannot see the process: the agent must run in the host's pid namespace"
        )
    pidfd = _pidfd(connection, pid)
    try:
        process = Process(pid, start_time(pid))
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        os.close(pidfd)
        if isinstance(error, PermissionError):
            raise CniError(
                INVALID_NETNS,
                "the agent may not read the process's namespace: the agent needs CAP_SYS_PTRACE",
            ) from error
        raise CniError(INVALID_NETNS, _GONE, reason(error)) from error
    peer = Peer(process, uid, pidfd, namespace, netns.identity(namespace))
    if ended(pidfd):
        with peer:
            raise CniError(INVALID_NETNS, _GONE)
    return peer


def ended(pidfd: int) -> bool:
    """Whether the process has ended. A zombie has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def start_time(pid: int) -> int:
    """The start time of the process (Process.start). Raises OSError if there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(
            file.read().rpartition(b")")[2].split()[19]
        )  # a command name may contain blanks and brackets


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid and gid of the process that connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    pid, uid, gid = UCRED.unpack(data)
    return pid, uid, gid


def _pidfd(connection: socket.socket, pid: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # the process has ended and was reaped
            raise CniError(INVALID_NETNS, _GONE, reason(error)) from error
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise CniError(INVALID_NETNS, _GONE, reason(error)) from error
