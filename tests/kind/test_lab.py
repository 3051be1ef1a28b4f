"""The lab's docker leaves nothing on this machine, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from lab.assets.cache import CHECKOUT
from lab.kind.docker import BASE_IMAGE
from tests.kind import host
from tests.waiting import until, watched

LAB = (sys.executable, "-m", "lab.kind")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_lab_leaves_nothing(number: signal.Signals) -> None:
    """Only SIGKILL leaves names, which the next lab removes. Its processes have ended by then."""
    command = ["docker", "run", "--privileged", BASE_IMAGE, "sh", "-c", "echo runs; sleep 1000"]
    before = host.look(0)
    process = subprocess.Popen([*LAB, *command], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process, watched(process):
        assert process.stdout.readline() == "runs\n"
        inode = host.netns(process.pid)
        assert host.processes(inode)
        process.send_signal(number)
        process.wait()
    until(lambda: host.processes(inode), "processes of the lab still run", lambda found: not found)
    if number == signal.SIGKILL:
        subprocess.run([*LAB, "true"], cwd=CHECKOUT, check=True)
    until(lambda: host.added(before, process.pid), "the lab has left something", lambda left: not left)
