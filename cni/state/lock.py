"""One lock for each attachment, without one file for each: byte ranges of a single file.

Open-file-description locks (fcntl(2), F_OFD_SETLKW) belong to the open file, so threads of one process
exclude each other as processes do, and a killed holder leaves nothing behind. Two names that hash to one byte
wait for each other needlessly, once in 2**62.
"""

from __future__ import annotations

import fcntl
import os
import struct
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def nothing() -> None:
    """For a caller to whom a wait makes no difference."""


class held:  # noqa: N801 - used as a statement
    """Inside the block no other holder of (file, name) runs. Waits for it; every holder's work is bounded.

    waits is called before it does, if it has to. Raises OSError if the file cannot be opened; BlockingIOError if
    there is a holder and wait is false.
    """

    def __init__(
        self, file: str, name: str, *, wait: bool = True, waits: Callable[[], None] = nothing
    ) -> None:
        self._file, self._name, self._wait, self._waits = file, name, wait, waits

    def __enter__(self) -> None:
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._take()
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _take(self) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _range(self._name))
        except (BlockingIOError, PermissionError) as error:  # POSIX lets it be either
            if not self._wait:
                raise BlockingIOError(error.errno, f"{self._name} is locked") from error
            self._waits()
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _range(self._name))


def is_held(file: str, name: str) -> bool:
    """Whether somebody is at work on it at this moment. Raises OSError if the file is there and cannot be opened."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        found: bytes = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _range(name))
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _range(name: str) -> bytes:
    start = int.from_bytes(blake2s(name.encode(), digest_size=8).digest()) >> 2
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
