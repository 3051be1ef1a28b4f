"""The pods of a soak: each attaches, checks that frames flow, and detaches, again and again.

A Steady pod is well-behaved, and its calls are measured. A Troubled pod has a new namespace each time, and something of
it is killed. Must not judge what takes how long.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab.assets.cache import CHECKOUT
from lab.process import Closing
from lab.soak.scene import Attachment
from lab.wire import Netns, in_namespaces

if TYPE_CHECKING:
    from pathlib import Path

    from lab.soak.scene import Answer, Scene

_PAUSE_SECONDS = 0.08
"""Between two attachments: a namespace may connect to the broker 20 times a second."""
_TRIES = 5
_CONFIG = {"cniVersion": "1.1.0", "name": "soak", "type": "vmtap"}
STEADY = {**_CONFIG, "interface": "wire", "device": "macvtap", "mode": "bridge"}
KINDS = (
    STEADY,
    {**_CONFIG, "interface": "wire", "device": "macvtap", "mode": "vepa", "ipam": {"type": "soak-ipam"}},
    {**_CONFIG, "interface": "bridge", "device": "tap", "mode": "bridge", "ipam": {"type": "soak-ipam"}},
)
FAULTS = {"": 8, "shim of ADD": 3, "shim of DEL": 2, "pod's process": 3, "delegate": 3, "namespace": 4}
"""Fault → how often, in proportion."""


@dataclass
class Journal:
    """What happened, by the clock of time.monotonic(). Lists are appended to by many threads."""

    begin: float = field(default_factory=time.monotonic)
    adds: list[tuple[float, float]] = field(default_factory=list)
    """The steady pod's ADDs, also those that a kill ended: end, milliseconds without the time in which no agent ran."""
    brokers: list[tuple[float, float]] = field(default_factory=list)
    """Its requests for fds."""
    events: list[tuple[float, str]] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=lambda: {"steady": 0, "troubled": 0})
    echoes: int = 0
    """Attachments that a frame went to the peer and back on."""
    healed: int = 0
    """Steps that failed because the agent was killed, and succeeded when repeated."""
    failures: list[str] = field(default_factory=list)

    def event(self, name: str) -> None:
        self.events.append((time.monotonic(), name))

    def fail(self, text: str) -> None:
        self.failures.append(f"{time.monotonic() - self.begin:.1f} s: {text}")


class Launcher(Closing):
    """launcher.py, started when it is needed."""

    def __init__(self, scene: Scene) -> None:
        argv = [sys.executable, "-m", "lab.soak.launcher", str(scene.broker), scene.peer_mac]
        self._argv = argv
        self._process: subprocess.Popen[str] | None = None

    def ask(self, command: str) -> str | None:
        """Why a command failed; None if it did not."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        error = json.loads(line).get("error") if line else "the launcher ended"
        return str(error) if error else None

    def close(self) -> None:
        """Kills it."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Pod(threading.Thread):
    """Attaches until its event `stop`; a failure of this program itself ends in the journal, too."""

    def __init__(self, scene: Scene, journal: Journal, name: str) -> None:
        super().__init__(name=name)
        self.scene, self.journal, self.stop = scene, journal, threading.Event()
        self.pause = threading.Lock()
        """Held during each pair; whoever holds it keeps the pod from beginning another."""
        self.number = 0

    def run(self) -> None:
        try:
            with Launcher(self.scene) as self.launcher:
                while not self.stop.is_set():
                    self.number += 1
                    with self.pause:
                        self.pair()
                    self.stop.wait(_PAUSE_SECONDS)
        except Exception as error:
            self.journal.fail(f"{self.name}: the soak itself failed: {error!r}")

    def pair(self) -> None:
        """One attachment, from ADD to DEL."""
        raise NotImplementedError

    def flows(self, attachment: Attachment) -> bool:
        """Whether frames flow on an attachment that has been made; notes a failure. The fds are left open."""
        begin, outage = time.monotonic(), False
        for _ in range(_TRIES):
            why = self.launcher.ask(f"open {attachment.netns}")
            end = time.monotonic()
            outage, away = self.scene.outages(begin, end)
            if not why:
                self._measured(self.journal.brokers, end, end - begin - away)
                break
            if not outage:
                break
            self.journal.healed += 1
            self.launcher.close()  # as a launcher ends that got nothing: the agent may have noted it as a holder
            self.scene.wait_for_agent()
            begin = time.monotonic()
        why = why or self.launcher.ask(f"echo {attachment.container}")
        if why:
            self.journal.fail(f"{attachment.container}: ADD succeeded, but {why}")
        else:
            self.journal.echoes += 1
        return not why

    def detach(self, attachment: Attachment) -> None:
        """DEL, which must succeed, and leave no link in the pod unless the agent was away."""
        answer = self.scene.call("DEL", attachment)
        if answer.status:
            self.journal.fail(f"{attachment.container}: DEL: {answer.document or answer.status}")
        elif not self.scene.outages(answer.begin, answer.end)[0] and (left := links(attachment.netns)):
            self.journal.fail(f"{attachment.container}: DEL succeeded, but the pod has {sorted(left)}")

    def _measured(self, series: list[tuple[float, float]], end: float, seconds: float) -> None:
        """Notes what the steady pod's call took."""


