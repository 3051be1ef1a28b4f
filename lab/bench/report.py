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
    AGENT_VLAN,
    GO_MACVLAN,
    KERNEL,
    ONE_SHOT,
    PEER,
)
from lab.bench.figures import WIDE, Budget, Row, Spread, number, percent, ratios, spread
from lab.bench.frames import NONE, WAYS
from lab.bench.guests import DIRECTIONS, MACVTAP, TAP, USER
from lab.bench.interpreter import BARE, GRPC, LIBRARY, MODULES, YAML
from lab.bench.node import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.bench.contenders import Sample
    from lab.bench.frames import Frames
    from lab.bench.guests import Rates
    from lab.bench.interpreter import Memory
    from lab.bench.node import Extent, Samples, Soak
    from lab.bench.quiet import Waited
    from lab.bench.syscalls import Calls

NO_VLANS = "\nThe row of a VLAN is left out: this kernel has no CONFIG_VLAN_8021Q; the emulated machine below has it.\n"
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
    empty: list[float]
    """Durations of a static program that does nothing, in milliseconds."""
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


MARKS = {"aim": "✓✓ aim", "must": "✓ must", "missed": "✗ missed", "not measured": "not measured"}


def page(measured: Measured, about: dict[str, str]) -> str:
    """The text of docs/benchmark.md."""
    extent = measured.extent
    return TEXT.format(
        about="\n".join(f"| {name} | {value} |" for name, value in (about | load(measured)).items()),
        budget=_table(
            ("figure", "must", "aim", "measured", "p10 to p90", "verdict"), map(_budget_cells, rows(measured))
        ),
        remarks="\n".join(f"\n{row.budget.figure}: {row.why}." for row in rows(measured) if row.why),
        rounds=extent.rounds,
        left_out="" if AGENT_VLAN in measured.single else NO_VLANS,
        single=_calls(measured.single, spread(measured.empty).median),
        at_once=extent.at_once,
        at_once_rounds=extent.at_once_rounds,
        many=_calls(measured.many),
        spent=_spent(measured),
        system_calls=_system_calls(measured.calls),
        one_shot=_one_shot(measured),
        traced=extent.traced,
        tries=extent.tries,
        emulated_rounds=extent.emulated_rounds,
        emulated=_emulated(measured),
        crowd_rounds=extent.crowd_rounds,
        crowds=_crowds(measured),
        pairs=extent.pairs,
        memory=_memory(measured),
        first=f"{measured.soak.resident[0][1] / 1024:.1f}",
        middle=f"{next(kib for pairs, kib in measured.soak.resident if pairs >= extent.pairs / 2) / 1024:.1f}",
        last=f"{measured.soak.resident[-1][1] / 1024:.1f}",
        frame_rounds=extent.frame_rounds,
        frames=_frames(measured),
        guest_rounds=extent.guest_rounds,
        guests=_guests(measured),
    )


def _budget_cells(row: Row) -> Sequence[str]:
    sign, unit = "≥" if row.budget.more else "≤", f" {row.budget.unit}" if row.budget.unit else ""
    limits = [f"{sign} {limit:g}{unit}" for limit in (row.budget.must, row.budget.aim)]
    if row.value is None:
        return row.budget.figure, *limits, "", "", MARKS[row.verdict]
    value = row.value
    between = f"{number(value.low)} to {number(value.high)}" if value.count > 1 else ""
    return row.budget.figure, *limits, f"**{number(value.median)}{unit}**", between, MARKS[row.verdict]


