"""A token bucket: limits a rate, and lets short bursts pass. Not safe for threads."""

from __future__ import annotations

import time


class Bucket:
    """Has burst tokens at first, and gets rate tokens a second until it has burst again."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self._tokens, self._at = burst, time.monotonic()

    def take(self) -> bool:
        """Take a token; False if there is none."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
