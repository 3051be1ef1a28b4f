"""Debian's dockerd on a machine of the lab, started by hand: no service, and nothing of the host's docker.

Its data, containers, socket and client config are on the machine's own tmpfs, its iptables rules and networks in the
machine's network namespace, its containers' control groups below the machine's. So all of it ends with the machine,
also when this process is killed. A later start begins with saved data (save()): layers are mounted, not copied.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.assets.kind import DOCKER
from lab.process import PATIENCE, Closing, LabError, Program, run, wait_for
from lab.runtimes.machine import CGROUPS, Machine
from lab.wire import FOLDER, Netns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Unpack

    from lab.process import RunOptions, Word

NODE_IMAGE = "localhost/kind-node:lab"
BASE_IMAGE = "localhost/vmtap-base:lab"
HOME = "/run/lab/docker"
"""The folder, on the machine, of everything that a user of this docker may write: docker's data, shims, kubeconfig."""
_DATA = f"{HOME}/data"
_SHIMS = f"{HOME}/bin"
_SAVED = ("image", "buildkit", "overlay2")

# dockerd writes to /etc, and kind has docker mount /lib/modules, which docker makes if there is none.
_PREPARE = """
mount --make-rshared /
for name in etc usr/lib; do
    mkdir -p /run/lab/$name/upper /run/lab/$name/work
    mount -t overlay -o lowerdir=/$name,upperdir=/run/lab/$name/upper,workdir=/run/lab/$name/work none /$name
done
mkdir -p /usr/lib/modules {home}/scratch {shims} {data}
rm -rf /etc/docker
rm -f /etc/resolv.conf
: >/etc/resolv.conf
"""

# A container of all capabilities gets those that dockerd knows of, and runc fails if this machine has fewer.
_RUNC = """#!{python} -ISE
import json, os, sys
from pathlib import Path

words = sys.argv[1:]

def after(name):
    return words[words.index(name) + 1] if name in words else None

path = None
if "create" in words:
    path = Path(after("--bundle"), "config.json")
elif "exec" in words:
    path = Path(after("--process"))
if path:
    config = json.loads(path.read_text())
    sets = config.get("process", config).get("capabilities") or {{}}
    for names in sets.values():
        names[:] = [name for name in names if name != "CAP_SYS_RESOURCE"]
    path.write_text(json.dumps(config))
os.execv("{runc}", ["runc", *words])
"""
_SYS_RESOURCE = 24
_SLIRP_DNS = "10.0.2.3"
_SERVICES = "10.96.0.0/16"
"""kind's default."""