def _calls(samples: Samples, process: float | None = None) -> str:
    """process: milliseconds of an empty process, for the column of the floor."""
    heads = ["", "", "wall ms", "p10 to p90", "÷ Go macvlan", "CPU ms", "÷ Go macvlan", "peak MB"]
    lines = []
    for command in COMMANDS:
        base = samples[GO_MACVLAN][command]
        for name, commands in samples.items():
            taken = commands[command]
            if not taken:
                continue
            wall, cpu = spread([each.wall for each in taken]), spread([each.cpu for each in taken])
            peak = max(each.peak for each in taken)
            beside = [
                spread(
                    ratios(
                        [getattr(each, kind) for each in taken],
                        [getattr(each, kind) for each in base[: len(taken)]],
                    )
                ).median
                for kind in ("wall", "cpu")
            ]
            line = [
                command,
                name,
                number(wall.median),
                f"{number(wall.low)} to {number(wall.high)}",
                number(beside[0]),
                number(cpu.median),
                number(beside[1]),
                "" if name == KERNEL else f"{peak / 1024:.1f}",
            ]
            if process is not None:
                floor = spread([each.wall for each in samples[KERNEL][command]]).median + process
                line.insert(5, "" if name == KERNEL else number(wall.median / floor))
            lines.append(line)
    if process is not None:
        heads.insert(5, "÷ floor")
    return _table(heads, lines)


def _spent(measured: Measured) -> str:
    """The parts of the time of the agent's ADD, by medians. Their sum is the whole: one of them is the rest."""
    whole = spread(measured.walls(AGENT, "ADD")).median
    start, work = spread(measured.empty).median, spread(measured.handled).median
    kernel = spread(measured.walls(KERNEL, "ADD")).median
    shim, agent = (sum(each.values()) for each in (measured.calls.shim, measured.calls.agent))
    parts = {
        "vfork, exec and end of a static program that does nothing": (start, ""),
        "the rest: the shim, the socket, two wake-ups, reading the request": (
            whole - start - work,
            f"{shim:.0f} of the shim",
        ),
        "the agent's work, by its log, without RTM_NEWLINK": (work - kernel, f"{agent:.0f} of the agent"),
        "RTM_NEWLINK alone": (kernel, ""),
    }
    lines = [(name, number(each), percent(each / whole), calls) for name, (each, calls) in parts.items()]
    last = ("all", number(whole), "100 %", f"{shim + agent:.0f}")
    aim = ADD.aim * spread(measured.walls(GO_MACVLAN, "ADD")).median
    return (
        _table(("ADD of the agent", "ms", "part", "system calls"), [*lines, last])
        + f"\n\n{ADD.aim:g} of Go macvlan, the aim, is {number(aim)} ms in this run. The first and the last "
        f"part are not vmtap's: {number(start + kernel)} ms.\nOf the aim they leave {number(aim - start - kernel)} ms "
        f"to the shim, the socket and the agent, which take {number(whole - start - kernel)} ms."
    )


def _one_shot(measured: Measured) -> str:
    """The parts of the time of the one-shot's ADD, by medians. Their sum is the whole."""
    single = measured.single
    reached = {part: _medians(taken) for part, taken in measured.starts.items()}
    kernel, whole = _medians(single[KERNEL]["ADD"]), _medians(single[ONE_SHOT]["ADD"])
    reached["the rest: reading, checking and carrying out the request, without RTM_NEWLINK"] = tuple(
        all_ - last for all_, last in zip(whole, kernel, strict=True)
    )
    reached["RTM_NEWLINK alone"] = whole
    lines, before = [], (0.0, 0.0)
    for part, (wall, cpu) in reached.items():
        spent = wall - before[0]
        lines.append((part, number(spent), percent(spent / whole[0]), number(cpu - before[1])))
        before = wall, cpu
    last = ("all", number(whole[0]), "100 %", number(whole[1]))
    aim = SINGLE.aim * spread(measured.walls(GO_MACVLAN, "ADD")).median
    return (
        _table(("ADD of the one-shot", "ms", "part", "CPU ms"), [*lines, last])
        + f"\n\n{SINGLE.aim:g} of Go macvlan, the aim, is {number(aim)} ms in this run; before vmtap's first "
        f"line runs, Python takes {number(reached[LIBRARY][0])} ms."
    )


