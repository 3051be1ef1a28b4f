"""Debian's podman with its CNI backend and runc on a lab's machine: containers of a folder, with nothing of the host's.

Must not know what is attached to them.
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
"""Else podman raises them to its own, which a test's machine may not allow."""


class Podman:
    """Its command line. folder: for its configuration and the containers' root; the rest is as Containerd's."""

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
        """What the command printed; LabError, with what it said, if it failed."""
        return self._machine.run(["podman", *words], env=self._env).stdout.strip()

    def run(self, name: str, networks: Sequence[str], *options: str) -> str:
        """The id of a container that sleeps, attached as eth0, eth1 …"""
        attached: list[str] = []
        for number, network in enumerate(networks):  # podman itself numbers them in no order
            attached += ["--network", f"{network}:interface_name=eth{number}"]
        place: list[str | os.PathLike[str]] = [
            "--cgroup-parent",
            self._machine.cgroup,
            *_LIMITS,
            "--rootfs",
            self._root,
        ]
        return self(
            "run",
            "--detach",
            "--name",
            name,
            *attached,
            *options,
            *place,
            "/bin/busybox",
            "sleep",
            "infinity",
        )

    def exec(self, name: str, *command: str) -> str:
        return self("exec", name, "/bin/busybox", *command)

    def remove(self, *names: str) -> None:
        """Kills and forgets them."""
        self("rm", "--force", "--time", "0", *names)
