"""Measurements on the node: calls one by one, many at once, on a crowded NIC, and for long; the launcher's start.

Every round has all contenders, and each round begins with another one, so that a slow machine slows all of them.
Must not judge: figures.py and report.py do.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lab.assets.programs import BENCH
from lab.bench.contenders import (
    AGENT,
    AGENT_BRIDGED,
    AGENT_CHECKED,
    AGENT_DEVICE,
    AGENT_GUARDED,
    AGENT_TAP,
    AGENT_VLAN,
    BIN,
    GO_TAP,
    KERNEL,
    ONE_SHOT,
    Agent,
    Place,
    Sample,
)
from lab.bench.figures import WIDE, percent
from lab.bench.spawn import Job
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lab.bench.contenders import Contender, Floor
    from lab.bench.figures import Spread
    from lab.bench.spawn import Spawner
    from lab.wire import Netns

T = TypeVar("T")

COMMANDS = ("ADD", "DEL")
_POPULATE_AT_ONCE = 25
_KINDS = (AGENT_CHECKED, AGENT_GUARDED, AGENT_BRIDGED, AGENT_VLAN, AGENT_DEVICE)
"""Contenders that are measured in one call at a time only."""
_UNCROWDED = (*_KINDS, AGENT_TAP, GO_TAP)
"""Contenders that are left out on a crowded NIC."""

Samples = dict[str, dict[str, list[Sample]]]
"""Contender → command → a sample for each round."""


@dataclass(frozen=True)
class Extent:
    """The numbers of rounds and calls of a run."""

    rounds: int
    traced: int
    """ADDs whose system calls are counted."""
    at_once: int
    at_once_rounds: int
    crowds: tuple[int, ...]
    crowd_rounds: int
    pairs: int
    launches: int
    frame_rounds: int
    frames: int
    emulated_rounds: int
    """0: no machine with SR-IOV NICs is started."""
    guest_rounds: int
    guest_seconds: float
    quiet_seconds: float
    """How long to wait for a quiet machine at most."""
    tries: int
    """How often a step is measured whose figures spread too much, at most."""


FULL = Extent(
    rounds=100,
    traced=100,
    at_once=100,
    at_once_rounds=10,
    crowds=(0, 100, 500, 1000),
    crowd_rounds=40,
    pairs=10_000,
    launches=30,
    frame_rounds=20,
    frames=20_000,
    emulated_rounds=30,
    guest_rounds=5,
    guest_seconds=2.0,
    quiet_seconds=300.0,
    tries=3,
)
QUICK = Extent(
    rounds=12,
    traced=10,
    at_once=100,
    at_once_rounds=2,
    crowds=(0, 100),
    crowd_rounds=8,
    pairs=500,
    launches=5,
    frame_rounds=2,
    frames=4_000,
    emulated_rounds=0,
    guest_rounds=1,
    guest_seconds=1.0,
    quiet_seconds=5.0,
    tries=1,
)


@dataclass
class Soak:
    """An agent's memory during ADDs and DELs: (pairs so far, resident KiB)."""

    resident: list[tuple[int, int]] = field(default_factory=list)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order in each round; it rotates, so that each name comes first equally often."""
    for number in range(rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def steadied(
    tries: int,
    measure: Callable[[], T],
    figures: Callable[[T], Sequence[Spread]],
    progress: Callable[[str], None],
) -> T:
    """Measures again while a figure spreads too much (WIDE), as many tries as given at most.

    Returns the try whose widest figure is the narrowest.
    """
    best: tuple[float, T] | None = None
    for number in range(1, tries + 1):
        measured = measure()
        width = max(each.width for each in figures(measured))
        if best is None or width < best[0]:
            best = (width, measured)
        if best[0] <= WIDE:
            break
        progress(f"p10 to p90 of a figure was {percent(width)} of its median in try {number} of {tries}")
    assert best
    return best[1]


def container(name: str) -> str:
    """The container id in a contender's calls, which finds them in the agent's log."""
    return "bench-" + re.sub("[^a-z]+", "-", name).strip("-")


def one_by_one(
    spawner: Spawner, every: Mapping[str, Contender], floor: Floor, pod: Netns, rounds: int
) -> Samples:
    """An ADD and a DEL of each contender in each round. A first round is not counted: its caches are cold."""
    names = [*every, KERNEL]
    samples: Samples = {name: {command: [] for command in COMMANDS} for name in names}
    places = {name: Place(pod.path, container(name)) for name in every}
    for number, order in enumerate(turns(names, rounds + 1)):
        for name in order:
            for command in COMMANDS:
                sample = (
                    floor.call(command)
                    if name == KERNEL
                    else every[name].call(spawner, command, [places[name]])
                )
                if number:
                    samples[name][command].append(sample)
    return samples


def empty_processes(spawner: Spawner, rounds: int) -> list[Sample]:
    """A static program that does nothing, for each round."""
    outcomes = [spawner.run([Job([str(BENCH.get() / "moment")], {})])[0] for _ in range(rounds)]
    return [Sample((each.end - each.begin) / 1e6, each.cpu / 1e6, each.peak) for each in outcomes]


def at_once(spawner: Spawner, every: Mapping[str, Contender], pods: Sequence[Netns], rounds: int) -> Samples:
    """An ADD in each pod, all at once, then a DEL. The one-shot takes seconds: it is in the first round only."""
    every = {name: each for name, each in every.items() if name not in _KINDS}
    places = [Place(pod.path, f"bench-many-{number:04}") for number, pod in enumerate(pods)]
    samples: Samples = {name: {command: [] for command in COMMANDS} for name in every}
    for number, order in enumerate(turns(list(every), rounds)):
        for name in order:
            if name != ONE_SHOT or number == 0:
                for command in COMMANDS:
                    samples[name][command].append(every[name].call(spawner, command, places))
    return samples


def crowded(
    spawner: Spawner,
    every: Mapping[str, Contender],
    floor: Floor,
    pod: Netns,
    pods: Sequence[Netns],
    *,
    extent: Extent,
    progress: Callable[[str], None],
) -> dict[int, Samples]:
    """one_by_one() with each number of attachments on the NIC. The agent makes them, spread over the pods."""
    compared = {name: each for name, each in every.items() if name not in _UNCROWDED}
    crowd = [
        Place(pods[number % len(pods)].path, f"bench-crowd-{number:05}", f"c{number // len(pods)}")
        for number in range(max(extent.crowds))
    ]
    seen: dict[int, Samples] = {}
    there = 0
    for size in extent.crowds:
        progress(f"{size} attachments already there")
        _in_parts(spawner, every[AGENT], "ADD", crowd[there:size])
        there = size
        seen[size] = one_by_one(spawner, compared, floor, pod, extent.crowd_rounds)
    progress("DEL of them")
    _in_parts(spawner, every[AGENT], "DEL", crowd[:there])
    return seen


def _in_parts(spawner: Spawner, contender: Contender, command: str, places: Sequence[Place]) -> None:
    for at in range(0, len(places), _POPULATE_AT_ONCE):
        contender.call(spawner, command, places[at : at + _POPULATE_AT_ONCE])


def soak(
    spawner: Spawner, contender: Contender, pods: Sequence[Netns], pairs: int, progress: Callable[[str], None]
) -> Soak:
    """So many pairs of ADD and DEL, a few at once; returns the agent's memory over time."""
    agent = contender.agent
    if agent is None:
        raise LabError(f"{contender.name} has no agent whose memory could grow")
    places = [Place(pod.path, f"bench-soak-{number}") for number, pod in enumerate(pods)]
    seen = Soak([(0, agent.memory())])
    step = max(1, pairs // 40)
    done, noted = 0, 0
    while done < pairs:
        for command in COMMANDS:
            contender.call(spawner, command, places)
        done += len(places)
        if done - noted >= step or done >= pairs:
            noted = done
            seen.resident.append((done, agent.memory()))
            progress(f"{done} of {pairs} pairs, {seen.resident[-1][1] / 1024:.1f} MB")
    return seen


def launches(spawner: Spawner, contender: Contender, agent: Agent, pod: Netns, count: int) -> list[float]:
    """The time from the launcher's start to its exec, in milliseconds. It execs moment.c, which prints the time."""
    place = Place(pod.path, "bench-launch")
    contender.call(spawner, "ADD", [place])
    taken = []
    with tempfile.TemporaryDirectory(prefix=f"vmtap-bench-{os.getpid()}-", dir="/run") as folder:
        Path(folder).chmod(0o755)  # for the launcher's unprivileged user
        program = shutil.copy(BENCH.get() / "moment", folder)
        env = {"PATH": os.environ["PATH"], "VMTAP_RUN": str(agent.run)}
        job = Job([str(BIN / "vmtap-launch"), "--netns", str(pod.path), "--", program], env)
        for _ in range(count):
            (outcome,) = spawner.run([job])
            if outcome.status != 0:
                raise spawner.failure("vmtap-launch", outcome)
            taken.append((int(outcome.stdout) - outcome.begin) / 1e6)
    contender.call(spawner, "DEL", [place])
    return taken