def _medians(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Of wall and CPU."""
    return tuple(spread([getattr(each, kind) for each in samples]).median for kind in ("wall", "cpu"))


def _memory(measured: Measured) -> str:
    """The parts of the memory of both agents. Their sum is the whole: one of them is the rest."""
    parts = measured.parts
    lines, wholes = [], (measured.resident, measured.with_devices)
    before: Memory | None = None
    for part in (BARE, LIBRARY, MODULES, YAML, GRPC):
        own, files = (
            parts[part].own - (before.own if before else 0),
            parts[part].files - (before.files if before else 0),
        )
        before = parts[part]
        cells = [_mb(own), _mb(files)]
        lines.append([part, *(["", ""] if part == GRPC else cells), *cells])
    rest = "the rest: threads, sockets, the policy, what requests leave"
    lines.append([rest, *_beyond(wholes[0], parts[YAML]), *_beyond(wholes[1], parts[GRPC])])
    lines.append(["all", *(_mb(each) for whole in wholes for each in (whole.own, whole.files))])
    heads = ("MB", "agent: own", "of files", "with the device plugin: own", "of files")
    return (
        _table(heads, lines)
        + f"\n\nAll of it is {_mb(wholes[0].total)} and {_mb(wholes[1].total)} MB. Python that does nothing is "
        f"{_mb(parts[BARE].total)} of both, Python that has imported gRPC {_mb(parts[GRPC].total)} of the latter."
    )


def _beyond(whole: Memory, part: Memory) -> tuple[str, str]:
    return _mb(whole.own - part.own), _mb(whole.files - part.files)


def _mb(kib: int) -> str:
    return f"{kib / 1024:.1f}"


def _system_calls(calls: Calls) -> str:
    lines = []
    for who, counts in (("shim", calls.shim), ("agent", calls.agent)):
        ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        lines.append((who, ", ".join(f"{name} {count:.3g}" for name, count in ordered if count >= 0.1)))
    return _table(("", "system calls of an ADD"), lines)


def _emulated(measured: Measured) -> str:
    if not (samples := measured.emulated):
        return f"Not measured: {measured.not_emulated}."
    lines = []
    for command in COMMANDS:
        base = [each.wall for each in samples[AGENT][command]]
        for name, commands in samples.items():
            walls = [each.wall for each in commands[command]]
            beside = spread(ratios(walls, base))
            between = f"{number(beside.low)} to {number(beside.high)}"
            lines.append((command, name, number(spread(walls).median), number(beside.median), between))
    return _table(("", "", "wall ms", "÷ agent and shim", "p10 to p90"), lines)


def _crowds(measured: Measured) -> str:
    sizes = sorted(measured.crowds)
    heads = ("ADD, wall ms, attachments already there:", *map(str, sizes), f"{sizes[-1]} ÷ {sizes[0]}")
    lines = []
    for name in measured.crowds[sizes[0]]:
        walls = [[each.wall for each in measured.crowds[size][name]["ADD"]] for size in sizes]
        lines.append(
            (
                name,
                *(number(spread(each).median) for each in walls),
                number(spread(ratios(walls[-1], walls[0])).median),
            )
        )
    return _table(heads, lines)


def _frames(measured: Measured) -> str:
    heads = ["", *(f"{head}{way}" for way in WAYS for head in ("frames/s ", "÷ no port, "))]
    lines = []
    for part, ways in measured.frames.items():
        cells = [part]
        for way in WAYS:
            beside = ratios(measured.frames[NONE][way], ways[way])
            cells += [
                f"{1e9 / spread(ways[way]).median:,.0f}".replace(",", " "),
                number(spread(beside).median),
            ]
        lines.append(cells)
    return _table(heads, lines)


def _guests(measured: Measured) -> str:
    heads = ("MB/s", "TX", "RX", "TX + RX", "÷ user networking", "p10 to p90")
    lines = []
    for medium in (MACVTAP, TAP, USER):
        ways = (number(spread(measured.guests[medium][way]).median) for way in DIRECTIONS)
        total = both_ways(measured.guests, medium)
        beside = spread(ratios(total, both_ways(measured.guests, USER)))
        lines.append(
            (
                medium,
                *ways,
                number(spread(total).median),
                number(beside.median),
                f"{number(beside.low)} to {number(beside.high)}",
            )
        )
    return _table(heads, lines)


def _table(heads: Sequence[str], lines: Any) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in every)


TEXT = """\
# Benchmark

Written by `make bench`, from one run; do not edit it.

![ADD, DEL and many at once](benchmark.svg)

## The budget

Medians; ratios are of two calls of the same round, and their spread is from the 10th to the 90th percentile.

{budget}
{remarks}

| this run | |
| --- | --- |
{about}

## How it is measured

Every round has one call of each contender, and each round begins with another one, so that a slow machine slows all of
them. A call is a process as a runtime starts it, from vfork(2) to wait4(2), by a small C program in the node's network
namespace. CPU is the user and system time of the process. For the agent, its own CPU time is added, including the
kernel's work after the answer to a DEL. Peak memory is that of the process; the agent's resident memory is added to its
shim's. No contender has IPAM. The agent has a policy file, as on a node; the one-shot has none, as on a laptop.
The run begins when the processors are quiet, or after a limit. A step whose figures spread too much is measured up to
{tries} times, and the narrowest try is shown. A figure that stays wide is named below the budget.
"Kernel alone" is one RTM_NEWLINK or RTM_DELLINK of a macvtap, until its ACK, on an open socket.

macvlan and tap are the CNI project's reference plugins. They make another device (a macvlan, which the pod's kernel
uses) or a tap without a NIC. The comparison is with them because most clusters run the reference plugins.

