"""A wait ends when what it sees is wanted, and one that fails shows what it saw."""

from __future__ import annotations

import pytest

from tests import waiting


def test_the_first_that_is_wanted_is_returned() -> None:
    seen = iter([1, 2, 3, 4])
    assert waiting.until(lambda: next(seen), "no 3", lambda number: number == 3) == 3


def test_a_failure_shows_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LIMIT", 0.1)
    seen = iter(["early", "early", "late"])
    with pytest.raises(AssertionError, match=r"it does not end; seen in 0\.1 s:\n.*'early'\n.*'late'$"):
        waiting.until(lambda: next(seen, "late"), "it does not end", lambda _: False)
    with pytest.raises(AssertionError, match=r"\{'b': \(2, 3\)\}"):
        waiting.until_as_before(lambda: {"a": 1, "b": 3}, {"a": 1, "b": 2})
