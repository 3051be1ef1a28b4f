"""The verdict of a soak: bounds, what broke them, the table, the document. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.bench.figures import number, quantile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lab.soak.watch import Sample

MEDIAN_MS, P99_MS, MAX_MS = 50.0, 500.0, 2000.0
"""Of the steady pod's ADD, and of nothing else: 25, 250 and 1000 times what an ADD takes on an idle machine."""
BROKER_MS, PROBE_MS = 2000.0, 2000.0
"""The longest request for fds, and the longest probe."""
RESTART_SECONDS = 15.0
END_SECONDS = 15.0
"""From SIGTERM to the end of the agent, whose drainSeconds are 5."""
MEMORY_KIB, PEAK_KIB = 10 << 10, 40 << 10
"""How much the agent may have grown when the neighbours have gone, and at its worst moment."""
FDS, THREADS = 16, 16
"""How many more there may be when the neighbours have gone: netlink sockets and idle threads are kept."""
_SHOWN = 5


@dataclass(frozen=True)
class Phase:
    """A part of the run, in seconds of the monotonic clock."""

    name: str
    begin: float
    end: float
    until: float = math.inf
    """The begin of the next one: a call that stalls ends after the phase that it belongs to."""


@dataclass(frozen=True)
class Finding:
    """A broken bound. kind: "stall", "growth", "leak" or "failure"; hint: what to look at."""

    kind: str
    text: str
    hint: str


@dataclass
class Outcome:
    """All that a run has measured. Latencies are pairs of end and milliseconds."""

    seed: int
    phases: list[Phase]
    adds: list[tuple[float, float]]
    brokers: list[tuple[float, float]]
    probes: list[tuple[float, float]]
    samples: list[Sample]
    events: list[tuple[float, str]]
    pairs: Mapping[str, int]
    echoes: int
    healed: int
    restarts: list[float]
    attempts: Mapping[str, int]
    before: Sample | None
    """The agent that was never killed, before the neighbours came."""
    after: Sample | None
    """The same agent, when they had gone."""
    end_seconds: float = 0.0
    left: dict[str, Any] = field(default_factory=dict)
    """Part of the census → (before, after), where they differ."""
    failures: list[str] = field(default_factory=list)
    failed_probes: list[str] = field(default_factory=list)


def during(series: Sequence[tuple[float, float]], phase: Phase) -> list[float]:
    """The milliseconds of the entries that end in a phase, or after it and before the next one."""
    return [value for at, value in series if phase.begin <= at < phase.until]


def findings(outcome: Outcome) -> list[Finding]:
    """Every broken bound."""
    found = []
    log = "the agent's log at these seconds"
    for phase in outcome.phases:
        adds = during(outcome.adds, phase)
        for name, part, bound in (
            ("median", 0.5, MEDIAN_MS),
            ("p99", 0.99, P99_MS),
            ("longest", 1.0, MAX_MS),
        ):
            if adds and (value := quantile(adds, part)) > bound:
                text = (
                    f"{phase.name}: the {name} ADD of the steady pod took {number(value)} ms, over {bound:g}"
                )
                found.append(
                    Finding("stall", text, "what keeps the turn of the CNI socket: cni/agent/server.py")
                )
        if not adds:
            found.append(Finding("stall", f"{phase.name}: the steady pod had no ADD that ended", log))
        for name, series, bound, hint in (
            ("request for fds", outcome.brokers, BROKER_MS, "cni/agent/broker.py"),
            ("probe", outcome.probes, PROBE_MS, "cni/agent/http_server.py"),
        ):
            if (values := during(series, phase)) and max(values) > bound:
                text = f"{phase.name}: the longest {name} took {number(max(values))} ms, over {bound:g}"
                found.append(Finding("stall", text, hint))
    found += [
        Finding("stall", f"an agent was ready only {each:.1f} s after a kill, over {RESTART_SECONDS:g}", log)
        for each in outcome.restarts
        if each > RESTART_SECONDS
    ]
    if outcome.end_seconds > END_SECONDS:
        text = f"the agent ended {outcome.end_seconds:.1f} s after SIGTERM, over {END_SECONDS:g}"
        found.append(Finding("stall", text, "the joins in _run() of cni/agent/__main__.py"))
    found += _growth(outcome)
    found += [
        Finding("leak", f"{name}: {_difference(*both)}", "the reconciler's lines in the agent's log")
        for name, both in outcome.left.items()
    ]
    found += [Finding("failure", each, log) for each in (*outcome.failures, *outcome.failed_probes)]
    return found


