"""Waits for what happens by itself and tells nobody; bounded, and generously: it costs nothing when all is well."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS = 180.0
_LOOK_SECONDS = 0.02


def until(true: Callable[[], bool], what: str) -> None:
    """Fails the test, which is told what it waited for, if it does not come true."""
    end = time.monotonic() + _SECONDS
    while not true():
        assert time.monotonic() < end, what
        time.sleep(_LOOK_SECONDS)


def until_as_before(look: Callable[[], dict[str, Any]], before: dict[str, Any]) -> None:
    """Fails the test, and says in what, if it does not come to look as before."""
    end = time.monotonic() + _SECONDS
    while (now := look()) != before and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    differs = {key: (before[key], now[key]) for key in now if now[key] != before[key]}
    assert not differs, f"before and now: {differs}"
