"""inotify(7) on folders that may not exist yet, or may be replaced.

Reports that something has changed, not what: the caller looks at the files, and so misses nothing when the kernel's
queue overflows.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress

from cni.kernel.netns import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# sys/inotify.h
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_ONLYDIR = 0x1000000
_MASK = (
    *(IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE),
    *(IN_DELETE_SELF, IN_MOVE_SELF, IN_ONLYDIR),
)


class Folders:
    """Readable (fileno) when an entry of a folder has changed, or a folder was created, removed or replaced."""

    def __init__(self, folders: Iterable[str]) -> None:
        self._folders = tuple(map(os.path.abspath, folders))
        self._fd = _checked(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._watches: dict[int, str] = {}
        self._watch()

    def fileno(self) -> int:
        """For poll()."""
        return self._fd

    def close(self) -> None:
        """Close the inotify instance."""
        os.close(self._fd)

    def take(self) -> None:
        """Read the events and watch the folders that exist now. Look at the files after this call, not before."""
        with suppress(BlockingIOError):
            while os.read(self._fd, 1 << 16):
                pass
        self._watch()

    def _watch(self) -> None:
        """Watch each folder, or its nearest ancestor that exists, where the missing part will appear."""
        watches: dict[int, str] = {}
        for wanted in self._folders:
            folder, watch = wanted, -1
            while watch < 0:
                watch = libc.inotify_add_watch(self._fd, os.fsencode(folder), sum(_MASK))
                if watch < 0:
                    if ctypes.get_errno() not in (errno.ENOENT, errno.ENOTDIR) or folder == "/":
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
                    folder = os.path.dirname(folder)
                elif folder != wanted and os.path.isdir(_below(folder, wanted)):
                    folder, watch = wanted, -1  # it was created meanwhile
            watches[watch] = folder
        for stale in self._watches.keys() - watches.keys():
            libc.inotify_rm_watch(self._fd, stale)  # EINVAL: the folder was removed, and the watch with it
        self._watches = watches


def _below(folder: str, path: str) -> str:
    """The child of folder that leads to path."""
    child = os.path.relpath(path, folder).split("/", 1)[0]
    return os.path.join(folder, child)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
