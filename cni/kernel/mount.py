"""Detached mounts: file systems that no path leads to, and that end with their fd (fsopen(2), Linux 5.2).

A process that is killed leaves none behind, and it does not matter what the container's own mounts hide or forbid. A
sysfs or proc shows the namespaces of the thread that mounts it.
"""

from __future__ import annotations

import ctypes
import os

from cni.errors import CniError
from cni.kernel import netns
from cni.spec import IO_FAILURE

# System calls whose numbers are the same on every architecture (asm-generic/unistd.h).
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1


def detached(kind: bytes) -> int:
    """Mount a new file system of that type (b"sysfs"). Returns a directory fd that the caller closes. CniError 5."""
    context = _syscall(_SYS_FSOPEN, kind, _FSOPEN_CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _syscall(number: int, *args: int | bytes | None) -> int:
    result: int = netns.libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        why = os.strerror(ctypes.get_errno())
        raise CniError(
            IO_FAILURE, "a private file system cannot be mounted: CAP_SYS_ADMIN and Linux 5.2 are needed", why
        )
    return result
