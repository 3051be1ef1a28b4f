"""A launcher pod as KubeVirt and Multus make one: its name, its interfaces' names, CNI_ARGS, the allocated device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lab import libvirt
from lab.guest import Image
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Netns
    from tests.runner import Answer, Plugin

POLICY = """
interfaces:
  - name: dataplane
    source: {dev: eth1}
    modes: [bridge, vepa]
  - name: segment
    source: {dev: br0}
    modes: [bridge]
"""


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
            "K8S_POD_NAME": f"virt-launcher-{self.vm}-{self.suffix}",
            "K8S_POD_INFRA_CONTAINER_ID": self.container,
            "K8S_POD_UID": "1b6ee3a6-0d0b-4a52-9f0a-52ac6d4c0f1e",
            **({"MAC": mac} if mac else {}),
        }
        return self.plugin(
            command,
            config(name=network, **fields),
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
    """The plugin on a node whose policy offers a NIC and a bridge."""
    plugin.policy.write_text(POLICY)
    plugin.policy.chmod(0o644)
    return plugin


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
    links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    return sorted(link for link in links if link.startswith("/dev/"))