class Steady(Pod):
    """One namespace, to which nothing happens. keep: whether its first attachment stays until the end."""

    def __init__(self, scene: Scene, journal: Journal, name: str, *, keep: bool = False) -> None:
        super().__init__(scene, journal, name)
        self.netns = scene.lab.pod(name)
        self._keep = keep

    def pair(self) -> None:
        attachment = Attachment(self.netns.path, f"{self.name}-{self.number}", STEADY)
        made = self._add(attachment)
        if made and self.flows(attachment):
            if self._keep:
                self._hold(attachment)
            checked = self.scene.call("CHECK", attachment, config={**STEADY, "prevResult": made.document})
            if checked.status and not self.scene.outages(checked.begin, checked.end)[0]:
                self.journal.fail(f"{attachment.container}: CHECK: {checked.document}")
        self.launcher.ask("close")
        self.detach(attachment)
        if made:
            self.journal.pairs["steady"] += 1

    def _add(self, attachment: Attachment) -> Answer | None:
        """ADD, repeated after a DEL where the agent was killed, as a runtime does."""
        for _ in range(_TRIES):
            answer = self.scene.call("ADD", attachment)
            outage, away = self.scene.outages(answer.begin, answer.end)
            self._measured(self.journal.adds, answer.end, answer.end - answer.begin - away)
            if not answer.status:
                return answer
            if not outage:
                break
            self.journal.healed += 1
            self.detach(attachment)
        self.journal.fail(f"{attachment.container}: ADD: {answer.document}")
        return None

    def _hold(self, attachment: Attachment) -> None:
        """Sends frames on the attachment until the end, whatever happens to the agent meanwhile."""
        while not self.stop.wait(0.5):
            if why := self.launcher.ask(f"echo {attachment.container}"):
                self.journal.fail(f"{attachment.container}: attached all the time, but {why}")

    def _measured(self, series: list[tuple[float, float]], end: float, seconds: float) -> None:
        if not self._keep:
            series.append((end, seconds * 1000))


class Troubled(Pod):
    """A new namespace for each attachment. faults: whether something of it is killed, by the seed."""

    def __init__(self, scene: Scene, journal: Journal, name: str, seed: int) -> None:
        super().__init__(scene, journal, name)
        self.faults = False
        self._random = random.Random(f"{name} {seed}")  # noqa: S311 - to be repeated

    def pair(self) -> None:
        config = self._random.choice(KINDS)
        fault = self._random.choices(list(FAULTS), list(FAULTS.values()))[0] if self.faults else ""
        moment = self._random.uniform(0, 0.06 if "ipam" in config else 0.004)
        with Netns("soak") as netns:
            attachment = Attachment(netns.path, f"{self.name}-{self.number}", config)
            if self._attached(attachment, fault, moment):
                self.flows(attachment)
            if fault == "namespace":
                self.journal.event(fault)
                netns.close()
            if fault == "pod's process":
                self.journal.event(fault)
                self.launcher.close()
            self.launcher.ask("close")
            if fault == "namespace":
                return
            if fault == "shim of DEL":
                self.journal.event(fault)
                self.scene.begin("DEL", attachment).end(kill_after=moment)
            self.detach(attachment)
            self.journal.pairs["troubled"] += 1

    def _attached(self, attachment: Attachment, fault: str, moment: float) -> bool:
        call = self.scene.begin("ADD", attachment)
        if fault == "shim of ADD":
            self.journal.event(fault)
            return not call.end(kill_after=moment).status
        killed = False
        if fault == "delegate" and "ipam" in attachment.config:
            until = time.monotonic() + 1
            while not (killed := self.scene.kill_delegate(attachment.container)) and time.monotonic() < until:
                time.sleep(0.002)
            if killed:
                self.journal.event(fault)
        answer = call.end()
        if answer.status and not killed and not self.scene.outages(answer.begin, answer.end)[0]:
            self.journal.fail(f"{attachment.container}: ADD: {answer.document}")
        return not answer.status


def links(netns: Path) -> set[str]:
    """The links of a namespace that a pod may have had of an attachment."""
    names = in_namespaces([netns], socket.if_nameindex)
    return {name for _, name in names if name.startswith("net")}
