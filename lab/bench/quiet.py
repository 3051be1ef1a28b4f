"""Other programs' use of the processors: waits for its end, and counts it during a run. Must not end any."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.bench.figures import percent

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET = 0.1
"""The share of all processors that other programs may use."""
_WINDOWS = 3
"""So many quiet windows in a row."""
_WINDOW_SECONDS = 1.0
_HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Waited:
    """The wait before a run. busy: the share of the processors in use at its end."""

    seconds: float
    busy: float

    @property
    def quiet(self) -> bool:
        return self.busy <= QUIET


def wait(
    limit: float,
    tell: Callable[[str], None],
    look: Callable[[], float] = lambda: busy(_WINDOW_SECONDS),
    clock: Callable[[], float] = time.monotonic,
) -> Waited:
    """Waits until the processors are quiet, at most limit seconds. tell: called with what it waits for."""
    begin = clock()
    row = 0
    while True:
        now = look()
        row = row + 1 if now <= QUIET else 0
        taken = clock() - begin
        if row == _WINDOWS or taken >= limit:
            return Waited(taken, now)
        tell(
            f"processors {percent(now)} busy, {percent(QUIET)} is quiet; goes on within {limit - taken:.0f} s"
        )


def busy(seconds: float) -> float:
    """The share of all processors that was in use for so long."""
    before = used(Path("/proc/stat").read_text())
    begin = time.monotonic()
    time.sleep(seconds)
    spent = used(Path("/proc/stat").read_text()) - before
    return min(1.0, spent / (time.monotonic() - begin) / (os.cpu_count() or 1))


def used(stat: str) -> float:
    """Seconds of all processors that were not idle, from the text of /proc/stat (proc_stat(5)).

    The hypervisor's share (steal) counts. guest and guest_nice are parts of user and nice.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split(None, 9)[1:9])
    return (user + nice + system + irq + softirq + steal) / _HERTZ


class Others:
    """Counts what others use, the kernel's own threads included, from its creation on."""

    def __init__(self) -> None:
        self._begin, self._used, self._own = time.monotonic(), self._all(), _own()

    def share(self) -> float:
        """The share of all processors; complete once all children of this process were waited for."""
        spent = self._all() - self._used - (_own() - self._own)
        return max(0.0, spent / (time.monotonic() - self._begin) / (os.cpu_count() or 1))

    @staticmethod
    def _all() -> float:
        return used(Path("/proc/stat").read_text())


def _own() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
