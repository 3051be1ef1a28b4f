"""Network namespaces by fd: open, make, compare, enter for the length of a block. Must not stay in one."""

from __future__ import annotations

import ctypes
import errno
import os
from fcntl import ioctl

from cni.errors import CniError, reason
from cni.spec import INVALID_NETNS, IO_FAILURE

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
OWN = "/proc/thread-self/ns/net"

libc = ctypes.CDLL(None, use_errno=True)


def open_path(
    path: str,
    *,
    name: str = "CNI_NETNS",
    own_allowed: bool = False,
    own: tuple[int, int] | None = None,
) -> int:
    """An fd of the network namespace at path. The caller closes it. name: what errors call the path.

    The path is opened with O_PATH first, and only a network namespace is then opened for real: opening a FIFO would
    block, and opening a device may act on it. Raises CniError 8 if the path is missing, is no network namespace, or is
    the caller's own one and own_allowed is false. own: identity() of the caller's, if it knows it.
    """
    try:
        seen = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise CniError(INVALID_NETNS, f"{name} {path!r} cannot be opened: {why}") from None
    try:
        return reopen(seen, path, name=name, own_allowed=own_allowed, own=own)
    finally:
        os.close(seen)


def reopen(
    seen: int,
    path: str,
    *,
    name: str = "CNI_NETNS",
    own_allowed: bool = False,
    own: tuple[int, int] | None = None,
) -> int:
    """An fd of the network namespace that the fd seen is of: seen itself, unless it was opened with O_PATH.

    Parameters and errors are those of open_path(), of which this is the second half.
    """
    own = own or own_identity()
    that = identity(seen)
    if that[0] != own[0]:  # the kernel has one nsfs, so all namespaces have one st_dev
        raise CniError(INVALID_NETNS, f"{name} {path!r} is not a namespace")
    if that == own and not own_allowed:
        raise CniError(
            INVALID_NETNS,
            f"{name} {path!r} is the plugin's own network namespace: a pod must have one of its own",
        )
    fd = seen
    try:
        try:
            kind = ioctl(seen, NS_GET_NSTYPE)
        except OSError as error:
            if error.errno != errno.EBADF:  # EBADF: seen is of O_PATH
                raise
            fd = os.open(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_CLOEXEC)
            kind = ioctl(fd, NS_GET_NSTYPE)
        if kind != CLONE_NEWNET:
            raise CniError(INVALID_NETNS, f"{name} {path!r} is not a network namespace")
    except BaseException:
        if fd != seen:
            os.close(fd)
        raise
    return fd


def identity(fd: int) -> tuple[int, int]:
    """(st_dev, st_ino) of an fd of a namespace. Two fds have the same exactly if they are of one namespace."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def own_identity() -> tuple[int, int]:
    """identity() of the calling thread's network namespace."""
    status = os.stat(OWN)
    return status.st_dev, status.st_ino


def new() -> int:
    """An fd of a new network namespace, which ends with its last fd. The caller closes it. Raises CniError 5."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            why = os.strerror(ctypes.get_errno())
            raise CniError(IO_FAILURE, "no network namespace can be made: CAP_SYS_ADMIN is needed", why)
        try:
            return os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _setns(home, "its own")
    finally:
        os.close(home)


class entered:  # noqa: N801 - used as a statement
    """Inside the block the calling thread is in the network namespace of fd; after it, in its own.

    home: an fd of its own namespace, if the caller has one. The block should only open what belongs to the namespace (a
    netlink socket, a tap, a sysfs). Raises CniError 8 if the namespace cannot be entered.
    """

    def __init__(self, fd: int, home: int | None = None) -> None:
        self._fd, self._home = fd, home

    def __enter__(self) -> None:
        self._back = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC) if self._home is None else self._home
        try:
            _setns(self._fd, "the pod's")
        except BaseException:
            self._close()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            _setns(self._back, "its own")
        finally:
            self._close()

    def _close(self) -> None:
        if self._home is None:
            os.close(self._back)


def _setns(fd: int, whose: str) -> None:
    if libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        code = INVALID_NETNS if whose == "the pod's" else IO_FAILURE
        raise CniError(
            code,
            f"the plugin cannot enter {whose} network namespace: it needs CAP_SYS_ADMIN",
            os.strerror(number),
        )
