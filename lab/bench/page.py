"""The Markdown page of a run, docs/benchmark.md. Must not measure, and not judge: report.py does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.bench import parts
from lab.bench.contenders import AGENT, AGENT_VLAN, GO_MACVLAN, KERNEL
from lab.bench.figures import number, ratios, spread, table
from lab.bench.frames import NONE, WAYS
from lab.bench.guests import DIRECTIONS, MACVTAP, TAP, USER
from lab.bench.node import COMMANDS
from lab.bench.report import ADD, DEL, GUARDED, MANY_CPU, SINGLE, both_ways, load, rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.bench.figures import Row
    from lab.bench.node import Samples
    from lab.bench.report import Measured
    from lab.bench.syscalls import Calls

NO_VLANS = "\nThe row of a VLAN is left out: this kernel has no CONFIG_VLAN_8021Q; the emulated machine below has it.\n"
MARKS = {"aim": "✓✓ aim", "must": "✓ must", "missed": "✗ missed", "not measured": "not measured"}


def markdown(measured: Measured, about: dict[str, str]) -> str:
    """The text of docs/benchmark.md."""
    extent = measured.extent
    return TEXT.format(
        about="\n".join(f"| {name} | {value} |" for name, value in (about | load(measured)).items()),
        budget=table(
            ("figure", "must", "aim", "measured", "p10 to p90", "verdict"), map(_budget_cells, rows(measured))
        ),
        remarks="\n".join(f"\n{row.budget.figure}: {row.why}." for row in rows(measured) if row.why),
        rounds=extent.rounds,
        left_out="" if AGENT_VLAN in measured.single else NO_VLANS,
        single=_calls(measured.single, parts.medians(measured.empty)[0]),
        at_once=extent.at_once,
        at_once_rounds=extent.at_once_rounds,
        many=_calls(measured.many),
        spent=parts.of_add(measured, ADD),
        left=parts.left(measured, ADD, DEL, GUARDED, MANY_CPU),
        system_calls=_system_calls(measured.calls),
        one_shot=parts.of_one_shot(measured, SINGLE),
        traced=extent.traced,
        tries=extent.tries,
        emulated_rounds=extent.emulated_rounds,
        emulated=_emulated(measured),
        crowd_rounds=extent.crowd_rounds,
        crowds=_crowds(measured),
        pairs=extent.pairs,
        memory=parts.of_memory(measured),
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
    return table(heads, lines)


def _system_calls(calls: Calls) -> str:
    lines = []
    for who, counts in (("shim", calls.shim), ("agent", calls.agent)):
        ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        lines.append((who, ", ".join(f"{name} {count:.3g}" for name, count in ordered if count >= 0.1)))
    return table(("", "system calls of an ADD"), lines)


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
    return table(("", "", "wall ms", "÷ agent and shim", "p10 to p90"), lines)


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
    return table(heads, lines)


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
    return table(heads, lines)


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
    return table(heads, lines)


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

What is left to vmtap of the aims: a step that is not vmtap's is measured by itself, in this run. They are an empty
process; RTM_NEWLINK alone; RTM_DELLINK until the event that the link is gone; the transaction with a port's rules.

{left}

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
