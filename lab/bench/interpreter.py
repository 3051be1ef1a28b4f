"""What Python costs: the parts of a one-shot's time before it works, and the parts of an agent's memory.

A part is a process that imports what the part before it imports, and more; the difference is what the part costs.
Must not judge.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.bench.contenders import Sample
from lab.bench.spawn import Job
from lab.process import PATIENCE

if TYPE_CHECKING:
    from lab.bench.contenders import Agent
    from lab.bench.spawn import Spawner

BARE = "python3 -I -S, which does nothing"
LIBRARY = "site and the modules of the standard library"
MODULES = "vmtap's modules"
YAML = "PyYAML, which reads the policy"
GRPC = "gRPC, protobuf, the device plugin's modules"

_ONE_SHOT = "from cni.__main__ import run"
_AGENT = "from cni.agent.__main__ import main"
_DEVICES = "from cni.agent import local_grpc; local_grpc.load(); import cni.agent.deviceplugin.offering"


@dataclass(frozen=True)
class Memory:
    """Resident memory in KiB (proc(5)): own is RssAnon, files is RssFile, which processes share."""

    own: int
    files: int

    @property
    def total(self) -> int:
        return self.own + self.files


def of(agent: Agent) -> Memory:
    """The memory of a running agent. Raises LabError if it has ended."""
    return Memory(agent.memory("RssAnon"), agent.memory("RssFile"))


def starts(spawner: Spawner, rounds: int) -> dict[str, list[Sample]]:
    """The start of a one-shot up to each part, for each round. A first round is not counted: its caches are cold."""
    library = _library(_ONE_SHOT)
    parts = {BARE: _argv("", bare=True), LIBRARY: _argv(library), MODULES: _argv(f"{library}; {_ONE_SHOT}")}
    samples: dict[str, list[Sample]] = {part: [] for part in parts}
    for number in range(rounds + 1):
        for part, argv in parts.items():
            (outcome,) = spawner.run([Job(argv, {"PATH": os.environ["PATH"]})])
            if outcome.status != 0:
                raise spawner.failure(part, outcome)
            if number:
                wall = (outcome.end - outcome.begin) / 1e6
                samples[part].append(Sample(wall, outcome.cpu / 1e6, outcome.peak))
    return samples


def memory() -> dict[str, Memory]:
    """The memory of a process up to each part. The parts are those of an agent, and GRPC the device plugin's."""
    library = _library(_AGENT)
    imports = [library, _AGENT, "import yaml", _DEVICES]
    parts = {BARE: _resident("", bare=True)}
    for number, part in enumerate((LIBRARY, MODULES, YAML, GRPC), 1):
        parts[part] = _resident("; ".join(imports[:number]))
    return parts


def _library(statement: str) -> str:
    """An import of the modules of the standard library that the statement loads."""
    names = _output(f"import sys; {statement}; print(*sys.modules)").split()
    return "import " + ", ".join(
        name for name in names if name.partition(".")[0] in sys.stdlib_module_names and name != "__main__"
    )


def _resident(statement: str, *, bare: bool = False) -> Memory:
    text = _output(f"{statement}\nprint(open('/proc/self/status').read())", bare=bare)
    found = {name: int(kib) for name, kib in re.findall(r"^(Rss\w+):\s*(\d+) kB$", text, re.MULTILINE)}
    return Memory(found["RssAnon"], found["RssFile"])


def _argv(statement: str, *, bare: bool = False) -> list[str]:
    """The command line of a process that ends as the one-shot does."""
    flags = ["-I", "-S"] if bare else []
    return [sys.executable, *flags, "-c", f"{statement}\nimport posix; posix._exit(0)"]


def _output(code: str, *, bare: bool = False) -> str:
    flags = ["-I", "-S"] if bare else []
    argv = [sys.executable, *flags, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout
