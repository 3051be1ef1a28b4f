"""The benchmark removes what a run of it left that was killed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lab.bench import leftovers
from lab.process import run
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from pathlib import Path


def test_only_of_a_dead_run(tmp_path: Path) -> None:
    folders, namespaces = [tmp_path / "shm", tmp_path / "run"], tmp_path / "run"
    for folder in folders:
        folder.mkdir()
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        dead, alive = ended.pid, os.getpid()
        for pid in (dead, alive):
            (folders[0] / f"vmtap-bench-{pid}-a/vmtap").mkdir(parents=True)
            (folders[1] / f"vmtap-guest-{pid}-b").mkdir()
            (namespaces / f"vmtap-lab-{pid}-c-node").touch()
        (namespaces / f"vmtap-lab-{alive}-c-node").touch()
        (folders[0] / "vmtap-bench-none").mkdir()
        run(
            ["unshare", "-n", "mount", "--bind", "/proc/self/ns/net", namespaces / f"vmtap-lab-{dead}-c-node"]
        )
        arguments = [f"{folders[0]}/vmtap-bench-{pid}-a/vmtap" for pid in (dead, alive)]
        agents = [
            subprocess.Popen([sys.executable, "-c", "input()", "--run", argument], stdin=subprocess.PIPE)
            for argument in arguments
        ]
        try:
            removed = leftovers.remove(folders, namespaces)
            assert agents[0].wait(LIMIT) == -9
            assert agents[1].poll() is None
        finally:
            for agent in agents:
                agent.kill()
                agent.communicate()
    assert sorted(removed) == sorted(
        [
            f"process {agents[0].pid}",
            f"{namespaces}/vmtap-lab-{dead}-c-node",
            f"{folders[0]}/vmtap-bench-{dead}-a",
            f"{folders[1]}/vmtap-guest-{dead}-b",
        ]
    )
    assert sorted(path.name for folder in folders for path in folder.iterdir()) == sorted(
        [
            f"vmtap-bench-{alive}-a",
            f"vmtap-guest-{alive}-b",
            f"vmtap-lab-{alive}-c-node",
            "vmtap-bench-none",
        ]
    )
    assert leftovers.remove(folders, namespaces) == []
