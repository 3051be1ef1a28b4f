"""Writes log lines in a thread of its own, so that a reader that stops reading stderr delays no request.

A write(2) to a full pipe or socket blocks until the reader reads. So a caller only adds its line to a queue of bounded
size. When the queue is full, lines are dropped and counted until it is empty again; then a line reports their number,
at the place where they are missing. Must not know what a line contains.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from queue import SimpleQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_QUEUE_BYTES = 1 << 18
"""Lines that wait: about a thousand requests."""
_FLUSH_SECONDS = 2.0
"""How long close() waits for the reader."""


class LogWriter(logging.Handler):
    """Writes to an fd until close(), which logging calls at the process's exit.

    report: returns the record that reports a number of dropped lines.
    """

    def __init__(self, fd: int, report: Callable[[int], logging.LogRecord]) -> None:
        super().__init__()
        self.dropped = 0
        """Lines dropped since the start."""
        self._fd, self._report = fd, report
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._count = threading.Lock()
        self._waiting = 0
        """Bytes in the queue, and of the line that is being written."""
        self._missing = 0
        """Lines dropped and not reported yet."""
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Add the record to the queue, or drop it."""
        line = self._line(record)
        with self._count:
            if self._missing or self._waiting >= _QUEUE_BYTES:
                self._missing += 1
                self.dropped += 1
                return
            self._waiting += len(line)
        self._queue.put(line)

    def close(self) -> None:
        """Wait until the lines are written, at most _FLUSH_SECONDS."""
        self._queue.put(None)
        self._thread.join(_FLUSH_SECONDS)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            self._write(line)
            missing = 0
            with self._count:
                self._waiting -= len(line)
                if not self._waiting:
                    missing, self._missing = self._missing, 0
            if missing:
                self._write(self._line(self._report(missing)))

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:  # another process has set O_NONBLOCK
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # nobody reads it any more
                with self._count:
                    self.dropped += 1
                return