def _growth(outcome: Outcome) -> list[Finding]:
    before, after = outcome.before, outcome.after
    if not before or not after:
        return [Finding("failure", "the agent ended without being killed", "the end of its log")]
    grown = (
        ("memory, KiB", after.memory - before.memory, MEMORY_KIB, "tracemalloc in the agent"),
        ("memory at its peak, KiB", after.peak - before.peak, PEAK_KIB, "the request that came then"),
        ("fds", after.fds - before.fds, FDS, "ls -l /proc/PID/fd of the agent"),
        ("threads", after.threads - before.threads, THREADS, "/proc/PID/task of the agent"),
    )
    return [
        Finding("growth", f"the agent's {name}: {value} more than before the neighbours, over {bound}", hint)
        for name, value, bound, hint in grown
        if value > bound
    ]


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return "; ".join(f"{key}: {before.get(key)} → {after.get(key)}" for key in keys[:_SHOWN])
    new = [each for each in after if each not in before]
    gone = [each for each in before if each not in after]
    return f"{len(new)} more: {new[:_SHOWN]}; {len(gone)} fewer: {gone[:_SHOWN]}"


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """The closing table: a name, a value for each phase, the bound."""

    def cells(series: Sequence[tuple[float, float]], part: float) -> tuple[str, ...]:
        values = [during(series, phase) for phase in outcome.phases]
        return tuple(number(quantile(each, part)) if each else "" for each in values)

    def latest(name: str) -> tuple[str, ...]:
        parts = [
            [s for s in outcome.samples if phase.begin <= s.time < phase.end] for phase in outcome.phases
        ]
        return tuple(str(getattr(each[-1], name)) if each else "" for each in parts)

    counts = tuple(str(len(during(outcome.adds, phase))) for phase in outcome.phases)
    return [
        ("steady ADDs", *counts, ""),
        ("ADD, median ms", *cells(outcome.adds, 0.5), f"{MEDIAN_MS:g}"),
        ("ADD, p99 ms", *cells(outcome.adds, 0.99), f"{P99_MS:g}"),
        ("ADD, longest ms", *cells(outcome.adds, 1), f"{MAX_MS:g}"),
        ("fds from the broker, median ms", *cells(outcome.brokers, 0.5), ""),
        ("fds from the broker, longest ms", *cells(outcome.brokers, 1), f"{BROKER_MS:g}"),
        ("probe, median ms", *cells(outcome.probes, 0.5), ""),
        ("probe, longest ms", *cells(outcome.probes, 1), f"{PROBE_MS:g}"),
        ("agent's memory, KiB", *latest("memory"), ""),
        ("agent's memory at its peak, KiB", *latest("peak"), ""),
        ("agent's fds", *latest("fds"), ""),
        ("agent's threads", *latest("threads"), ""),
    ]


def document(outcome: Outcome) -> dict[str, Any]:
    """The outcome for programs."""
    names = ("memory", "peak", "fds", "threads")
    return {
        "seed": outcome.seed,
        "seconds": round(outcome.phases[-1].end - outcome.phases[0].begin, 1),
        "pairs": dict(outcome.pairs),
        "echoes": outcome.echoes,
        "healed": outcome.healed,
        "kills": dict(Counter(name for _, name in outcome.events)),
        "attempts": dict(outcome.attempts),
        "restarts": [round(each, 2) for each in outcome.restarts],
        "table": {name: values for name, *values in rows(outcome)},
        "phases": [phase.name for phase in outcome.phases],
        "agent": {
            when: {name: getattr(sample, name) for name in names}
            for when, sample in (("before", outcome.before), ("after", outcome.after))
            if sample
        },
        "end seconds": round(outcome.end_seconds, 2),
        "findings": [vars(each) for each in findings(outcome)],
    }
