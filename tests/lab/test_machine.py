"""A node for a runtime: what is in it stays in it, and goes with it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.process import LabError
from lab.runtimes.machine import Machine
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.wire import Lab

ABANDONED = """
import sys
from pathlib import Path
from lab.runtimes.machine import Machine
from lab.wire import Netns
netns = Netns.__new__(Netns)
netns.path = Path(sys.argv[1])
print(Machine(netns).popen(["sleep", "1000"]).pid, flush=True)
sys.stdin.read()
"""
"""Makes a machine, starts a program on it, and waits to be killed."""


def test_what_is_in_it_stays_in_it(lab: Lab) -> None:
    with Machine(lab.node) as machine:
        machine.run(
            ["sh", "-euc", "mkdir /var/lib/vmtap-lab-test; echo yes >/run/mine; mount -t tmpfs none /mnt"]
        )
        assert machine.path("/run/mine").read_text() == "yes\n"
        assert machine.path("/var/run/mine").read_text() == "yes\n"
        assert machine.path("/var/lib/vmtap-lab-test").is_dir()
        assert not Path("/var/lib/vmtap-lab-test").exists()
        assert machine.mounts() == ["/mnt"]
        assert "eth1" in machine.run(["ip", "-br", "link"]).stdout
        sleeper = machine.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert sleeper.stdin
        assert sleeper.stdout
        sleeper.stdin.write(b"runs\n")
        sleeper.stdin.flush()
        sleeper.stdout.readline()  # exec(2) lets the parent go on a moment before /proc has the new name
        assert list(machine.processes().values()) == ["cat"]
        with pytest.raises(LabError, match="no such folder"):
            machine.run(["sh", "-c", "echo no such folder >&2; exit 1"])
    assert sleeper.returncode == -signal.SIGKILL
    sleeper.stdin.close()
    sleeper.stdout.close()


def test_it_goes_with_who_made_it(lab: Lab) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", ABANDONED, lab.node.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert maker.stdout
    sleeper = os.pidfd_open(int(maker.stdout.readline()))
    try:
        maker.kill()
        maker.communicate()
        assert select.select([sleeper], [], [], LIMIT)[0], "it still runs"
    finally:
        os.close(sleeper)