class Docker(Closing):
    """A started dockerd; a context manager. folder: for logs; saved: what save() has written, the oldest first.

    internet: whether its network reaches what this machine reaches.
    """

    def __init__(self, folder: Path, saved: Sequence[Path] = (), *, internet: bool = False) -> None:
        self.programs = DOCKER.get()
        self._folder = folder
        sweep()
        with contextlib.ExitStack() as stack:
            self.netns = stack.enter_context(Netns("docker"))
            self.machine = stack.enter_context(Machine(self.netns))
            self.machine.make_cgroups()
            self.machine.run(["sh", "-euc", _PREPARE.format(home=HOME, shims=_SHIMS, data=_DATA)])
            if saved:
                self._restore(saved)
            if not _may_everything():
                runc = shutil.which("runc") or "/usr/sbin/runc"
                self.shim("runc", _RUNC.format(python=Path(sys.executable).resolve(), runc=runc))
            self.path = ":".join((_SHIMS, *self._folders(), os.environ["PATH"]))
            self.dockerd = Program(
                self.machine.popen,
                ["dockerd", *self._flags()],
                folder / "dockerd.log",
                {"PATH": self.path, "HOME": HOME, "TMPDIR": f"{HOME}/scratch"},
            )
            self.start()
            if internet:
                stack.enter_context(self.internet())
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Returns when dockerd takes requests."""
        self.dockerd.start()

        def ready() -> bool:
            if not self.dockerd.alive():
                raise LabError(f"dockerd has ended; {self.dockerd.tail()}")
            return bool(self.run(["docker", "version", "-f", "{{.Server.Version}}"], check=False).strip())

        wait_for(ready, lambda: f"dockerd does not answer; {self.dockerd.tail()}", pause=0.1)

    def shim(self, name: str, script: str) -> None:
        """Adds an executable that is first on the PATH of every user of this docker."""
        path = self.machine.path(f"{_SHIMS}/{name}")
        path.write_text(script)
        path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        """The environment of a user of this docker."""
        return {
            **os.environ,
            "PATH": self.path,
            "HOME": HOME,
            "TMPDIR": f"{HOME}/scratch",
            "DOCKER_HOST": "unix:///run/docker.sock",
            "DOCKER_BUILDKIT": "1",
            "DOCKER_CONFIG": f"{HOME}/config",
            "KUBECONFIG": f"{HOME}/kubeconfig",
        }

    def run(self, argv: Sequence[Word], **options: Unpack[RunOptions]) -> str:
        """The output of a command, run as a user of this docker. Raises LabError."""
        options.setdefault("env", self.environment())
        return self.machine.run(argv, **options).stdout

    def popen(self, argv: Sequence[Word], **options: Any) -> Any:
        """subprocess.Popen of a command, as a user of this docker."""
        options.setdefault("env", self.environment())
        return self.machine.popen(argv, **options)

    @contextlib.contextmanager
    def internet(self) -> Iterator[None]:
        """The machine's network reaches what this machine reaches, by user-mode NAT (slirp4netns).

        Addresses of Services stay unreachable: a node without kube-proxy's rules would connect to somebody else's.
        """
        self.netns.ip(f"route replace unreachable {_SERVICES}")
        ready, readies = os.pipe()
        ends, end = os.pipe()  # slirp4netns ends when this process has closed it
        program = self.programs / "usr/bin/slirp4netns"
        flags = ["--configure", "--mtu=1500", "--disable-host-loopback", "--netns-type=path"]
        fds = [f"--ready-fd={readies}", f"--exit-fd={ends}"]
        log = self._folder / "slirp4netns.log"
        with log.open("wb") as output:
            slirp = subprocess.Popen(
                [program, *flags, *fds, self.netns.path, "tap0"],
                pass_fds=[readies, ends],
                stdout=output,
                stderr=output,
            )
        os.close(readies)
        os.close(ends)
        resolv = self.machine.path("/etc/resolv.conf")
        try:
            if not os.read(ready, 1):
                raise LabError(f"slirp4netns has ended: {log.read_text()}")
            resolv.write_text(f"nameserver {_SLIRP_DNS}\n")
            yield
        finally:
            resolv.write_text("")
            os.close(ready)
            os.close(end)
            slirp.wait(PATIENCE)

    def save(self, target: Path) -> None:
        """Ends dockerd, and writes images and build cache to a new folder, but for layers that are mounted."""
        self.dockerd.kill(signal.SIGTERM)
        names = [name for name in _SAVED if self.machine.path(f"{_DATA}/{name}").exists()]
        copy = f"tar --one-file-system --xattrs --xattrs-include='*' -C {_DATA} -cf - {' '.join(names)}"
        self.machine.run(
            ["sh", "-euc", f"mkdir {target}; {copy} | tar --xattrs --xattrs-include='*' -C {target} -xf -"],
            timeout=None,
        )

    def _restore(self, saved: Sequence[Path]) -> None:
        """Copies saved data but the large layers, those of the first data without a parent, which are mounted.

        dockerd may mount a layer that has a parent with its folder as the upper one (moby's overlay2), which must be on
        the same file system as its work folder.
        """
        tar = "tar --xattrs --xattrs-include='*'"
        first = saved[0]
        layers = [path.parent.relative_to(first) for path in first.glob("overlay2/*/diff")]
        alone = [f"{layer}/diff" for layer in layers if not (first / layer / "lower").exists()]
        script = []
        for folder in saved:
            skipped = " ".join(f"--exclude=./{name}" for name in alone)
            script.append(f"{tar} -C {folder} {skipped} -cf - . | {tar} -C {_DATA} -xf -")
        for name in alone:
            script.append(f"mkdir -p {_DATA}/{name} && mount --bind -o ro {first}/{name} {_DATA}/{name}")
        self.machine.run(["sh", "-euc", "\n".join(script)])

    def _folders(self) -> list[str]:
        return [str(self.programs / name) for name in ("usr/bin", "usr/sbin")]

    def _flags(self) -> list[str]:
        return [
            f"--data-root={_DATA}",
            "--exec-root=/run/docker",
            "--host=unix:///run/docker.sock",
            "--pidfile=/run/docker.pid",
            f"--cgroup-parent={self.machine.cgroup}",
            "--storage-driver=overlay2",
            "--oom-score-adjust=0",
        ]

    def close(self) -> None:
        self._stack.close()


def sweep() -> None:
    """Removes the names that a killed process of the lab has left: all that ran there ended with it."""
    names = [*FOLDER.glob("vmtap-lab-*-docker"), *Path(tempfile.gettempdir()).glob("vmtap-kind-*")]
    for left in (path for path in names if _ended(path)):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            run(["umount", "--lazy", left], check=False)
            left.unlink(missing_ok=True)
    for top in [*CGROUPS.glob("vmtap-lab-*"), *CGROUPS.glob("*/vmtap-lab-*")]:
        if _ended(top):
            with contextlib.suppress(OSError):  # something runs there after all
                for folder, _, _ in os.walk(top, topdown=False):
                    Path(folder).rmdir()


def _ended(path: Path) -> bool:
    """Whether the process whose pid is in the path's name has ended."""
    found = re.match(r"vmtap-\w+-(\d+)-", path.name)
    return found is not None and not Path("/proc", found[1]).exists()


def _may_everything() -> bool:
    """Whether this process may have CAP_SYS_RESOURCE, by its bounding set."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapBnd:")[2].split()[0], 16) >> _SYS_RESOURCE & 1)
