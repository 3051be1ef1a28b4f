"""Medians with their spread, ratios pair by pair, and verdicts of the budget. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


WIDE = 0.5
"""The width from which a spread is too wide to judge its median by."""


@dataclass(frozen=True)
class Spread:
    """The median, and the range of the middle 80 % (p10 to p90)."""

    median: float
    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        """The range as a part of the median."""
        return (self.high - self.low) / abs(self.median) if self.median else 0.0


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which a part (0 to 1) of the values lies; interpolates between two of them."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> Spread:
    """The spread of values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("nothing was measured")
    return Spread(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9), len(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratios round by round, since a slow round slows both down. Raises ValueError if the lengths differ."""
    return [own / other for own, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Budget:
    """Limits of a figure. unit: "" for a ratio; more: whether more is better."""

    figure: str
    must: float
    aim: float
    unit: str = ""
    more: bool = False

    def verdict(self, value: float) -> str:
        """ "aim", "must" or "missed"."""
        sign = -1 if self.more else 1
        if sign * value <= sign * self.aim:
            return "aim"
        return "must" if sign * value <= sign * self.must else "missed"


@dataclass(frozen=True)
class Row:
    """A row of the budget's table. value: None if this run has not measured it; why: the reason."""

    budget: Budget
    value: Spread | None
    why: str = ""

    @property
    def verdict(self) -> str:
        return self.budget.verdict(self.value.median) if self.value else "not measured"


def number(value: float) -> str:
    """Formats with three significant digits and no exponent: 0.0412, 1.23, 45.6, 1234."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits)}f}"


def percent(part: float) -> str:
    """Formats a part of 1: 12 %."""
    return f"{100 * part:.0f} %"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in every)
