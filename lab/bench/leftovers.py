"""Removes what a killed run of the benchmark has left: its agents, guests, namespaces and folders.

A run has folders vmtap-bench-PID-…, from its start to its end; its guests have vmtap-guest-PID-…, its lab has
namespaces vmtap-lab-PID-…. They are a dead run's if no process has that PID.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from lab.process import run

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDERS = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - only names of a run of ours are looked for
NAMESPACES = Path("/run")


def remove(folders: Sequence[Path] = FOLDERS, namespaces: Path = NAMESPACES) -> list[str]:
    """Removes them. Returns the paths that were removed, and "process PID" for each process that was ended."""
    removed = []
    for pid, own in sorted(_of_dead_runs(folders).items()):
        guests = [path for folder in folders for path in folder.glob(f"vmtap-guest-{pid}-*")]
        left = [*guests, *own]  # own last: a clean-up that is interrupted is done again
        removed += [f"process {each}" for each in _end(left)]
        for path in sorted(namespaces.glob(f"vmtap-lab-{pid}-*")):
            run(["umount", "--lazy", path], check=False)  # it is no mount if the lab was killed half-way
            path.unlink(missing_ok=True)
            removed.append(str(path))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(str(folder))
    return removed


def _of_dead_runs(folders: Sequence[Path]) -> dict[int, list[Path]]:
    """The pid of each run that has ended → its folders."""
    found: dict[int, list[Path]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("vmtap-bench-*"))):
        match = re.fullmatch(r"vmtap-bench-(\d+)-.*", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            found.setdefault(int(match[1]), []).append(path)
    return found


def _end(folders: Sequence[Path]) -> list[int]:
    """Kills the processes that have a path below one of the folders among their arguments. Returns their pids."""
    prefixes = tuple(f"{folder}/".encode() for folder in folders)
    ended = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # it has ended
            if name.isdecimal():
                process = os.pidfd_open(int(name))
                try:
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                    if any(word.startswith(prefixes) for word in words):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                        ended.append(int(name))
                finally:
                    os.close(process)
    return ended
