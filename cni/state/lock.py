"""One lock for each attachment, as byte ranges of a single file.

Open-file-description locks (fcntl(2), F_OFD_SETLKW) belong to the open file: threads of one process exclude each other
as processes do, and a holder that is killed leaves nothing behind. Two names that hash to one byte, with probability
2**-62, wait for each other needlessly.
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


def keep_turn() -> None:
    """The yield_turn of a caller that serves no other requests meanwhile: does nothing."""


class held:  # noqa: N801 - used as a statement
    """Inside the block no other holder of (file, name) runs.

    yield_turn is called before a wait; each holder's work is bounded. Raises OSError if the file cannot be opened,
    BlockingIOError if there is a holder and wait is false.
    """

    def __init__(
        self, file: str, name: str, *, wait: bool = True, yield_turn: Callable[[], None] = keep_turn
    ) -> None:
        self._file, self._name, self._wait, self._yield_turn = file, name, wait, yield_turn

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
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            if not self._wait:
                raise BlockingIOError(error.errno, f"{self._name} is locked") from error
            self._yield_turn()
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _range(self._name))


def is_held(file: str, name: str) -> bool:
    """Whether (file, name) has a holder now. Raises OSError if the file is there and cannot be opened."""
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
