"""One soak, from the lab's first namespace to the verdict."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from lab.assets.cache import CACHE, CHECKOUT
from lab.process import Closing, LabError
from lab.soak import chart, report
from lab.soak.pods import STEADY, Journal, Steady, Troubled
from lab.soak.report import Outcome, Phase
from lab.soak.scene import HEALTH, METRICS, SHIM, Attachment, Scene
from lab.soak.watch import Watch, census, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.soak.pods import Pod
    from lab.soak.watch import Sample

NEIGHBOURS = ("linger", "fds", "slow", "http", "config")
PHASES = (("alone", 0.25), ("neighbours", 0.4), ("agent killed", 0.35))
"""Name and part of the run. Pods are troubled from the second on, the agent is killed in the third."""
_TROUBLED = 2
_WARM_SECONDS = 2.0
_SETTLE_SECONDS = 2.0
"""Until what a request leaves behind it in the agent has ended: a thread in RTM_DELLINK, an idle connection."""
_CLEAN_SECONDS = 60.0
"""The longest wait until nothing is left: pending DELs, and runs of the reconciler."""
_KILL_SECONDS = (1.5, 6.0)
"""From one kill of the agent to the next."""
_PROGRESS_SECONDS = 5.0


class Neighbours(Closing):
    """The programs of neighbours.py. names: those to start."""

    def __init__(self, scene: Scene, names: Sequence[str], seed: int) -> None:
        self._programs: dict[str, subprocess.Popen[str]] = {}
        self.attempts: dict[str, int] = {}
        self._readers: list[threading.Thread] = []
        for name in names:
            pod = scene.lab.node if name == "http" else scene.lab.pod(name)
            arguments = {"http": [str(HEALTH), str(METRICS)], "config": [str(SHIM), str(seed)]}
            argv = [
                sys.executable,
                "-m",
                "lab.soak.neighbours",
                name,
                *arguments.get(name, [str(scene.broker)]),
            ]
            env = dict(os.environ)
            if name == "config":
                env |= scene.env(Attachment(pod.path, "", STEADY))
                program = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, env=env)
            else:
                program = pod.popen(argv, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, env=env)
            self._programs[name] = program
            self._readers.append(threading.Thread(target=self._count, args=(name, program)))
            self._readers[-1].start()

    def _count(self, name: str, program: subprocess.Popen[str]) -> None:
        assert program.stdout
        for line in program.stdout:
            self.attempts[name] = int(line) + 1

    def close(self) -> None:
        for program in self._programs.values():
            program.kill()
            program.wait()
        for reader in self._readers:
            reader.join()
        for program in self._programs.values():
            assert program.stdout
            program.stdout.close()


class Run:
    """The parts of one soak, which is measured by measure()."""

    def __init__(self, scene: Scene, journal: Journal, options: argparse.Namespace, console: Console) -> None:
        self.scene, self.journal, self.options, self._console = scene, journal, options, console
        self.steady = [Steady(scene, journal, "steady"), Steady(scene, journal, "kept", keep=True)]
        self.troubled = [
            Troubled(scene, journal, f"troubled{number}", options.seed) for number in range(_TROUBLED)
        ]
        self.watch = Watch(scene, min(0.5, options.seconds / 200))
        self._random = random.Random(f"agent {options.seed}")  # noqa: S311 - to be repeated

    def measure(self) -> Outcome:
        """The whole run. Nothing of it is left but the lab and the agent."""
        scene, journal = self.scene, self.journal
        netns = [each.netns for each in self.steady]
        self._warm_up()
        clean = census(scene, netns)
        phases: list[Phase] = []
        threads: list[Pod | Watch] = [*self.steady, *self.troubled, self.watch]
        with contextlib.ExitStack() as stack:
            for thread in threads:
                thread.start()
                stack.callback(thread.join)
                stack.callback(thread.stop.set)
            phases.append(self._phase(*PHASES[0]))
            before = self._settled()
            for pod in self.troubled:
                pod.faults = True
            with Neighbours(scene, self.options.neighbours, self.options.seed) as neighbours:
                phases.append(self._phase(*PHASES[1]))
            after = self._settled()
            attempts = dict(neighbours.attempts)
            with Neighbours(scene, self.options.neighbours, self.options.seed + 1) as neighbours:
                phases.append(self._phase(*PHASES[2], kill=True))
            attempts = {name: attempts.get(name, 0) + more for name, more in neighbours.attempts.items()}
        left = self._left(clean)
        begin = time.monotonic()
        scene.agent.kill(signal.SIGTERM)
        return Outcome(
            seed=self.options.seed,
            phases=[
                *(replace(phase, until=later.begin) for phase, later in pairwise(phases)),
                phases[-1],
            ],
            adds=journal.adds,
            brokers=journal.brokers,
            probes=self.watch.probes,
            samples=self.watch.samples,
            events=journal.events,
            pairs=journal.pairs,
            echoes=journal.echoes,
            healed=journal.healed,
            restarts=scene.restarts,
            attempts=attempts,
            before=before,
            after=after if before and after and before.pid == after.pid else None,
            end_seconds=time.monotonic() - begin,
            left=left,
            failures=journal.failures,
            failed_probes=self.watch.failed,
        )

    def _warm_up(self) -> None:
        """Has the agent load what a refusal and a delegate need, and makes the folders of its state."""
        wrong = Attachment(self.steady[0].netns.path, "warm", {**STEADY, "moode": 1})
        until = time.monotonic() + min(_WARM_SECONDS, self.options.seconds / 4)
        while time.monotonic() < until:
            self.scene.call("ADD", wrong)
            right = Attachment(self.steady[0].netns.path, "warm", {**STEADY, "ipam": {"type": "soak-ipam"}})
            for command in ("ADD", "DEL"):
                if (answer := self.scene.call(command, right)).status:
                    raise LabError(f"{command}: {answer.document}")
        time.sleep(_SETTLE_SECONDS)

    def _phase(self, name: str, part: float, *, kill: bool = False) -> Phase:
        begin = time.monotonic()
        end = begin + self.options.seconds * part
        told = begin
        next_kill = begin + self.options.seconds * part / 10 if kill else end
        while (now := time.monotonic()) < end:
            if now >= next_kill:
                self.scene.kill_agent()
                next_kill = time.monotonic() + self._random.uniform(*_KILL_SECONDS)
            if now - told >= _PROGRESS_SECONDS:
                told = now
                self._tell(name, now)
            time.sleep(max(0.0, min(0.1, end - time.monotonic())))
        return Phase(name, begin, time.monotonic())

    def _tell(self, phase: str, now: float) -> None:
        journal, last = self.journal, self.journal.adds[-1:] or [(now, 0.0)]
        memory = self.watch.samples[-1].memory / 1024 if self.watch.samples else 0
        self._console.print(
            f"[dim]{now - journal.begin:6.0f} s[/] {phase:13} {sum(journal.pairs.values()):6} pairs, "
            f"last ADD {last[0][1]:.1f} ms {now - last[0][0]:.1f} s ago, agent {memory:.0f} MB, "
            f"{len(journal.events)} killed, {len(journal.failures) + len(self.watch.failed)} failures"
        )

    def _settled(self) -> Sample | None:
        """The agent while no pod comes or goes, once what was started before has ended in it."""
        with contextlib.ExitStack() as stack:
            for pod in (self.steady[0], *self.troubled):
                stack.enter_context(pod.pause)
            time.sleep(_SETTLE_SECONDS)
            return look(self.scene.agent.pid)

    def _left(self, clean: dict[str, Any]) -> dict[str, Any]:
        """What differs from a census before the run, once the reconciler has had the time to end it."""
        until = time.monotonic() + _CLEAN_SECONDS
        while True:
            now = census(self.scene, [each.netns for each in self.steady])
            different = {key: (clean[key], now[key]) for key in clean if now[key] != clean[key]}
            if not different or time.monotonic() > until:
                return different
            time.sleep(0.5)


def _print(outcome: Outcome, found: Sequence[report.Finding]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    table = Table(box=box.ASCII)
    for head in ("", *(phase.name for phase in outcome.phases), "bound"):
        table.add_column(head, no_wrap=True, justify="right" if head else "left")
    for row in report.rows(outcome):
        table.add_row(*row)
    console.print(table)
    document = report.document(outcome)
    for name in ("pairs", "echoes", "healed", "kills", "attempts"):
        console.print(f"{name}: {document[name]}")
    for each in found:
        console.print(f"✗ {each.kind}: {each.text}\n    look at {each.hint}", markup=False)
    console.print("no bound is broken, and nothing is left" if not found else f"{len(found)} findings")


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.soak", description="Pods come and go while programs are killed beside them."
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="default: %(default)g; at least 4")
    parser.add_argument(
        "--seed", type=int, help="of what is killed and sent; default: a random one, which is printed"
    )
    parser.add_argument(
        "--neighbours",
        default=",".join(NEIGHBOURS),
        metavar="NAME,…",
        help='the hostile ones; default: %(default)s; "" for none',
    )
    parser.add_argument("--out", type=Path, default=CACHE / "soak", help="folder of soak.svg and agent.log")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    options = parser.parse_args()
    options.neighbours = [name for name in options.neighbours.split(",") if name]
    if unknown := set(options.neighbours) - set(NEIGHBOURS):
        parser.error(f"--neighbours {', '.join(unknown)}: there are {', '.join(NEIGHBOURS)}")
    if not 4 <= options.seconds <= 7 * 86400:
        parser.error("--seconds must be from 4 to 604800")
    if options.seed is None:
        options.seed = random.randrange(1 << 16)  # noqa: S311 - no secret
    return options


def main() -> int:
    """Returns the exit status: 0; 1 if a bound is broken, something is left or the run failed; 130 if interrupted."""
    options = _options()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        f"seed {options.seed}, {options.seconds:g} s, neighbours: {', '.join(options.neighbours) or 'none'}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal()
    try:
        with Scene(journal.event) as scene:
            try:
                outcome = Run(scene, journal, options, console).measure()
            finally:
                shutil.copyfile(scene.agent.log, options.out / "agent.log")
    except LabError as error:
        print(f"lab.soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab.soak: interrupted; what it had made is gone", file=sys.stderr)
        return 130
    found = report.findings(outcome)
    note = f"seed {options.seed}; each dot is one call; red: the agent is killed; {len(found)} findings"
    (options.out / "soak.svg").write_text(chart.draw(outcome, note))
    if options.json:
        print(json.dumps(report.document(outcome), indent=2, ensure_ascii=False))
    else:
        _print(outcome, found)
    console.print(f"{options.out}/soak.svg and agent.log are written", style="dim")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
