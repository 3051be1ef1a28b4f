"""The page's tables of parts: what the time of an ADD and the memory of an agent consist of, and what an aim leaves.

Must not measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.bench.contenders import AGENT, AGENT_GUARDED, GO_MACVLAN, KERNEL, ONE_SHOT
from lab.bench.figures import number, percent, spread, table
from lab.bench.interpreter import BARE, GRPC, LIBRARY, MODULES, YAML

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.bench.contenders import Sample
    from lab.bench.figures import Budget
    from lab.bench.interpreter import Memory
    from lab.bench.report import Measured


def of_add(measured: Measured, budget: Budget) -> str:
    """The parts of the time of the agent's ADD, by medians. Their sum is the whole: one of them is the rest."""
    whole = spread(measured.walls(AGENT, "ADD")).median
    start, work = medians(measured.empty)[0], spread(measured.handled).median
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
    aim = budget.aim * spread(measured.walls(GO_MACVLAN, "ADD")).median
    return (
        table(("ADD of the agent", "ms", "part", "system calls"), [*lines, last])
        + f"\n\n{budget.aim:g} of Go macvlan, the aim, is {number(aim)} ms in this run. The first and the last "
        f"part are not vmtap's: {number(start + kernel)} ms.\nOf the aim they leave {number(aim - start - kernel)} ms "
        f"to the shim, the socket and the agent, which take {number(whole - start - kernel)} ms."
    )


def left(measured: Measured, add: Budget, delete: Budget, guarded: Budget, many: Budget) -> str:
    """For each budget: its aim in this run's milliseconds, what of that is not vmtap's, and what vmtap takes."""
    single, floors = measured.single, measured.floors
    process, process_cpu = medians(measured.empty)
    kernel, kernel_cpu = medians(single[KERNEL]["ADD"])
    alone = medians(single[AGENT]["ADD"])[0]
    rows = (
        ("ADD", add.aim * medians(single[GO_MACVLAN]["ADD"])[0], process + kernel, alone),
        (
            "DEL",
            delete.aim * medians(single[GO_MACVLAN]["DEL"])[0],
            process + spread(floors.gone).median,
            medians(single[AGENT]["DEL"])[0],
        ),
        (
            "ADD with a whole port, beyond one without",
            (guarded.aim - 1) * alone,
            spread(floors.rules).median,
            medians(single[AGENT_GUARDED]["ADD"])[0] - alone,
        ),
        (
            f"{measured.extent.at_once} ADDs at once, CPU",
            many.aim * medians(measured.many[GO_MACVLAN]["ADD"])[1],
            measured.extent.at_once * (process_cpu + kernel_cpu),
            medians(measured.many[AGENT]["ADD"])[1],
        ),
    )
    heads = ("ms", "the aim", "not vmtap's", "left to vmtap", "vmtap's")
    return table(
        heads,
        [
            (name, number(aim), number(floor), number(aim - floor), number(whole - floor))
            for name, aim, floor, whole in rows
        ],
    )


def of_one_shot(measured: Measured, budget: Budget) -> str:
    """The parts of the time of the one-shot's ADD, by medians. Their sum is the whole."""
    single = measured.single
    reached = {part: medians(taken) for part, taken in measured.starts.items()}
    kernel, whole = medians(single[KERNEL]["ADD"]), medians(single[ONE_SHOT]["ADD"])
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
    aim = budget.aim * spread(measured.walls(GO_MACVLAN, "ADD")).median
    return (
        table(("ADD of the one-shot", "ms", "part", "CPU ms"), [*lines, last])
        + f"\n\n{budget.aim:g} of Go macvlan, the aim, is {number(aim)} ms in this run; before vmtap's first "
        f"line runs, Python takes {number(reached[LIBRARY][0])} ms."
    )


def medians(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Of wall and CPU."""
    return tuple(spread([getattr(each, kind) for each in samples]).median for kind in ("wall", "cpu"))


def of_memory(measured: Measured) -> str:
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
        table(heads, lines)
        + f"\n\nAll of it is {_mb(wholes[0].total)} and {_mb(wholes[1].total)} MB. Python that does nothing is "
        f"{_mb(parts[BARE].total)} of both,\nPython that has imported gRPC {_mb(parts[GRPC].total)} of the latter."
    )


def _beyond(whole: Memory, part: Memory) -> tuple[str, str]:
    return _mb(whole.own - part.own), _mb(whole.files - part.files)


def _mb(kib: int) -> str:
    return f"{kib / 1024:.1f}"
