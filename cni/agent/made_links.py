"""The links that ADDs have made, until the thread of handover.py looks at them.

An ADD's answer must not wait for that thread, nor share the interpreter with it: an ADD only takes a note, and the
thread is woken after the answer. While other requests wait, it is woken later, for all links at once.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.state.record import Record

_LATE_SECONDS = 0.25
"""From an ADD to the look at its link at most, while other requests wait: no guest is as quick."""


class MadeLinks:
    """The notes. fd: readable when there is something to look at, or the thread is to stop; for one reader."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._noted: dict[str, tuple[Record, int]] = {}
        self._since = 0.0  # when the first of them was noted; monotonic seconds
        self._woken = False  # whether the reader knows that there are some

    def note(self, record: Record, pod_netns: int) -> None:
        """Note the link of an ADD that has succeeded, and dup(2) pod_netns. wake() is to be called after the answer."""
        if forgotten := self._noted.pop(record.id, None):  # its DEL has come
            os.close(forgotten[1])
        if not self._noted:
            self._since = time.monotonic()
        self._noted[record.id] = record, os.dup(pod_netns)

    def wake(self, *, busy: bool = False) -> None:
        """Wake the reader if there are notes; busy: only if the first is _LATE_SECONDS old, as other requests wait."""
        if self._noted and not self._woken and (not busy or time.monotonic() > self._since + _LATE_SECONDS):
            self._woken = True
            self.wake_now()

    def wake_now(self) -> None:
        """Wake the reader in any case."""
        with suppress(OSError):  # EAGAIN: it is awake already; EBADF: it has stopped
            os.eventfd_write(self.fd, 1)

    def ids(self) -> set[str]:
        """The attachments that are noted."""
        return set(self._noted)

    def clear(self) -> None:
        """Note that the reader is awake: what is noted from now on wakes it again. To be called before take()."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._woken = False

    def take(self) -> Iterator[tuple[Record, int]]:
        """Each link's record and an fd of its network namespace, which is closed afterwards. For the reader."""
        while self._noted:
            _, (record, pod) = self._noted.popitem()
            try:
                yield record, pod
            finally:
                os.close(pod)

    def close(self) -> None:
        """Forget the notes, and close the fds."""
        for _ in self.take():
            pass
        os.close(self.fd)
