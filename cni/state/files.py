"""Writes a file whole or not at all: a reader sees what was there before, or what is there now."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


def replace(path: str, data: bytes, *, temporary: str | None = None, mode: int | None = None) -> None:
    """Write to temporary (default: PATH.new), then rename(2) it to path. Two at once need a lock.

    mode: of the file, whatever the umask is; without it 0600. Raises OSError, and removes temporary then.
    """
    written = temporary or f"{path}.new"
    try:
        fd = os.open(written, _FLAGS, 0o600)
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            if os.write(fd, data) < len(data):  # the file system is full: a second write would fail
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
        os.rename(written, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(written)
        raise
