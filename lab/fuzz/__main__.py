"""Starts one fuzzing process for each target, as many at once as there are processors, and reports what they did.

The exit status is 0 if nothing was found, 1 if an input broke a claim, 2 if a fuzzer did not work. Must not know what
a target does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from lab.assets.cache import CACHE, CHECKOUT
from lab.fuzz import shim, targets
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

CORPUS = CHECKOUT / "tests/fuzz/corpus"
SHIM = "shim"
MEGABYTES = 2048
"""The memory of one process, in all."""
_SHOWN_SECONDS = 10.0
"""Between two lines of progress of one target."""
_GRACE_SECONDS = 60.0
"""For the start of a process, and the input that it is at when its time is over."""
_STATUS = re.compile(r"#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)/.*?exec/s: (\d+)")
_STATISTIC = re.compile(r"stat::(number_of_executed_units|average_exec_per_sec|peak_rss_mb):\s+(\d+)")


@dataclass
class Run:
    """What is known of one target's process. edges and features: libFuzzer's cov and ft."""

    target: str
    executions: int = 0
    per_second: int = 0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    """Inputs that each reach something that no other does."""
    peak_mb: int = 0
    findings: list[str] = field(default_factory=list)
    """The inputs that broke a claim."""
    fault: str = ""
    """Why the fuzzer itself did not work; "" if it did."""

    def read(self, line: str) -> bool:
        """Take what a line of libFuzzer's output says; whether it is one of progress."""
        if found := _STATUS.match(line):
            self.executions, self.edges, self.features, self.corpus, per_second = map(int, found.groups())
            self.per_second = per_second or self.per_second
            return True
        if found := _STATISTIC.match(line):
            name = {"number_of_executed_units": "executions", "average_exec_per_sec": "per_second"}
            setattr(self, name.get(found[1], "peak_mb"), int(found[2]))
        return False


class Fuzzers:
    """The processes that run. seconds: of each."""

    def __init__(self, seconds: float, *, quiet: bool) -> None:
        self._seconds = max(1, int(seconds))
        self._quiet = quiet
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, target: str) -> Run:
        """Fuzz the target until the time is over, or stop()."""
        found = Run(target)
        folder = CACHE / "fuzz" / target
        known = _findings(folder)
        last: deque[str] = deque(maxlen=30)
        try:
            process = self._start(target, folder)
        except LabError as error:
            found.fault = str(error)
            return found
        if process is None:
            return found
        shown = time.monotonic() - _SHOWN_SECONDS
        timer = threading.Timer(self._seconds + _GRACE_SECONDS, process.kill)
        timer.start()
        with process:
            assert process.stderr
            for line in process.stderr:
                last.append(line)
                if found.read(line) and time.monotonic() - shown >= _SHOWN_SECONDS:
                    shown = time.monotonic()
                    self._show(found)
        timer.cancel()
        with self._lock:
            self._processes.discard(process)
        found.findings = [str(path) for path, at in _findings(folder).items() if known.get(path) != at]
        if process.returncode and not found.findings and not self._stopped:
            found.fault = f"exit status {process.returncode}: {''.join(last)}"
        self._show(found)
        return found

    def stop(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def _start(self, target: str, folder: Path) -> subprocess.Popen[str] | None:
        for each in ("corpus", "findings"):
            (folder / each).mkdir(parents=True, exist_ok=True)
        seeds = [path for path in (CORPUS / target,) if path.is_dir()]
        if target == SHIM:
            argv = shim.fuzzer(folder, self._seconds, MEGABYTES, seeds)
        else:
            arguments = [target, folder, self._seconds, MEGABYTES, *seeds]
            argv = [sys.executable, "-m", "lab.fuzz.child", *map(str, arguments)]
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                ["nice", "-n", "19", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=CHECKOUT,
                process_group=0,
            )
            self._processes.add(process)
        return process

    def _show(self, found: Run) -> None:
        if not self._quiet:
            print(
                f"  {found.target:12} {found.executions:10} executions {found.per_second:7}/s "
                f"{found.edges:6} edges {found.features:6} features {len(found.findings):3} findings",
                file=sys.stderr,
                flush=True,
            )


def _findings(folder: Path) -> dict[Path, int]:
    """The inputs that broke a claim, each with the time at which it was last found to."""
    paths = sorted(path for path in (folder / "findings").glob("*") if path.suffix != ".txt")
    return {path: path.stat().st_mtime_ns for path in paths}


def table(runs: Sequence[Run]) -> str:
    """The runs, one a line, and what to do about each finding."""
    lines = [
        f"{'target':12} {'executions':>11} {'each second':>12} {'edges':>7} {'features':>9} {'inputs':>7} "
        f"{'peak MB':>8} {'findings':>9}"
    ]
    lines += [
        f"{run.target:12} {run.executions:11} {run.per_second:12} {run.edges:7} {run.features:9} {run.corpus:7} "
        f"{run.peak_mb:8} {len(run.findings):9}"
        for run in runs
    ]
    for run in runs:
        for path in map(Path, run.findings):
            told = path.with_suffix(".txt")
            lines.append(f"\n{path}: {told.read_text().splitlines()[0] if told.exists() else 'see above'}")
            lines.append(f"  python -m lab.fuzz --replay {run.target} {path}")
        if run.fault:
            lines.append(f"\n{run.target} did not run: {run.fault}")
    return "\n".join(lines)


def replay(target: str, paths: Sequence[Path]) -> None:
    """Call the target with each file, without a fuzzer. Raises what the target raises; LabError for the shim."""
    if target == SHIM:
        folder = CACHE / "fuzz" / SHIM
        folder.mkdir(parents=True, exist_ok=True)
        shim.replay(folder, paths)
        return
    loaded = targets.load(target)
    with tempfile.TemporaryDirectory() as own, mock.patch.object(tempfile, "tempdir", own):
        for path in paths:
            try:
                loaded.run(path.read_bytes())
            except Exception as error:
                error.add_note(f"the input is {path}")
                raise


def main() -> int:
    """Returns the exit status."""
    known = [*targets.names(), SHIM]
    parser = argparse.ArgumentParser(prog="python -m lab.fuzz", description="Coverage-guided fuzzing.")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"default: all, which are {', '.join(known)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="how long the run takes in all (default: 60)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at once (default: processors)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="call the target with one file")
    options = parser.parse_args()
    if options.replay:
        replay(options.replay[0], [Path(options.replay[1])])
        return 0
    chosen = options.targets or known
    if unknown := {*chosen} - {*known}:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(known)}")
    jobs = max(1, min(options.jobs, len(chosen)))
    rounds = -(-len(chosen) // jobs)
    fuzzers = Fuzzers(options.seconds / rounds, quiet=options.json)
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(fuzzers.run, target) for target in chosen]
        try:
            runs = [each.result() for each in started]
        except KeyboardInterrupt:
            fuzzers.stop()
            runs = [each.result() for each in started]
    print(json.dumps([asdict(run) for run in runs], indent=2) if options.json else table(runs))
    if any(run.fault for run in runs):
        return 2
    return 1 if any(run.findings for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
