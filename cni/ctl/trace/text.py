"""The verdicts of a trace for people: one sentence, what to do, each way, and the facts of both ends side by side."""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cni.ctl.render import profile
from cni.ctl.trace.facts import CAN, CANNOT, MAY
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from cni.ctl.trace.facts import End, Medium, Verdict

_STYLE = {CAN: "green", CANNOT: "red", MAY: "yellow"}
_PASSES = {True: "passes", False: "does not pass", None: "may pass"}


def shown(verdicts: Sequence[Verdict]) -> RenderableType:
    """All verdicts, with a blank line between them."""
    parts: list[RenderableType] = []
    for each in verdicts:
        parts += [Text(""), _one(each)] if parts else [_one(each)]
    return Group(*parts)


def _one(verdict: Verdict) -> RenderableType:
    above = Table.grid(padding=(0, 2))
    above.add_column(style="dim", no_wrap=True)
    above.add_column(overflow="fold")
    for step in verdict.next_steps:
        above.add_row("→", Text(escaped(step), style="bold"))
    for also in verdict.reasons[1:]:
        above.add_row("also", Text(escaped(also.text)))
    for warning in verdict.warnings:
        above.add_row("warning", Text(escaped(warning), style="yellow"))
    for way in verdict.ways:
        both = f"unicast {_PASSES[way.unicast]}, broadcast {_PASSES[way.broadcast]}"
        path = "" if way.path in verdict.summary else f": {way.path}"
        above.add_row(
            "once mended" if verdict.blocked else "way",
            Text(escaped(f"{way.sender} → {way.receiver}: {both}{path}")),
        )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    for _ in verdict.ends:
        facts.add_column(overflow="fold")
    rows = [dict(_facts(end)) for end in verdict.ends]
    for name in dict.fromkeys(name for row in rows for name in row):
        facts.add_row(name, *(Text(escaped(row.get(name, "-"))) for row in rows))
    summary = Text(escaped(verdict.summary), style=f"bold {_STYLE[verdict.verdict]}")
    return Group(summary, Padding(above, (0, 0, 0, 2)), Text(""), Padding(facts, (0, 0, 0, 2)))


def _facts(end: End) -> Iterator[tuple[str, str]]:
    yield "attachment", end.name
    yield "id", end.id
    yield "status", end.status
    waits = " (waiting for its guest)" if end.waiting else ""
    yield "device", f"{end.device} {end.mode or ''}{waits}".rstrip()
    yield "MAC", end.mac
    if end.link_mac != end.mac and end.device == "macvtap":
        yield "link's MAC", end.link_mac or "-"
    yield "addresses", " ".join(end.addresses) or "-"
    yield "MTU", str(end.mtu)
    yield "VLAN", str(end.vlan or "none")
    if end.medium:
        yield from _medium(end.medium)
    if end.bridge_port:
        port = end.bridge_port
        facts = [port.name, "forwarding" if port.forwarding else "not forwarding"]
        facts += ["isolated"] if port.isolated else []
        facts += [f"PVID {port.vlans.pvid or 'none'}"] if port.vlans else []
        yield "bridge port", " ".join(facts)
    if end.port:
        yield "port", profile(end.port)
        yield "filters", {True: "as the profile", False: "changed", None: "cannot be read"}[end.intact]
        counts = (f"{reason} {count}" for reason, count in sorted(end.refused.items()))
        yield "refused", ", ".join(counts) or "none"
    yield "held by", ", ".join(end.holders) or "-"
    yield "to guest", _frames(end.to_guest)
    yield "from guest", _frames(end.from_guest)


def _medium(medium: Medium) -> Iterator[tuple[str, str]]:
    device = medium.device if medium.device == medium.name else f"{medium.device} of {medium.name}"
    yield "on", f"{device}  {medium.state}  mtu {medium.mtu}{'  vlan_filtering' if medium.filtering else ''}"
    if medium.embedded:
        yield "embedded switch", medium.embedded
    yield (
        "wire",
        ", ".join(f"{nic} VLAN {tags}" if tags else nic for nic, tags in sorted(medium.nics)) or "none",
    )
    reflects = {True: "reflects", False: "does not reflect", None: "unknown"}[medium.reflects]
    yield "switch", f"{reflects} ({medium.probed})"


def _frames(count: int | None) -> str:
    return "unknown" if count is None else f"{count} frames"
