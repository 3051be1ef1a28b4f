"""A bar chart as SVG, legible on a light and on a dark page, and such a page for other charts.

Must not know what the numbers mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from lab.bench.figures import Spread, number

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 860
_LABELS, _RIGHT = 250, 90
_BAR, _GAP, _HEAD = 18, 8, 44
_STYLE = """
.page { fill: #ffffff; }
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.head { font-weight: 600; font-size: 15px; }
.note { fill: #57606a; }
.bar { fill: #8c959f; }
.ours { fill: #0969da; }
.floor { fill: #bf8700; }
.spread { stroke: #24292f; stroke-width: 1.5; opacity: .6; }
.line { fill: none; stroke: #0969da; stroke-width: 1.5; }
.killed { stroke: #cf222e; opacity: .7; }
.grid { stroke: #d0d7de; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; }
  text { fill: #e6edf3; }
  .note { fill: #9198a1; }
  .bar { fill: #6e7681; }
  .ours { fill: #4493f8; }
  .floor { fill: #d29922; }
  .spread { stroke: #e6edf3; }
  .line { stroke: #4493f8; }
  .killed { stroke: #f85149; }
  .grid { stroke: #30363d; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar. kind: its CSS class, "ours", "floor" or "bar"."""

    name: str
    value: Spread
    kind: str


@dataclass(frozen=True)
class Panel:
    """Bars on one logarithmic axis of the given unit."""

    title: str
    unit: str
    bars: Sequence[Bar]


def draw(panels: Sequence[Panel], note: str) -> str:
    """The SVG document."""
    body: list[str] = []
    top = 0.0
    for panel in panels:
        body += _panel(panel, top)
        top += _HEAD + len(panel.bars) * (_BAR + _GAP) + 26
    return page([panel.title for panel in panels], body, top, note)


def page(titles: Sequence[str], drawn: Sequence[str], height: float, note: str) -> str:
    """The SVG document of what was drawn, with a note below it."""
    body = [*drawn, f'<text class="note" x="8" y="{height + 12:.0f}">{escape(note)}</text>']
    height += 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f"<title>{escape('; '.join(titles))}</title><style>{_STYLE}</style>\n"
        f'<rect class="page" width="{WIDTH}" height="{height:.0f}" rx="6"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _panel(panel: Panel, top: float) -> list[str]:
    least = 10 ** math.floor(math.log10(min(bar.value.low for bar in panel.bars)))
    most = 10 ** math.ceil(math.log10(max(bar.value.high for bar in panel.bars)))
    decades = round(math.log10(most / least))

    def x(value: float) -> float:
        return _LABELS + math.log10(value / least) / decades * (WIDTH - _LABELS - _RIGHT)

    drawn = [f'<text class="head" x="8" y="{top + 22:.0f}">{escape(panel.title)}</text>']
    bottom = top + _HEAD + len(panel.bars) * (_BAR + _GAP)
    for decade in range(decades + 1):
        at = least * 10**decade
        drawn.append(
            f'<line class="grid" x1="{x(at):.1f}" y1="{top + _HEAD - 6:.0f}" x2="{x(at):.1f}" y2="{bottom:.0f}"/>'
        )
        drawn.append(
            f'<text class="note" text-anchor="middle" x="{x(at):.1f}" y="{bottom + 14:.0f}">{at:g} {panel.unit}</text>'
        )
    for place, bar in enumerate(panel.bars):
        y = top + _HEAD + place * (_BAR + _GAP)
        middle, text = y + _BAR / 2, y + _BAR - 5
        drawn.append(f'<text text-anchor="end" x="{_LABELS - 8}" y="{text:.1f}">{escape(bar.name)}</text>')
        drawn.append(
            f'<rect class="{bar.kind}" x="{_LABELS}" y="{y:.1f}" width="{x(bar.value.median) - _LABELS:.1f}" '
            f'height="{_BAR}" rx="2"/>'
        )
        drawn.append(
            f'<line class="spread" x1="{x(bar.value.low):.1f}" y1="{middle:.1f}" x2="{x(bar.value.high):.1f}" '
            f'y2="{middle:.1f}"/>'
        )
        drawn.append(
            f'<text x="{max(x(bar.value.high), x(bar.value.median)) + 6:.1f}" y="{text:.1f}">'
            f"{number(bar.value.median)} {panel.unit}</text>"
        )
    return drawn
