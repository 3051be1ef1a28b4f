"""The results of a run: the budget's rows with verdicts, the Markdown page, the JSON document.

Must not measure. chart.py draws the chart.
"""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.assets.programs import PLUGINS_VERSION
from lab.bench.contenders import (
    AGENT,
    AGENT_CHECKED,
    AGENT_GUARDED,
    GO_MACVLAN,
    ONE_SHOT,
    PEER,
)
from lab.bench.figures import WIDE, Budget, Row, Spread, percent, ratios, spread
from lab.bench.guests import DIRECTIONS, MACVTAP, USER

if TYPE_CHECKING:
    from lab.bench.contenders import Sample
    from lab.bench.floors import Floors
    from lab.bench.frames import Frames
    from lab.bench.guests import Rates
    from lab.bench.interpreter import Memory
    from lab.bench.node import Extent, Samples, Soak
    from lab.bench.quiet import Waited
    from lab.bench.syscalls import Calls

NO_PEER = "PEER_MACVTAP_CNI=PATH is not set"

ADD = Budget("agent ADD ÷ Go macvlan without IPAM", 0.35, 0.20)
DEL = Budget("agent DEL ÷ Go macvlan", 0.15, 0.05)
TO_PEER = Budget("agent ADD ÷ kubevirt/macvtap-cni", 0.10, 0.06)
CHECKED = Budget("agent ADD with macSpoofCheck ÷ without", 1.2, 1.1)
GUARDED = Budget("agent ADD with a whole port ÷ without", 1.5, 1.3)
MANY_WALL = Budget("{count} ADDs at once ÷ Go macvlan, wall", 0.35, 0.20)
MANY_CPU = Budget("{count} ADDs at once ÷ Go macvlan, CPU", 0.35, 0.20)
CROWD = Budget("agent ADD with {count} attachments ÷ with none", 2, 1.5)
SINGLE = Budget("one-shot ADD ÷ Go macvlan", 50, 10)
RESIDENT = Budget("agent's memory after {count} pairs", 25, 18, "MB")
DEVICES = Budget("agent's memory with the device plugin", 45, 40, "MB")
GROWTH = Budget("its growth over the second half of them", 1, 0, "%")
LAUNCH = Budget("launcher, start to exec of QEMU", 70, 45, "ms")
GUEST = Budget("guest TX + RX, macvtap ÷ user networking", 2, 3, more=True)


@dataclass(frozen=True)
class Measured:
    """The measurements of one run."""

    quick: bool
    extent: Extent
    single: Samples
    many: Samples
    crowds: dict[int, Samples]
    soak: Soak
    launches: list[float]
    frames: Frames
    guests: Rates
    empty: list[Sample]
    """Of a static program that does nothing."""
    floors: Floors
    handled: list[float]
    """Durations of ADD in the agent's log, in milliseconds."""
    calls: Calls
    starts: dict[str, list[Sample]]
    """The start of a one-shot up to each part (interpreter.py)."""
    parts: dict[str, Memory]
    """The memory of a process up to each part of an agent (interpreter.py)."""
    resident: Memory
    """Of the agent, after the pairs of soak."""
    with_devices: Memory
    """Of the agent that offers devices, after the calls of contender AGENT_DEVICE."""
    waited: Waited
    emulated: Samples
    """From the machine with SR-IOV NICs; empty without it."""
    not_emulated: str
    """Why it is empty."""
    others: float = 0.0
    """The share of the processors that other programs used during the run."""

    def walls(self, name: str, command: str) -> list[float]:
        return [sample.wall for sample in self.single[name][command]]


def rows(measured: Measured) -> list[Row]:
    """The rows of the budget's table, with verdicts."""
    one, extent = measured.walls, measured.extent
    to_macvlan, del_to_macvlan, checked, guarded, one_shot = of_one_call(measured.single)
    many_wall, many_cpu = of_many(measured.many)
    (crowded,) = of_crowds(measured.crowds)
    resident = measured.soak.resident
    middle = next(kib for pairs, kib in resident if pairs >= extent.pairs / 2)
    growth = max(0.0, (resident[-1][1] - middle) / middle * 100)
    every = [
        Row(ADD, to_macvlan),
        Row(DEL, del_to_macvlan),
        Row(TO_PEER, spread(ratios(one(AGENT, "ADD"), one(PEER, "ADD"))))
        if PEER in measured.single
        else Row(TO_PEER, None, NO_PEER),
        Row(CHECKED, checked),
        Row(GUARDED, guarded),
        Row(_counted(MANY_WALL, extent.at_once), many_wall),
        Row(_counted(MANY_CPU, extent.at_once), many_cpu),
        Row(_counted(CROWD, max(measured.crowds)), crowded),
        Row(SINGLE, one_shot),
        Row(_counted(RESIDENT, extent.pairs), spread([resident[-1][1] / 1024])),
        Row(GROWTH, spread([round(growth, 1)])),
        Row(DEVICES, spread([measured.with_devices.total / 1024])),
        Row(LAUNCH, spread(measured.launches)),
        Row(GUEST, spread(ratios(both_ways(measured.guests, MACVTAP), both_ways(measured.guests, USER)))),
    ]
    return [_marked(row) for row in every]


