"""How a test waits: for as long as LIMIT at most, and a failure shows what was seen meanwhile.

A wait costs nothing when all is well, so its limit is far beyond what the slowest machine needs. No test has another.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from lab.process import PATIENCE

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

T = TypeVar("T")

LIMIT = PATIENCE
"""Seconds; the lab's own."""
_LOOK_SECONDS = 0.02
_SHOWN = 10


def until(look: Callable[[], T], what: str, wanted: Callable[[T], bool] = bool) -> T:
    """Looks again and again until what it sees is wanted, and returns that.

    At the limit the test fails with what, which states the expectation that was not met, and the last things seen.
    """
    began = time.monotonic()
    seen: list[tuple[float, T]] = []
    while not wanted(now := look()):
        waited = time.monotonic() - began
        if not seen or now != seen[-1][1]:
            seen = [*seen[1 - _SHOWN :], (waited, now)]
        if waited > LIMIT:
            shown = "\n".join(f"  after {after:.2f} s: {each!r}" for after, each in seen)
            raise AssertionError(f"{what}; seen in {LIMIT} s:\n{shown}")
        time.sleep(_LOOK_SECONDS)
    return now


def until_as_before(look: Callable[[], dict[str, Any]], before: dict[str, Any]) -> None:
    """Waits until everything looks as before; a failure names only what differs, as (before, now)."""

    def differences() -> dict[str, Any]:
        now = look()
        return {key: (before[key], now[key]) for key in now if now[key] != before[key]}

    until(differences, "not everything is as before", lambda different: not different)


@contextmanager
def watched(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kills the process at the limit, so that a read from it in the block ends."""
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
