"""What the conformance tests share: one lab for each worker, pods, and IPAM plugins both real and fake.

The lab outlives a test here, so a test that breaks a NIC takes a spare one.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import Lab, Netns
from tests.fakeipam import FakeIpam
from tests.runner import Plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class HostLocal:
    """The reference IPAM plugin with a store of this test's own."""

    folder: Path

    @property
    def ipam(self) -> dict[str, Any]:
        """For the network config."""
        subnet = {"subnet": "10.9.0.0/24", "gateway": "10.9.0.1"}
        return {
            "type": "host-local",
            "dataDir": str(self.folder),
            "ranges": [[subnet]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }

    def leases(self) -> list[str]:
        """The addresses that are taken, in any network."""
        return sorted(path.name for path in self.folder.glob("*/10.*"))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One for all tests of a worker: a pod's links are gone before the next test begins."""
    with Lab() as wired:
        yield wired


@pytest.fixture
def pods() -> Iterator[Callable[[], Netns]]:
    """Makes pods. Their links end with the test: with the namespace alone, they would end a little later."""
    made: list[Netns] = []
    with ExitStack() as stack:

        def make() -> Netns:
            made.append(stack.enter_context(Netns("pod")))
            return made[-1]

        yield make
        for pod in made:
            links = [f"link delete {name}" for name in pod.links() if name != "lo"]
            pod.run(["ip", "-force", "-batch", "-"], stdin="\n".join(links), check=False)


@pytest.fixture
def pod(pods: Callable[[], Netns]) -> Netns:
    """A pod."""
    return pods()


@pytest.fixture
def spare(lab: Lab) -> Iterator[str]:
    """A NIC of the node that a test may break."""
    name = "spare0"
    lab.node.ip(f"link add {name} type veth peer name spare1", f"link set {name} up", "link set spare1 up")
    yield name
    lab.node.run(["ip", "link", "delete", "spare1"], check=False)


@pytest.fixture
def fake(tmp_path: Path) -> FakeIpam:
    """Its folder is the plugin's CNI_PATH."""
    return FakeIpam(tmp_path / "cni-path")


@pytest.fixture
def host_local(fake: FakeIpam, reference_plugins: Path, tmp_path: Path) -> HostLocal:
    """The real host-local in CNI_PATH."""
    os.symlink(reference_plugins / "host-local", fake.folder / "host-local")
    return HostLocal(tmp_path / "leases")


@pytest.fixture
def plugin(lab: Lab, fake: FakeIpam, tmp_path: Path) -> Plugin:
    """The installed vmtap, with the test's delegates."""
    return Plugin(
        node=lab.node,
        state=tmp_path / "state",
        policy=tmp_path / "interfaces.yaml",
        cni_path=str(fake.folder),
    )