def of_one_call(single: Samples) -> list[Spread]:
    """The ratios of ADD and DEL to macvlan, of both ports to none, and of the one-shot to macvlan."""
    pairs = [
        (AGENT, GO_MACVLAN, "ADD"),
        (AGENT, GO_MACVLAN, "DEL"),
        (AGENT_CHECKED, AGENT, "ADD"),
        (AGENT_GUARDED, AGENT, "ADD"),
        (ONE_SHOT, GO_MACVLAN, "ADD"),
    ]
    return [
        spread(ratios(*([each.wall for each in single[of][call]] for of in pair))) for *pair, call in pairs
    ]


def of_many(many: Samples) -> list[Spread]:
    """The ratios to macvlan of many ADDs at once: wall and CPU."""
    ours, theirs = (many[name]["ADD"] for name in (AGENT, GO_MACVLAN))
    return [
        spread(ratios([each.wall for each in ours], [each.wall for each in theirs])),
        spread(ratios([each.cpu for each in ours], [each.cpu for each in theirs])),
    ]


def of_crowds(crowds: dict[int, Samples]) -> list[Spread]:
    """The ratio of an ADD with the most attachments to one with the fewest."""
    alone, crowded = (
        [sample.wall for sample in crowds[size][AGENT]["ADD"]] for size in (min(crowds), max(crowds))
    )
    return [spread(ratios(crowded, alone))]


def _marked(row: Row) -> Row:
    """The row, with a remark if its spread is too wide."""
    if row.value is None or row.value.width <= WIDE:
        return row
    return replace(row, why=f"p10 to p90 is {percent(row.value.width)} of the median, so do not rely on it")


def both_ways(guests: Rates, medium: str) -> list[float]:
    """TX + RX of each round, in megabytes a second."""
    return [sum(pair) for pair in zip(*(guests[medium][way] for way in DIRECTIONS), strict=True)]


def _counted(budget: Budget, count: int) -> Budget:
    return Budget(
        budget.figure.format(count=f"{count:,}".replace(",", " ")),
        budget.must,
        budget.aim,
        budget.unit,
        budget.more,
    )


def machine() -> dict[str, str]:
    """The machine of the run, and the versions that were compared."""
    processors = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = int(re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[0])
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{len(processors)} of {processors[0] if processors else platform.machine()}",
        "memory": f"{memory / (1 << 20):.0f} GB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vmtap": version("vmtap-cni"),
        "reference plugins": PLUGINS_VERSION,
    }


def load(measured: Measured) -> dict[str, str]:
    """What other programs used of the machine before and during the run."""
    waited = measured.waited
    return {
        "waited for a quiet machine": f"{waited.seconds:.0f} s"
        + ("" if waited.quiet else ", and it was not quiet then"),
        "processors busy when it began": percent(waited.busy),
        "used by others during the run": percent(measured.others),
    }


def document(measured: Measured, about: dict[str, str]) -> dict[str, Any]:
    """The JSON document of `--json`."""

    def cells(samples: Samples) -> dict[str, Any]:
        return {
            name: {
                command: {
                    kind: asdict(spread([getattr(sample, kind) for sample in taken]))
                    for kind in ("wall", "cpu", "peak")
                }
                for command, taken in commands.items()
                if taken
            }
            for name, commands in samples.items()
        }

    return {
        "machine": about | load(measured),
        "quick": measured.quick,
        "budget": [
            {
                **asdict(row.budget),
                "value": row.value and asdict(row.value),
                "verdict": row.verdict,
                "why": row.why,
            }
            for row in rows(measured)
        ],
        "oneByOne": cells(measured.single),
        "atOnce": cells(measured.many),
        "emulated": cells(measured.emulated),
        "crowded": {str(size): cells(samples) for size, samples in measured.crowds.items()},
        "resident": measured.soak.resident,
        "memory": {
            name: asdict(each)
            for name, each in (
                measured.parts | {"agent": measured.resident, "with devices": measured.with_devices}
            ).items()
        },
        "starts": {
            part: {kind: asdict(spread([getattr(each, kind) for each in taken])) for kind in ("wall", "cpu")}
            for part, taken in measured.starts.items()
        },
        "floors": {name: asdict(spread(taken)) for name, taken in asdict(measured.floors).items()},
        "systemCalls": asdict(measured.calls),
        "launches": asdict(spread(measured.launches)),
        "nanosecondsAFrame": {
            part: {way: asdict(spread(taken)) for way, taken in ways.items()}
            for part, ways in measured.frames.items()
        },
        "guests": {
            medium: {way: asdict(spread(taken)) for way, taken in ways.items()}
            for medium, ways in measured.guests.items()
        },
    }
