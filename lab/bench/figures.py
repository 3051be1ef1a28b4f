"""Numbers into figures: medians with their spread, ratios pair by pair, and the verdict of the budget. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Spread:
    """The median, and between which values the middle 80 % lie (p10 to p90)."""

    median: float
    low: float
    high: float
    count: int


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part (0 to 1) of them lies, between two of them by proportion."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> Spread:
    """ValueError if there are none."""
    if not values:
        raise ValueError("nothing was measured")
    return Spread(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9), len(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what slowed the machine down in a round slowed both. ValueError if a round has one only."""
    return [own / other for own, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Budget:
    """A figure to reach. unit: what follows a number, "" for a ratio; more: is more better?"""

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
    """One line of the budget's table. value None: not measured in this run, and why says so."""

    budget: Budget
    value: Spread | None
    why: str = ""

    @property
    def verdict(self) -> str:
        return self.budget.verdict(self.value.median) if self.value else "not measured"


def number(value: float) -> str:
    """Three significant digits, no exponent: 0.0412, 1.23, 45.6, 1234."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits)}f}"
