"""containerd on a lab's machine, started by hand: no service, no registry, nothing of the host's.

Everything it writes is on the machine's own tmpfs and ends with the machine. It can be killed and started again over
the same state, while its pods live on. Must not make pods: lab/runtimes/cri.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.process import PATIENCE, LabError, Program
from lab.runtimes import image
from lab.runtimes.cri import Cri

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lab.process import Word
    from lab.runtimes.machine import Machine

SANDBOX = "lab.invalid/busybox:1"
"""The image of every sandbox; containers may use it, too."""
LOGS = "/run/lab/pods"
"""The folder, on the machine, of the containers' output: POD/CONTAINER.log."""
SOCKET = "/run/containerd/containerd.sock"

# Version 2 is read by containerd 1.6 (Debian's) and 2. /opt and snapshotters other than overlayfs have no place on a
# tmpfs; a test's containers may not lower their oom_score_adj where the test itself may not; and every network config
# of the folder is to be attached.
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
bin_dir = "{plugins}"
conf_dir = "{netconf}"
max_conf_num = 0

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
"""


class Containerd(Program):
    """Started, with the sandbox's image; a context manager.

    folder: for config, log and images; netconf: the folder of network configs, all of which each pod gets, in the
    order of their names: eth0, eth1 …; plugins: the folder of CNI plugins; env: for containerd, and so for the CNI
    plugins that it runs; its PATH finds containerd, ctr and runc; logs: the folder of the containers' output; more: the
    end of its config.
    """

    def __init__(
        self,
        machine: Machine,
        folder: Path,
        *,
        netconf: Word,
        plugins: Word,
        env: Mapping[str, str],
        logs: str = LOGS,
        more: str = "",
    ) -> None:
        config = folder / "containerd.toml"
        config.write_text(_CONFIG.format(sandbox=SANDBOX, plugins=plugins, netconf=netconf) + more)
        super().__init__(machine.popen, ["containerd", "--config", config], folder / "containerd.log", env)
        self.machine = machine
        self.cri = Cri(machine.path(SOCKET), machine.cgroup, logs)
        try:
            self.start()
            archive = folder / "sandbox.tar"
            image.busybox(archive, SANDBOX)
            self.load(archive, SANDBOX)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Returns when it takes requests. Raises LabError if it ends before that or takes too long."""
        super().start()
        try:
            self.cri.wait_ready(self.alive)
        except LabError as error:
            raise LabError(f"containerd does not answer: {error}; {self.tail()}") from error

    def load(self, archive: Path, name: str) -> None:
        """Imports an image for pods from a tar file of the host; name: with registry and tag, as in the archive."""
        ctr = ["ctr", "--address", SOCKET, "-n", "k8s.io"]
        self.machine.run([*ctr, "images", "import", archive], env=self.env, timeout=2 * PATIENCE)
        self.cri.wait_image(name)

    def close(self) -> None:
        self.cri.close()
        super().close()
