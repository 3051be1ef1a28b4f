"""A real agent on the lab's node, and the shim that asks it, each with a run folder of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

import cni
from lab.wire import Netns
from tests.runner import Answer, Plugin
from tests.waiting import LIMIT, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.runtimes.machine import Machine
    from lab.wire import Lab

SHIM = Path(cni.__file__).parent / "shim" / "vmtap"
"""As the package's build made it."""


@dataclass
class Agent:
    """One vmtapd: start it, ask it through the shim, kill it, start it again."""

    node: Netns | Machine
    run: Path
    """As the node has it."""
    policy: Path
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """A command that runs the agent, such as setpriv(1) with its options."""
    process: subprocess.Popen[str] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> Self:
        """Returns when the agent says that it is ready."""
        argv: list[str | Path] = [
            *self.prefix,
            sys.executable,
            "-m",
            "cni.agent",
            "--run",
            self.run,
            "--policy",
            self.policy,
            "--metrics",
            "",
            "--health",
            "",
            *self.flags,
        ]
        # What the tests' own gRPC was told is not for the agent's.
        env = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")} | self.env
        self.process = self.node.popen(argv, stderr=subprocess.PIPE, text=True, env=env)
        self.wait_for("ready")
        return self

    def wait_for(self, msg: str) -> dict[str, Any]:
        """The next log line with that msg; fails the test if the agent ends first, or is too slow (and is killed)."""
        assert self.process
        assert self.process.stderr
        with watched(self.process):
            for line in self.process.stderr:
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.log.append({"msg": line})
                if self.log[-1]["msg"] == msg:
                    return self.log[-1]
        raise AssertionError(f"the agent ended without saying {msg!r}: {self.log[-5:]}")

    def said(self, msg: str) -> dict[str, Any]:
        """The first log line with that msg, which may have come before "ready"; waits for it as wait_for() does."""
        return next((line for line in self.log if line["msg"] == msg), None) or self.wait_for(msg)

    @property
    def port(self) -> int:
        """Of its server of metrics; for an agent with a flag --metrics 127.0.0.1:0."""
        return self._port("metrics")

    def _port(self, server: str) -> int:
        return int(next(line["port"] for line in reversed(self.log) if line["msg"] == server))

    def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        """(status, content type, body) of its HTTP server for the path."""
        port = self._port("metrics" if path == "/metrics" else "health")

        def ask() -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
            with closing(connection):
                connection.request(method, path)
                answer = connection.getresponse()
                return answer.status, answer.headers["Content-Type"], answer.read().decode()

        return self.node.call(ask)

    @contextmanager
    def stopped(self) -> Iterator[subprocess.Popen[str]]:
        """None of its threads runs in the block. A signal alone would let one that is waking up go on for a moment."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
            yield self.process
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; its exit status."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.stderr
        with watched(self.process), self.process:
            rest = self.process.stderr.read()  # not communicate(), which loses what wait_for() has read ahead
        self.log += [
            json.loads(line) if line.startswith("{") else {"msg": line} for line in rest.splitlines()
        ]
        status, self.process = self.process.returncode, None
        return status

    def shim(self, *, wait: int = 5, name: str = "vmtap") -> Shim:
        """The plugin as a runtime on this node sees it."""
        assert isinstance(self.node, Netns)  # on a machine, its runtime calls the shim
        executable = SHIM
        if name != SHIM.name:
            executable = self.run / name
            executable.parent.mkdir(exist_ok=True)
            executable.unlink(missing_ok=True)
            executable.symlink_to(SHIM)
        return Shim(
            node=self.node,
            state=self.run,
            policy=self.policy,
            executable=str(executable),
            env={"VMTAP_RUN": str(self.run), "VMTAP_WAIT": str(wait)},
        )


class Shim(Plugin):
    """Runs the static executable instead of the console script."""

    def argv(self) -> list[str]:
        """Not in the node's namespace: the agent is there, and it is the one that needs to be."""
        return [self.executable]

    def run(self, command: str, stdin: bytes, env: dict[str, str]) -> Answer:
        """The bare executable with exactly that environment."""
        done = subprocess.run(
            self.argv(),
            input=stdin,
            env={"CNI_COMMAND": command, **env},
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    """An agent, started. Whatever the test did to it, it is ended."""
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml")
    yield made.start()
    if made.process:
        made.end()
