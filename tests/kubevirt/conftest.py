"""A launcher pod as KubeVirt and Multus make one: its name, its interfaces' names, CNI_ARGS, the allocated device."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab import libvirt
from lab.guest import Image
from lab.wire import NIC, Netns
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab
    from tests.runner import Answer, Plugin

DEPLOY = Path(__file__).parents[2] / "deploy"


@dataclass(frozen=True)
class LauncherPod:
    """One sandbox of one of a VM's pods: a migration makes another pod, a failed ADD another sandbox of the same."""

    plugin: Plugin
    netns: Netns
    vm: str = "vm"
    suffix: str = "x7k2p"
    sandbox: int = 1

    def request(self, command: str, network: str, *, mac: str | None = None, **fields: Any) -> Answer:
        """One request for the network of the VM's spec. mac: of the VM's spec; Multus passes it in CNI_ARGS."""
        args = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": "default",
            "K8S_POD_NAME": f"virt-launcher-{self.vm}-"[:58] + self.suffix,  # as the API server cuts it
            "K8S_POD_INFRA_CONTAINER_ID": self.container,
            "K8S_POD_UID": "1b6ee3a6-0d0b-4a52-9f0a-52ac6d4c0f1e",
            **({"MAC": mac} if mac else {}),
        }
        return self.plugin(
            command,
            config(**{"name": network, **fields}),
            netns=self.netns,
            container=self.container,
            ifname=libvirt.ifname(network),
            args=";".join(f"{key}={value}" for key, value in args.items()),
        )

    def add(self, network: str, *, mac: str | None = None, **fields: Any) -> dict[str, Any]:
        """The result of an ADD that must work."""
        return self.request("ADD", network, mac=mac, **fields).ok()

    @property
    def container(self) -> str:
        return f"{self.vm}-{self.suffix}-{self.sandbox}"

    def link(self, network: str) -> dict[str, Any]:
        """What `ip -d link` says of the network's link."""
        return self.netns.links()[libvirt.ifname(network)]

    def node(self, network: str) -> Path:
        """The host's device node that the device plugin announced for it."""
        return self.plugin.state / "dev" / f"tap{self.link(network)['ifindex']}"


@pytest.fixture
def plugin(plugin: Plugin) -> Plugin:
    """The plugin on a node with the example's policy: dataplane is a NIC, lan a bridge."""
    shutil.copyfile(DEPLOY / "examples/interfaces.yaml", plugin.policy)
    plugin.policy.chmod(0o644)
    return plugin


@dataclass(frozen=True)
class Nodes:
    """Two nodes of a cluster at one switch, each with a plugin and a state of its own; their policies are the same."""

    lab: Lab
    first: Plugin
    second: Plugin

    def port_of(self, mac: str) -> str:
        """The port, "node" or "node2", that the switch sends frames for the MAC to."""
        lines = self.lab.switch.run(["bridge", "fdb", "show", "br", "sw"]).stdout.splitlines()
        (port,) = [line.split()[2] for line in lines if line.startswith(mac)]
        return port


@pytest.fixture
def nodes(lab: Lab, plugin: Plugin, tmp_path: Path) -> Iterator[Nodes]:
    """The lab's node at the switch's port node, and another at the port node2."""
    with Netns("node2", ipv6=False) as other:
        lab.switch.plug("node2", other, NIC, 1500)
        lab.switch.wait_until_up("node2")
        other.wait_until_up(NIC)
        yield Nodes(lab, plugin, replace(plugin, node=other, state=tmp_path / "state2"))


@pytest.fixture(scope="package")
def image() -> Iterator[Image]:
    """The guest's kernel and initramfs."""
    with Image() as made:
        yield made


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    with open(f"/proc/{pid}/status") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def open_devices(pid: int) -> list[str]:
    """What the process has open under /dev, fd by fd."""
    folder = f"/proc/{pid}/fd"
    links = []
    for fd in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(f"{folder}/{fd}"))
    return sorted(link for link in links if link.startswith("/dev/"))