## One call at a time, {rounds} rounds

The floor is the time of an empty process plus the kernel alone, by medians. The agent answers a DEL when the link is
gone, before the kernel's ACK, so its DEL can be below 1. The floor of rows that make another device was not measured.
The tap on a bridge and the kubelet's device have agents of their own, which import pyroute2 or gRPC; the latter agent
asks a stand-in for a kubelet whose device it is. The VLAN's device is made by each ADD and removed by each DEL.
{left_out}
{single}

The first part is measured by itself, the third comes from the agent's log, the last is the kernel alone:

{spent}

System calls are counted by strace(1), apart from the timing, over {traced} ADDs. Those of the agent's other threads are
among them. Waits of threads for each other (futex, sched_yield) are not: strace's slowness makes more of them.

{system_calls}

Each of the one-shot's first three parts is a process that imports what the part before it imports, and more. It ends by
_exit(2), as the one-shot does.

{one_shot}

## {at_once} at once, {at_once_rounds} rounds

Each call is for another pod. Wall is from the first start to the last end, CPU is the sum. The one-shot has one round.

{many}

## Virtual functions and VLANs, {emulated_rounds} rounds

In an emulated machine with SR-IOV NICs (QEMU's igb) and Debian's kernel. Only the ratios count: processor and NIC are
software. An ADD of a virtual function sets it up in the NIC and makes the macvtap on it; the VLAN's device is made by
each ADD and removed by each DEL.

{emulated}

## On a crowded NIC, {crowd_rounds} rounds each

{crowds}

## The agent's memory over {pairs} pairs of ADD and DEL

{first} MB at the start, {middle} MB after half of the pairs, {last} MB at the end. Its parts then, and those of the
agent with the device plugin after {rounds} pairs: a part is a process that imports what the part before it imports, and
more. Own is RssAnon of proc(5). Of files is RssFile: pages of executables and libraries, which processes share.

{memory}

## Frames through a port, {frame_rounds} rounds

Frames of 98 bytes, one system call each, on one processor: out, written to the fd of a macvtap, as far as the wire's
other end; in, written to the wire's other end, as far as the queue of the fd. The rate is higher than what passes.

{frames}

## Guests, {guest_rounds} rounds

QEMU in software emulation (TCG), one processor each, vhost only if the host has it; a TCP stream between the guest and
another machine of the lab. The absolute numbers measure this machine's emulation, not a NIC.

{guests}
"""
