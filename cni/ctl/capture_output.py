"""Where a capture is written, and the signals that end one: neither a slow nor a gone reader keeps it from ending."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import time
from contextlib import contextmanager, suppress

from cni.errors import CniError, reason
from cni.spec import INVALID_ENVIRONMENT, IO_FAILURE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_SIZE = 100_000_000
"""Bytes of a file for which no size is given."""
STDOUT = "-"


class Ended(Exception):  # noqa: N818 - no error
    """The capture ends, for the reason that the text gives. Frames that the kernel still has are not wanted."""


class EndedSoon(Ended):
    """As Ended, but frames that the kernel still has are wanted."""


class Output:
    """A file or a stream. most: bytes that may be written, or None."""

    _END = 64
    """Bytes that stay free for end()."""
    _CHUNK = 4096
    """PIPE_BUF: a pipe that is writable takes so much without blocking (pipe(7))."""

    def __init__(self, fd: int, name: str, most: int | None, signals: Signals) -> None:
        self._fd, self._name, self.most, self._signals = fd, name, most, signals
        self._pending = bytearray()
        self._size = self._written = 0
        self._until: float | None = None
        self._stream: select.poll | None = None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self._stream = select.poll()
            self._stream.register(fd, select.POLLOUT)

    def fileno(self) -> int:
        return self._fd

    def add(self, data: bytes) -> bool:
        """Write data at the next flush(); False if that is too much."""
        if self.most is not None and self._size + len(data) > self.most - self._END:
            return False
        self._pending += data
        self._size += len(data)
        return True

    def flush(self) -> None:
        """Write what was added. Raises Ended, CniError 5. A signal while a reader does not read raises EndedSoon."""
        try:
            while self._pending:
                self._wait()
                written = os.write(self._fd, self._pending[: self._CHUNK] if self._stream else self._pending)
                del self._pending[:written]
        except BrokenPipeError:
            self._pending.clear()
            raise Ended("the reader has closed the pipe") from None
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._written)  # whole frames only
            raise CniError(
                IO_FAILURE, f"{self._name} cannot be written; it has the frames before", reason(error)
            ) from error
        self._written = self._size

    def hurry(self, seconds: float) -> None:
        """From now on, wait only so long for a reader."""
        self._until = time.monotonic() + seconds

    def end(self, data: bytes) -> bool:
        """Write the last block; False if the reader has not taken everything."""
        self._pending += data
        with suppress(Ended):
            self.flush()
        return not self._pending

    def _wait(self) -> None:
        """Wait until the stream takes a chunk. Raises Ended if it does not in time."""
        if self._stream:
            left = None if self._until is None else max(0.0, self._until - time.monotonic()) * 1000
            with self._signals.waiting():
                if not self._stream.poll(left):
                    raise Ended("the reader does not read")


class Signals:
    """In the block, SIGINT and SIGTERM end the capture when it waits, and SIGPIPE does not end the process."""

    def __enter__(self) -> Signals:
        self._pending, self._waits = "", False
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A signal in the block, or since the last one, raises EndedSoon."""
        self._waits = True
        try:
            self._raise_pending()
            yield
        finally:
            self._waits = False

    def _note(self, number: int, _: object) -> None:
        self._pending = signal.Signals(number).name
        if self._waits:
            self._raise_pending()

    def _raise_pending(self) -> None:
        name, self._pending = self._pending, ""
        if name:
            self._waits = False
            raise EndedSoon(f"ended by {name}")


@contextmanager
def opened(write: str | None, size: int | None, signals: Signals) -> Iterator[Output]:
    """The file write, which must not exist, or standard output. size: bytes, or None. Raises CniError 4, 5."""
    if write is None or write == STDOUT:
        out = sys.stdout.fileno()
        if write and os.isatty(out):
            raise CniError(
                INVALID_ENVIRONMENT, "--write -: standard output is a terminal; pipe it to a program"
            )
        yield Output(out, "standard output", size, signals)
        return
    size = size or FILE_SIZE
    try:
        room = os.statvfs(os.path.dirname(write) or ".")
        if size > (free := room.f_bavail * room.f_frsize):
            raise CniError(
                IO_FAILURE,
                f"--write {write}: {free} bytes are free there, less than --size {size}: give a smaller one",
            )
        # O_EXCL follows no symbolic link.
        fd = os.open(write, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise CniError(
            IO_FAILURE, f"--write {write}: it exists, and is not overwritten: name a new file"
        ) from None
    except OSError as error:
        raise CniError(IO_FAILURE, f"--write {write}: it cannot be created", reason(error)) from error
    try:
        yield Output(fd, write, size, signals)
    finally:
        os.close(fd)
