"""Ctrl-C and the like, while guests run."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.guest import Guest

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ending:
    """A signal handler that notes the signal and kills the guests, so that waiting for one ends.

    It raises nothing where the signal arrives: an object that is being made there would not be removed.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._guests: list[Guest] = []
        for number in ENDING:
            signal.signal(number, self._end)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has arrived."""
        if self.signalled:
            raise KeyboardInterrupt

    def include(self, guest: Guest) -> None:
        """Kills this guest, too, on a signal. Raises KeyboardInterrupt if one has arrived already."""
        self._guests.append(guest)
        self.check()

    def _end(self, *_: object) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        self.signalled = True
        for guest in self._guests:
            guest.process.kill()
