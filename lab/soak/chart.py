"""Draws a soak over time: latencies, memory and fds, with the kills. Must not judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.bench.chart import WIDTH, page

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.soak.report import Outcome, Phase

_LEFT, _RIGHT, _HEIGHT, _HEAD, _FOOT = 70, 16, 130, 34, 24
_ROW = 16
_LEAST = 0.1
"""Of a logarithmic axis."""
_TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Panel:
    title: str
    series: Sequence[Series]
    dots: bool = False
    """On a logarithmic axis; else lines."""


def draw(outcome: Outcome, note: str) -> str:
    """The SVG document."""
    first, last = outcome.phases[0].begin, outcome.phases[-1].end

    def x(moment: float) -> float:
        return _LEFT + (moment - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    agents = [
        [sample for sample in outcome.samples if sample.pid == pid]
        for pid in dict.fromkeys(sample.pid for sample in outcome.samples)
    ]
    panels = [
        _Panel("ADD of the steady pod, ms (logarithmic)", [outcome.adds], dots=True),
        _Panel("fds from the broker, ms (logarithmic)", [outcome.brokers], dots=True),
        _Panel("probe, ms (logarithmic)", [outcome.probes], dots=True),
        _Panel(
            "the agent's resident memory, MB",
            [[(each.time, each.memory / 1024) for each in life] for life in agents],
        ),
        _Panel("the agent's fds", [[(each.time, each.fds) for each in life] for life in agents]),
    ]
    names = sorted({name for _, name in outcome.events})
    drawn: list[str] = []
    top = 0.0
    for panel in panels:
        drawn += _panel(panel, top, x, outcome.phases)
        drawn += [
            _line("killed", x(at), top + _HEAD, _HEIGHT) for at, name in outcome.events if name == "agent"
        ]
        top += _HEAD + _HEIGHT + _FOOT
    drawn.append(f'<text class="head" x="8" y="{top + 22:.0f}">killed or removed</text>')
    top += _HEAD
    for name in names:
        drawn.append(f'<text class="note" x="8" y="{top + 12:.0f}">{name}</text>')
        drawn += [_line("killed", x(at), top + 2, _ROW - 4) for at, each in outcome.events if each == name]
        top += _ROW
    return page([panel.title for panel in panels], drawn, top + 8, note)


def _panel(panel: _Panel, top: float, x: Callable[[float], float], phases: Sequence[Phase]) -> list[str]:
    values = [value for each in panel.series for _, value in each] or [1.0]
    bottom = top + _HEAD + _HEIGHT
    if panel.dots:
        low = 10 ** math.floor(math.log10(max(_LEAST, min(values))))
        high = max(low * 10, 10 ** math.ceil(math.log10(max(_LEAST, *values))))
        marks = [low * 10**each for each in range(round(math.log10(high / low)) + 1)]
    else:
        low, high = 0.0, max(values) * 1.1
        marks = [0.0, max(values) / 2, max(values)]

    def y(value: float) -> float:
        if panel.dots:
            part = math.log10(max(value, low) / low) / math.log10(high / low)
        else:
            part = (value - low) / (high - low)
        return bottom - part * _HEIGHT

    drawn = [f'<text class="head" x="8" y="{top + 22:.0f}">{panel.title}</text>']
    for mark in marks:
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" y1="{y(mark):.1f}" x2="{WIDTH - _RIGHT}" y2="{y(mark):.1f}"/>'
            f'<text class="note" text-anchor="end" x="{_LEFT - 6}" y="{y(mark) + 4:.1f}">{mark:.4g}</text>'
        )
    first, last = phases[0].begin, phases[-1].end
    step = next((each for each in _TICKS if (last - first) / each <= 12), _TICKS[-1])
    for second in range(0, math.ceil(last - first), step):
        drawn.append(
            f'<text class="note" text-anchor="middle" x="{x(first + second):.1f}" y="{bottom + 14:.0f}">'
            f"{second} s</text>"
        )
    for phase in phases:
        drawn.append(_line("spread", x(phase.begin), top + _HEAD - 8, _HEIGHT + 8))
        drawn.append(
            f'<text class="note" x="{x(phase.begin) + 4:.1f}" y="{top + _HEAD + 4:.0f}">{phase.name}</text>'
        )
    for each in panel.series:
        if panel.dots:
            drawn += [
                f'<circle class="ours" cx="{x(at):.1f}" cy="{y(value):.1f}" r="1.5"/>' for at, value in each
            ]
        else:
            points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in each)
            drawn.append(f'<polyline class="line" points="{points}"/>')
    return drawn


def _line(kind: str, x: float, top: float, height: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{top + height:.1f}"/>'
