"""Faults by strace(1): the plugin as a process of its own, with one system call of it made to fail or to kill it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.runner import Answer
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.runner import Plugin

CHANGES = "mkdir,openat,symlink,rename,unlink,write,sendto,ioctl,mknodat,fchmod,chmod,chown,lchown,fsmount,setns,vfork"
"""System calls that may change something outside the process."""

_LINE = re.compile(r"(?:\d+ +)?(?P<call>\w+)\((?P<rest>.*)")
_READS = re.compile(r"O_RDONLY|O_PATH|TCGETS|FIONBIO|FIOCLEX|TUNGETIFF|NS_GET_NSTYPE|SIOCGIF")
_GETS = re.compile(r"nlmsg_type=(?:0x12|RTM_GETLINK)\b")


@dataclass(frozen=True)
class Point:
    """The nth call of that name in the plugin's own process; text is what strace said of it."""

    call: str
    nth: int
    text: str

    def __str__(self) -> str:
        return f"{self.call} #{self.nth}: {self.text[:100]}"


def points(trace: str) -> list[Point]:
    """The calls in the trace that change something, with their place among their like."""
    counts: Counter[str] = Counter()
    found = []
    for match in filter(None, map(_LINE.match, trace.splitlines())):
        rest = match["rest"]
        if "ERESTART" in rest:  # another held the kernel's lock: it is entered again at once
            continue
        counts[match["call"]] += 1
        if not (_READS.search(rest) or _GETS.search(rest) or "EEXIST" in rest):
            found.append(Point(match["call"], counts[match["call"]], rest))
    return found


class Injector:
    """Runs the plugin under strace; a context manager, because of the warm process behind it."""

    def __init__(self, plugin: Plugin, folder: Path) -> None:
        self._plugin = plugin
        self._folder = folder
        folder.mkdir()
        # The modules are found as in this process, and nothing is written beside them.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        argv = [str(word) for word in plugin.node.argv([sys.executable, "-m", "tests.faults.warm"])]
        self._warm = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._warm.communicate(timeout=LIMIT)  # closes its stdin: it ends after the last job

    def __call__(
        self,
        command: str,
        config: Mapping[str, Any],
        *options: str,
        netns: Any = None,
        container: str = "c1",
    ) -> tuple[Answer, str]:
        """One execution with strace's options, and what strace wrote. Status -N: killed by signal N.

        Comes back when all that it started has ended.
        """
        job: dict[str, Any] = {name: str(self._folder / name) for name in ("stdin", "stdout")}
        for path in job.values():
            Path(path).write_text("")
        Path(job["stdin"]).write_text(json.dumps(config))
        # Its stderr is a delegate's, too: its end is the end of a delegate that outlives a killed plugin.
        reading, writing = os.pipe()
        job["stderr"] = f"/proc/{os.getpid()}/fd/{writing}"
        log = self._folder / "trace"
        log.write_text("")
        job["env"] = self._plugin.environment(command, netns, container)
        assert self._warm.stdin and self._warm.stdout
        print(json.dumps(job), file=self._warm.stdin, flush=True)
        pid = int(self._warm.stdout.readline())
        os.close(writing)
        strace = subprocess.Popen(
            ["strace", "-o", str(log), "-p", str(pid), *options], stderr=subprocess.PIPE, text=True
        )
        assert strace.stderr
        with strace.stderr as said:
            attached = said.readline()
            os.kill(pid, signal.SIGCONT)
            status = os.waitstatus_to_exitcode(int(self._warm.stdout.readline()))
            rest = said.read()
        strace.wait(LIMIT)
        assert "attached" in attached, attached + rest
        with open(reading, "rb") as file:
            stderr = file.read().decode(errors="replace")
        return Answer(status, Path(job["stdout"]).read_bytes(), stderr), log.read_text(errors="replace")
