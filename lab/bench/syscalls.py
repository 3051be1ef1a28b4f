"""How many system calls an ADD makes, in the shim and in the agent: counted by strace(1), apart from all timing."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lab.bench.contenders import Place
from lab.process import PATIENCE, LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.bench.contenders import Agent, Contender
    from lab.bench.spawn import Spawner
    from lab.wire import Netns


_WAITS = {"futex", "sched_yield"}
"""Waits of threads for each other, which strace's slowness multiplies."""
_STRACE = ("/usr/bin/strace", "-f", "-c", "-U", "calls,name", "-o")


@dataclass(frozen=True)
class Calls:
    """System calls of one ADD, by name; a part of one where not every ADD makes it."""

    shim: dict[str, float]
    agent: dict[str, float]


def count(spawner: Spawner, contender: Contender, agent: Agent, pods: Sequence[Netns]) -> Calls:
    """The mean of one ADD in each pod. Raises LabError."""
    places = [Place(pod.path, "bench-calls") for pod in pods]
    with tempfile.TemporaryDirectory() as folder:
        summaries = [Path(folder) / name for name in ("shim", "agent")]
        shim = replace(contender, before=(*_STRACE, str(summaries[0])))
        shim.call(spawner, "ADD", places[:1])
        contender.call(spawner, "DEL", places[:1])
        contender.call(spawner, "ADD", places[:1])  # warm
        contender.call(spawner, "DEL", places[:1])
        argv = [*_STRACE, str(summaries[1]), "-p", str(agent.pid)]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr
            if "attached" not in (line := tracer.stderr.readline()):
                raise LabError(f"strace cannot attach to vmtapd: {line.strip()}")
            for place in places:
                contender.call(spawner, "ADD", [place])
            tracer.send_signal(signal.SIGINT)  # it detaches, and writes its summary
            tracer.communicate(timeout=PATIENCE)
        for place in places:
            contender.call(spawner, "DEL", [place])
        own, agents = (parse(path.read_text()) for path in summaries)
    return Calls(
        {name: float(calls) for name, calls in own.items()},
        {name: calls / len(places) for name, calls in agents.items()},
    )


def parse(summary: str) -> dict[str, int]:
    """Name → number of calls, without _WAITS, from the output of `strace -c -U calls,name`."""
    lines = re.findall(r"^\s*(\d+) (\w+)$", summary, re.MULTILINE)
    return {name: int(calls) for calls, name in lines if name != "total" and name not in _WAITS}
