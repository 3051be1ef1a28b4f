"""One run of the benchmark, from the lab's first namespace to the page in docs/."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from lab.assets import guest
from lab.assets.cache import CHECKOUT
from lab.assets.programs import BENCH
from lab.bench import (
    chart,
    emulated,
    floors,
    frames,
    guests,
    interpreter,
    leftovers,
    node,
    page,
    quiet,
    report,
    syscalls,
)
from lab.bench.contenders import (
    AGENT,
    KERNEL,
    TMPFS,
    Agent,
    Floor,
    contenders,
    has_vlans,
    tap_on_bridge,
)
from lab.bench.devices import agent_with_devices
from lab.bench.figures import number, percent, spread
from lab.bench.spawn import Spawner
from lab.process import LabError
from lab.wire import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab.bench.contenders import Sample
    from lab.bench.figures import Row
    from lab.bench.node import Extent, Samples

DOCS = CHECKOUT / "docs"
_SOAK_PODS = 4


class Show:
    """Progress, on stderr; the table of the budget, on stdout."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """Prints a line when a step is done, and shows a spinner while it runs.

        Yields a function that adds a text to the spinner.
        """
        begin = time.monotonic()
        with self._console.status(f"{text} …") as status:
            yield lambda now: status.update(f"{text}: {now} …")
        self._console.print(f"[green]✓[/] {text:60}[dim]{time.monotonic() - begin:>7.1f} s[/]")

    def note(self, text: str) -> None:
        self._console.print(text, style="dim")


def measure(extent: Extent, show: Show, peer: Path | None, *, quick: bool) -> report.Measured:
    """Measures everything, and removes all that it made before it returns or raises."""
    with show.step("a quiet machine") as now:
        waited = quiet.wait(extent.quiet_seconds, now)
    if not waited.quiet:
        show.note(
            f"the machine is not quiet: {percent(waited.busy)} busy after {waited.seconds:.0f} s; goes on"
        )
    others = quiet.Others()
    measured = _measure(extent, show, peer, quick=quick, waited=waited)
    return replace(measured, others=others.share())


def _measure(
    extent: Extent, show: Show, peer: Path | None, *, quick: bool, waited: quiet.Waited
) -> report.Measured:
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f"vmtap-bench-{os.getpid()}-", dir=TMPFS))
        )
        with show.step("a host, a switch, a peer machine and pods, of network namespaces"):
            lab = stack.enter_context(Lab())
            pods = [lab.pod(f"pod{number}") for number in range(extent.at_once)]
            agent = stack.enter_context(Agent(lab.node))
            floor = stack.enter_context(Floor(lab.node, pods[0]))
            spawner = stack.enter_context(Spawner(BENCH.get() / "spawn", lab.node))
            every = contenders(agent, folder / "one-shot", floor, peer, vlans=has_vlans(lab.node))
        with (
            show.step(f"one call at a time, {extent.rounds} rounds") as now,
            agent_with_devices(lab.node) as device,
            Agent(lab.node) as bridging,
        ):
            heavier = {each.name: each for each in (tap_on_bridge(bridging), device)}
            single = node.steadied(
                extent.tries,
                lambda: node.one_by_one(spawner, {**every, **heavier}, floor, pods[0], extent.rounds),
                report.of_one_call,
                now,
            )
            empty = node.empty_processes(spawner, extent.rounds)
            kernels = floors.measure(lab.node, pods[0], extent.rounds)
            starts = interpreter.starts(spawner, extent.rounds)
            handled = agent.handled("ADD", node.container(AGENT))
            assert device.agent
            with_devices = interpreter.of(device.agent)
        with show.step("system calls"):
            calls = syscalls.count(spawner, every[AGENT], agent, pods[: extent.traced])
        with show.step(f"{extent.at_once} at once, {extent.at_once_rounds} rounds") as now:
            many = node.steadied(
                extent.tries,
                lambda: node.at_once(spawner, every, pods, extent.at_once_rounds),
                report.of_many,
                now,
            )
        with show.step(f"on a crowded NIC, {extent.crowd_rounds} rounds each") as now:
            crowds = node.steadied(
                extent.tries,
                lambda: node.crowded(spawner, every, floor, pods[0], pods, extent=extent, progress=now),
                report.of_crowds,
                now,
            )
        with show.step("the launcher's start") as now:
            launches = node.steadied(
                extent.tries,
                lambda: node.launches(spawner, every[AGENT], agent, pods[0], extent.launches),
                lambda taken: [spread(taken)],
                now,
            )
        with show.step(f"frames through a port, {extent.frame_rounds} rounds"):
            passed = frames.frames(
                spawner, every[AGENT], agent, lab, pods[0], rounds=extent.frame_rounds, count=extent.frames
            )
        with show.step(f"{extent.pairs} pairs by an agent of its own") as now, Agent(lab.node) as fresh:
            tired = contenders(fresh, folder / "unused", floor)[AGENT]
            soak = node.soak(spawner, tired, pods[:_SOAK_PODS], extent.pairs, now)
            resident = interpreter.of(fresh)
        with show.step(f"guests, {extent.guest_rounds} rounds") as now:
            rates = guests.throughput(spawner, every[AGENT], agent, lab, extent=extent, progress=now)
        samples: Samples = {}
        why = "a quick run starts no emulated machine"
        if extent.emulated_rounds:
            with show.step(f"a machine with SR-IOV NICs, {extent.emulated_rounds} rounds"):
                samples, why = _emulated(extent.emulated_rounds)
        return report.Measured(
            quick,
            extent,
            single,
            many,
            crowds,
            soak,
            launches,
            passed,
            rates,
            empty=empty,
            floors=kernels,
            handled=handled,
            calls=calls,
            starts=starts,
            parts=interpreter.memory(),
            resident=resident,
            with_devices=with_devices,
            waited=waited,
            emulated=samples,
            not_emulated=why,
        )


def _emulated(rounds: int) -> tuple[Samples, str]:
    """The samples of the emulated machine; none, and why, if it fails: the rest of a long run must not be lost."""
    try:
        return emulated.measure(rounds), ""
    except LabError as error:
        print(f"lab.bench: {error}", file=sys.stderr)
        return {}, str(error).partition("\n")[0]


def panels(measured: report.Measured) -> list[chart.Panel]:
    """The panels of the chart."""

    def bars(samples: Samples, command: str, of: Callable[[Sample], float]) -> list[chart.Bar]:
        return [
            chart.Bar(name, spread([of(each) for each in commands[command]]), _kind(name))
            for name, commands in samples.items()
            if commands[command]
        ]

    count = measured.extent.at_once
    return [
        chart.Panel("ADD, one call", "ms", bars(measured.single, "ADD", lambda sample: sample.wall)),
        chart.Panel("DEL, one call", "ms", bars(measured.single, "DEL", lambda sample: sample.wall)),
        chart.Panel(
            f"{count} ADDs at once, wall", "ms", bars(measured.many, "ADD", lambda sample: sample.wall)
        ),
        chart.Panel(
            f"{count} ADDs at once, CPU", "ms", bars(measured.many, "ADD", lambda sample: sample.cpu)
        ),
    ]


def _kind(name: str) -> str:
    if name == KERNEL:
        return "floor"
    return "ours" if name.startswith("vmtap") else "bar"


def _print(rows: Sequence[Row]) -> None:
    """The budget as a table, and a line for each remark."""
    table = Table(box=box.ASCII)
    for head in ("figure", "must", "aim", "measured", "p10 to p90", "verdict"):
        table.add_column(head, no_wrap=True)
    for row in rows:
        value = row.value
        limits = (
            f"{'>=' if row.budget.more else '<='} {limit:g}" for limit in (row.budget.must, row.budget.aim)
        )
        seen = f"{number(value.median)} {row.budget.unit}" if value else ""
        between = f"{number(value.low)} to {number(value.high)}" if value and value.count > 1 else ""
        table.add_row(row.budget.figure, *limits, seen, between, row.verdict)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for row in rows:
        if row.why:
            console.print(f"{row.budget.figure}: {row.why}", highlight=False, soft_wrap=True)


def _interrupt(*_: object) -> None:
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Returns the exit status: 0 if all was measured, whatever the verdicts; 1 on an error; 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench", description="Measures vmtap beside other CNI plugins."
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing into docs/")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    options = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)
    show = Show()
    peer = Path(os.environ["PEER_MACVTAP_CNI"]).resolve() if os.environ.get("PEER_MACVTAP_CNI") else None
    try:
        guest.files()  # raises before minutes of measuring
        if removed := leftovers.remove():
            more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
            show.note(f"removed what a killed run had left: {', '.join(removed[:3])}{more}")
        about = report.machine()
        extent = node.QUICK if options.quick else node.FULL
        measured = measure(extent, show, peer, quick=options.quick)
    except LabError as error:
        print(f"lab.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab.bench: interrupted; what it had made is gone", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(report.document(measured, about), indent=2, ensure_ascii=False))
    else:
        _print(report.rows(measured))
    if not options.quick:
        note = f"logarithmic; medians, p10 to p90; {about['processor']}, kernel {about['kernel']}, {about['date']}"
        (DOCS / "benchmark.svg").write_text(chart.draw(panels(measured), note))
        (DOCS / "benchmark.md").write_text(page.markdown(measured, about))
        show.note("docs/benchmark.md and docs/benchmark.svg are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
