"""The parent's part: with a QEMU whose firmware idles, and with small programs where that is enough."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.launcher.attached import QEMU
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = """
import os, sys
from cni.launcher import supervise
deadline, *command = sys.argv[1:]
ours, qemus = supervise.monitor()
os.set_inheritable(qemus, True)
def start():
    os.execvp(command[0], [part.replace("QMP", str(qemus)) for part in command])
status, at_once = supervise.run(start, ours, close=[qemus], deadline=float(deadline))
print("at once" if at_once else "in its time")
sys.exit(status)
"""
VM = [*QEMU, "-chardev", "socket,id=q,fd=QMP,server=off", "-mon", "chardev=q,mode=control"]


class Supervised:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def child(self) -> int:
        """The child's pid, once it is another program than the parent."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")

        def another() -> int | None:
            pids = children.read_text().split()
            own = Path(f"/proc/{self.process.pid}/exe").readlink()
            return int(pids[0]) if pids and Path(f"/proc/{pids[0]}/exe").readlink() != own else None

        pid = until(another, "no child")  # the kernel tells nobody about an exec
        assert pid
        return pid

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, said


@contextmanager
def supervised(deadline: float, *command: str) -> Iterator[Supervised]:
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(deadline), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Supervised(process)
        finally:
            process.kill()


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_status_is_the_childs(status: int) -> None:
    with supervised(1, "sh", "-c", f"exit {status}") as parent:
        assert parent.end() == (status, "at once\n")


def test_death_by_a_signal_is_128_and_its_number() -> None:
    with supervised(1, "sh", "-c", "kill -KILL $$") as parent:
        assert parent.end()[0] == 128 + signal.SIGKILL


def test_the_signals_are_blocked_in_the_child() -> None:
    """A terminal's Ctrl-C and systemd's SIGTERM go to the whole group."""
    with supervised(60, "sleep", "60") as parent:
        status = Path(f"/proc/{parent.child()}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert blocked & 1 << (number - 1)


def test_three_signals_end_a_child_that_listens_to_nothing() -> None:
    with supervised(60, "sleep", "60") as parent:
        parent.child()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            parent.process.send_signal(number)
        assert parent.end() == (128 + signal.SIGKILL, "in its time\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    ignored = ["env", f"--ignore-signal={number.name}", sys.executable, "-c", RUN, "0"]
    with subprocess.Popen(
        [*ignored, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        Supervised(process).child()
        process.send_signal(number)
        assert process.communicate("still here\n", timeout=LIMIT)[0] == "still here\nat once\n"
        assert process.returncode == 0


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], LIMIT)[0])


@pytest.mark.parametrize("command", [["sleep", "60"], pytest.param(VM, marks=pytest.mark.vm)])
def test_the_child_ends_with_a_killed_parent(command: list[str]) -> None:
    with supervised(60, *command) as parent:
        child = os.pidfd_open(parent.child())
        try:
            parent.process.kill()
            assert ended(child)
        finally:
            os.close(child)


def test_a_child_whose_parent_is_gone_before_it_asks_does_not_start() -> None:
    code = """
import os
from cni.launcher import supervise
supervise._die_with(os.getppid() + 1)
print("started")
"""
    orphan = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert (orphan.returncode, orphan.stdout) == (128 + signal.SIGKILL, b"")


class Events:
    """What a QEMU reports on a monitor of its own for the test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ask("qmp_capabilities")

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def close(self) -> None:
        """Waits for QEMU's end, and reads to it: nobody may close the pipe under the thread."""
        self._reader.join()

    def ask(self, command: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f'{{"execute": "{command}"}}\n')
        self._process.stdin.flush()

    def next(self) -> str:
        """The next event. QEMU 7.2 can oversleep a command when it has two monitors: another one wakes it."""

        def line() -> str:
            try:
                return self._lines.get(timeout=1)
            except queue.Empty:
                self.ask("query-status")
                return "nothing"

        return until(line, "QEMU reports no event", lambda line: '"event"' in line or not line)


@contextmanager
def running_vm(deadline: float) -> Iterator[tuple[Supervised, Events]]:
    """A QEMU that answers; its events."""
    with supervised(deadline, *VM, "-qmp", "stdio") as parent:
        events = Events(parent.process)
        try:
            yield parent, events
        finally:
            parent.process.kill()  # and so QEMU
            events.close()


@pytest.mark.vm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_power_down_and_the_deadline_a_quit(number: signal.Signals) -> None:
    with running_vm(deadline=0.5) as (parent, events):
        parent.child()
        began = time.monotonic()
        parent.process.send_signal(number)
        assert '"POWERDOWN"' in events.next()
        assert "host-qmp-quit" in events.next()
        assert time.monotonic() - began >= 0.5
        assert parent.process.wait(LIMIT) == 0


@pytest.mark.vm
def test_a_second_signal_does_not_wait_for_the_deadline() -> None:
    with running_vm(deadline=3600) as (parent, events):
        parent.child()
        parent.process.terminate()
        assert '"POWERDOWN"' in events.next()
        parent.process.terminate()
        assert "host-qmp-quit" in events.next()
        assert parent.process.wait(LIMIT) == 0


@pytest.mark.vm
def test_a_stopped_qemu_is_killed_in_the_end() -> None:
    with running_vm(deadline=0) as (parent, events):
        child = parent.child()
        events.ask("stop")
        assert '"STOP"' in events.next()  # it has come so far that it answers
        os.kill(child, signal.SIGSTOP)
        parent.process.terminate()
        assert parent.process.wait(LIMIT) == 128 + signal.SIGKILL
