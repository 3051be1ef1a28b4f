"""Debian's containerd with runc on a lab's machine, started by hand: no service, no registry, nothing of the host's.

Everything of it is on the machine's own tmpfs and ends with the machine. It can be killed and started again over the
same state, while its pods live on. Must not make pods: lab/cri.py does.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Self

from lab import image
from lab.cri import Cri, CriError
from lab.wire import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lab.machine import Machine

SANDBOX = "lab.invalid/busybox:1"
"""The image of every sandbox; containers may have it, too."""
LOGS = "/run/lab/pods"
"""Where, on the machine, what a container said is to be found: POD/CONTAINER.log."""
_SOCKET = "/run/containerd/containerd.sock"
_LOG_TAIL = 3000

# A tmpfs is no place for /opt's binaries and for other snapshotters than overlayfs; a test's containers may not lower
# their oom_score_adj where the test itself may not; and every network config of the folder is to be attached.
_CONFIG = """
version = 2
root = "/run/lab/containerd"
state = "/run/containerd"
disabled_plugins = [
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.native",
    "io.containerd.snapshotter.v1.zfs",
]

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{sandbox}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin}"
conf_dir = "{conf}"
max_conf_num = 0

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
"""


class Containerd:
    """Started, with the sandbox's image; a context manager.

    netconf: the folder of network configs, all of which each pod gets, by name: eth0, eth1 …; plugins: CNI's bin
    folder; folder: for config, log and images; env: for containerd, and so for the CNI plugins that it runs.
    """

    def __init__(
        self, machine: Machine, folder: Path, *, netconf: Path, plugins: Path, env: Mapping[str, str]
    ) -> None:
        self.machine = machine
        self._folder = folder
        self._env = dict(env)
        self._config = folder / "containerd.toml"
        self._config.write_text(_CONFIG.format(sandbox=SANDBOX, bin=plugins, conf=netconf))
        self._process: subprocess.Popen[bytes] | None = None
        self.cri = Cri(machine.path(_SOCKET), machine.cgroup, LOGS)
        try:
            self.version = self.start()
            archive = folder / "sandbox.tar"
            image.busybox(archive, SANDBOX)
            self.load(archive, SANDBOX)
        except BaseException:
            self.close()
            raise

    def start(self) -> str:
        """Returns its name and version when it takes requests; LabError if it does not come to that."""
        with (self._folder / "containerd.log").open("ab") as log:
            self._process = process = self.machine.popen(
                ["containerd", "--config", self._config], stdout=log, stderr=log, env=self._env
            )
        try:
            return self.cri.wait_ready(alive=lambda: process.poll() is None)
        except CriError as error:
            raise LabError(
                f"containerd does not answer ({error}); it said: {self.log()[-_LOG_TAIL:]}"
            ) from error

    def kill(self) -> None:
        """By SIGKILL. Its pods live on."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def load(self, archive: Path, name: str) -> None:
        """An image of image.write()'s, for pods."""
        self.machine.run(
            ["ctr", "--address", _SOCKET, "-n", "k8s.io", "images", "import", archive], env=self._env
        )
        self.cri.wait_image(name)

    def log(self) -> str:
        """All that it said."""
        return (self._folder / "containerd.log").read_text(errors="replace")

    def close(self) -> None:
        self.cri.close()
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
