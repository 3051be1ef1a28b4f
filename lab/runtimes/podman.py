"""Debian's podman, with its CNI backend and runc, on a lab's machine. Its containers' root is a folder with busybox.

Nothing of the host's podman is used or changed. Must not know what is attached to the containers.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from lab.runtimes import image

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lab.runtimes.machine import Machine

_CONFIG = """
[network]
network_backend = "cni"
cni_plugin_dirs = ["{plugins}"]
network_config_dir = "{netconf}"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
static_dir = "/run/lab/podman/static"
tmp_dir = "/run/lab/podman/tmp"
volume_path = "/run/lab/podman/volumes"
"""
_STORAGE = """
[storage]
driver = "overlay"
graphroot = "/run/lab/podman/graph"
runroot = "/run/lab/podman/run"
"""
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
"""Without these, podman raises the limits to its own, which may not be permitted."""


class Podman:
    """podman's command line.

    folder: for its configuration and the containers' root; netconf, plugins: the folders of network configs and of CNI
    plugins; env: for podman, and so for the CNI plugins.
    """

    def __init__(
        self, machine: Machine, folder: Path, *, netconf: Path, plugins: Path, env: Mapping[str, str]
    ) -> None:
        self._machine = machine
        config, storage = folder / "containers.conf", folder / "storage.conf"
        config.write_text(_CONFIG.format(plugins=plugins, netconf=netconf))
        storage.write_text(_STORAGE)
        self._env = {**env, "CONTAINERS_CONF": str(config), "CONTAINERS_STORAGE_CONF": str(storage)}
        self._root = folder / "root"
        (self._root / "bin").mkdir(parents=True)
        shutil.copy(image.BUSYBOX, self._root / "bin")

    def __call__(self, *words: str | os.PathLike[str]) -> str:
        """Runs a podman command and returns its output. Raises LabError if it fails."""
        return self._machine.run(["podman", *words], env=self._env).stdout.strip()

    def run(self, name: str, networks: Sequence[str], *options: str) -> str:
        """Starts a container that sleeps, with the networks as eth0, eth1 …, and returns its id."""
        attached: list[str] = []
        for number, network in enumerate(networks):  # podman itself numbers them in any order
            attached += ["--network", f"{network}:interface_name=eth{number}"]
        place = ("--cgroup-parent", self._machine.cgroup, *_LIMITS, "--rootfs", self._root)
        sleep = ("/bin/busybox", "sleep", "infinity")
        return self("run", "--detach", "--name", name, *attached, *options, *place, *sleep)

    def exec(self, name: str, *command: str) -> str:
        return self("exec", name, "/bin/busybox", *command)

    def remove(self, *names: str) -> None:
        """Kills and removes containers."""
        self("rm", "--force", "--time", "0", *names)
