"""A node for a container runtime: a mount and a pid namespace beside a lab node's network namespace.

/run is empty, /var/lib is the host's under an overlay that takes what is written, /proc shows the node's processes. All
of it ends with the node's first process, which ends when close() is called and when the process that made it ends. So
nothing that a runtime starts, mounts or writes outlives a test; a test looks for what the runtime leaves before that.
Must not know which runtime it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.process import Closing, LabError, run
from lab.wire import in_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from lab.process import RunOptions, Word
    from lab.wire import Netns

T = TypeVar("T")

CGROUPS = Path("/sys/fs/cgroup")

# Process 1 of the node: `cat` ends with its stdin, and the kernel then kills every process of the node. SIGCHLD is
# ignored so that the kernel reaps orphans, such as the shims of containers.
_FIRST = """
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/lock /run/lab/upper /run/lab/work
mount -t overlay -o lowerdir=/var/lib,upperdir=/run/lab/upper,workdir=/run/lab/work none /var/lib
trap '' CHLD
echo ready
exec cat
"""


class Machine(Closing):
    """A node; a context manager. netns: a lab's node, to be closed after this."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self.cgroup = f"/vmtap-lab-{os.getpid()}-{secrets.token_hex(4)}"
        """The parent of the containers' control groups; removed with the node."""
        self._started: list[subprocess.Popen[Any]] = []
        self._first = subprocess.Popen(
            netns.argv(
                [
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("sh", "-euc", _FIRST),
                ]
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._first.stdout
        assert self._first.stderr
        if not self._first.stdout.readline():
            output = self._first.stderr.read().decode().strip()
            self.close()
            raise LabError(f"the node's namespaces could not be made: {output or 'no output'}")
        self._proc = Path(f"/proc/{self._first.pid}")
        self._mounted = {number for number, _ in self._mountinfo()}

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """The path by which this process reaches a path of the node, sockets included."""
        found = os.fspath(inside).lstrip("/")
        if found.startswith(
            "var/run/"
        ):  # the link's target is absolute, and would be this process's own /run
            found = found.removeprefix("var/")
        return self._proc / "root" / found

    def call(self, function: Callable[[], T]) -> T:
        """Calls function in a thread in the node's network and mount namespaces.

        Processes that it starts are in the node's pid namespace, too.
        """
        return in_namespaces(
            [self.netns.path, self._proc / "ns/mnt", self._proc / "ns/pid_for_children"], function
        )

    def popen(self, argv: Sequence[Word], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen on the node. Its pid is that of this process's namespace; close() kills it."""
        started = self.call(lambda: subprocess.Popen(argv, **options))
        self._started.append(started)
        return started

    def run(self, argv: Sequence[Word], **options: Unpack[RunOptions]) -> subprocess.CompletedProcess[str]:
        """process.run() on the node, with a default timeout of 120 s."""
        options.setdefault("timeout", 120)
        return self.call(lambda: run(argv, **options))

    def processes(self) -> dict[int, str]:
        """The command line of each process of the node but its first, by its pid on the node."""
        found = {}
        for entry in self.path("proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if command and entry.name != "1":
                    found[int(entry.name)] = command
        return found

    def mounts(self) -> list[str]:
        """The mount points that were added after the node was made."""
        return sorted(point for number, point in self._mountinfo() if number not in self._mounted)

    def cgroups(self) -> list[Path]:
        """The folders below the node's control group, the deepest first."""
        return [
            Path(parent, name)
            for top in self._cgroup_tops()
            for parent, names, _ in os.walk(top, topdown=False)
            for name in names
        ]

    def make_cgroups(self) -> None:
        """Makes the node's control group in each hierarchy, as a kubelet wants it of its parent."""
        tops = [path.parent for path in CGROUPS.glob("*/cgroup.procs")] or [CGROUPS]
        for top in tops:
            (top / self.cgroup.lstrip("/")).mkdir()

    def _mountinfo(self) -> list[tuple[int, str]]:
        lines = (self._proc / "mountinfo").read_text().splitlines()
        return [(int(words[0]), words[4]) for words in map(str.split, lines)]

    def _cgroup_tops(self) -> list[Path]:
        """The node's control group in each hierarchy: version 2 has one, version 1 has one for each controller."""
        name = self.cgroup.lstrip("/")
        return [top for top in (CGROUPS / name, *CGROUPS.glob(f"*/{name}")) if top.exists()]

    def close(self) -> None:
        for each in self._started:  # a process that is not waited for keeps its namespace
            each.kill()
            each.wait()
        assert self._first.stdin
        self._first.stdin.close()
        self._first.wait(120)
        for stream in (self._first.stdout, self._first.stderr):
            assert stream
            stream.close()
        for folder in [*self.cgroups(), *self._cgroup_tops()]:
            folder.rmdir()
