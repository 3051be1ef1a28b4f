"""Fixtures for faults: a plugin with a delegate that can misbehave, its baseline, and quick calls in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni import plugin as product
from cni.attach.call import Request
from tests.fakeipam import FakeIpam
from tests.faults.baseline import Baseline
from tests.faults.inject import Injector
from tests.runner import Answer, Plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lab.wire import Lab, Netns


@pytest.fixture
def ipam(tmp_path: Path) -> FakeIpam:
    return FakeIpam(tmp_path / "ipam")


@pytest.fixture
def plugin(lab: Lab, ipam: FakeIpam, tmp_path: Path) -> Plugin:
    """As in tests/conftest.py, with the fake IPAM plugin in CNI_PATH."""
    return Plugin(
        node=lab.node,
        state=tmp_path / "state",
        policy=tmp_path / "interfaces.yaml",
        cni_path=str(ipam.folder),
    )


@pytest.fixture
def pod(lab: Lab) -> Netns:
    return lab.pod()


@pytest.fixture
def baseline(plugin: Plugin, ipam: FakeIpam, pod: Netns) -> Baseline:
    """That of the node and the one pod."""
    return Baseline(plugin, ipam, [pod])


@pytest.fixture
def injector(plugin: Plugin, tmp_path: Path) -> Iterator[Injector]:
    with Injector(plugin, tmp_path / "strace") as injector:
        yield injector


@pytest.fixture
def handle(plugin: Plugin) -> Callable[..., Answer]:
    """The plugin's __call__, by plugin.handle in a thread of this process: for steps that are not the fault."""

    def handle(
        command: str,
        config: Mapping[str, Any] | bytes,
        *,
        netns: Netns | str | Path | None = None,
        container: str = "c1",
        ifname: str = "net1",
        args: str = "",
    ) -> Answer:
        request = Request(
            env=plugin.environment(command, netns, container, ifname, args),
            stdin=config if isinstance(config, bytes) else json.dumps(config).encode(),
        )
        response = plugin.node.call(lambda: product.handle(request, plugin.given()))
        return Answer(response.status, response.stdout, "")

    return handle
