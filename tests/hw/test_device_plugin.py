"""Virtual functions as a kubelet's devices: the real agent, its shim and the lab's kubelet beside emulated NICs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cni.state import deviceid
from cni.state.store import Store
from lab.kubernetes.kubelet import Device, Kubelet
from lab.process import run
from tests.agent.conftest import Agent
from tests.hw.nic import PF0, PF1
from tests.runner import config, pod_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.hw import Root
    from lab.wire import Netns

FAST = "macvtap.network.kubevirt.io/fast"


def put(agent: Agent, **fields: Any) -> None:
    """The policy: both PFs as a pool."""
    entry = {"name": "fast", "type": "sr-iov", "source": {"dev": ["pf0", "pf1"]}, **fields}
    new = agent.policy.with_suffix(".new")
    new.write_text(json.dumps({"interfaces": [entry]}))
    new.rename(agent.policy)


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    with tempfile.TemporaryDirectory() as short, Kubelet(f"{short}/device-plugins") as made:
        yield made


@pytest.fixture(scope="module")
def running(node: Root, kubelet: Kubelet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One for all: to start it takes long on an emulated CPU."""
    folder = tmp_path_factory.mktemp("agent")
    flags = ("--device-plugin", "--kubelet", str(kubelet.folder))
    made = Agent(node, folder / "run", folder / "interfaces.yaml", flags)
    put(made)
    yield made.start()
    if made.process:
        made.end()


@pytest.fixture
def agent(running: Agent, kubelet: Kubelet) -> Iterator[Agent]:
    """No VF is made, and its policy makes none."""
    for nic in (PF0, PF1):
        nic.make_vfs(0)
    put(running)
    kubelet.wait_resource(FAST)
    kubelet.wait_devices(FAST, health())
    yield running
    assert list(Store(running.run).records()) == []
    assert list((running.run / "vf").glob("*")) == []
    for nic in (PF0, PF1):
        nic.make_vfs(0)


def health(*healthy: bool) -> Callable[[dict[str, Device]], bool]:
    wanted = {deviceid.format("fast", number): each for number, each in enumerate(healthy)}
    return lambda now: {id: each.healthy for id, each in now.items()} == wanted


def test_what_a_kubelet_allocates_is_the_function_that_the_pod_gets(
    node: Root, kubelet: Kubelet, agent: Agent, pods: Callable[[], Netns]
) -> None:
    put(agent, vfs=2)
    kubelet.wait_devices(FAST, health(True, True, True, True))  # before they are made
    shim = agent.shim(wait=60)
    for container, id, pf in (("c1", "fastMvp0", "pf0"), ("c2", "fastMvp2", "pf1")):
        claim = kubelet.admit(FAST, pod=("default", container))
        assert claim.devices == (id,)
        pod = pods()
        shim("ADD", config(deviceID=id), netns=pod, container=container, args=pod_args(container)).ok()
        index = pod.links()["net1"]["ifindex"]
        assert claim.response.devices[0].container_path == f"/dev/tap{index}"
        (record,) = [each for each in Store(agent.run).records() if each.container_id == container]
        assert record.vf
        assert (record.source, record.vf.number, record.device_id) == (pf, 0, id)
    assert (PF0.count(), PF1.count()) == (2, 2)
    kubelet.wait_devices(FAST, health(True, True, True, True))
    kubelet.claims.append(replace(claim, pod=("default", "c3"), devices=("fastMvp4",)))
    beyond = config(deviceID="fastMvp4")
    refused = shim("ADD", beyond, netns=pods(), container="c3", args=pod_args("c3")).error(7)
    kubelet.release(("default", "c3"))
    assert "VF 4 of pf0, pf1 was allocated, and there are 4" in refused["msg"]

    # One that takes a VF without asking the kubelet: nobody else is to be given that one's device.
    shim("ADD", config(interface="fast"), netns=pods(), container="c4").ok()
    kubelet.wait_devices(FAST, health(True, False, True, True))
    for container in ("c1", "c2", "c4"):
        shim("DEL", config(), container=container).ok()
        kubelet.release(("default", container))
    kubelet.wait_devices(FAST, health(True, True, True, True))


def test_devices_follow_the_functions_and_their_pfs(node: Root, kubelet: Kubelet, agent: Agent) -> None:
    PF1.make_vfs(3)
    kubelet.wait_devices(FAST, health(True, True, True))
    PF0.make_vfs(1)
    kubelet.wait_devices(FAST, health(True, True, True, True))
    driver = (PF1.device / "virtfn2/driver").resolve()
    (driver / "unbind").write_text(PF1.pci(2))
    kubelet.wait_devices(FAST, health(True, True, True, False))
    (driver / "bind").write_text(PF1.pci(2))
    kubelet.wait_devices(FAST, health(True, True, True, True))
    run(["ip", "link", "add", "link", PF1.netdev(2), "name", "host7", "type", "vlan", "id", "7"])
    kubelet.wait_devices(FAST, health(True, True, True, False))
    run(["ip", "link", "delete", "host7"])
    kubelet.wait_devices(FAST, health(True, True, True, True))
    run(["ip", "link", "set", "pf0", "down"])
    kubelet.wait_devices(FAST, health(False, True, True, True))
    run(["ip", "link", "set", "pf0", "up"])
    kubelet.wait_devices(FAST, health(True, True, True, True))
    PF1.make_vfs(0)
    kubelet.wait_devices(FAST, health(True))
    assert kubelet.registrations(FAST) == 1, "told by the stream"


def test_functions_that_make_no_link_are_noticed(node: Root, kubelet: Kubelet, agent: Agent) -> None:
    """No event of links tells of them."""
    probe = PF1.device / "sriov_drivers_autoprobe"
    probe.write_text("0")
    try:
        PF1.make_vfs(2)
        kubelet.wait_devices(FAST, health(False, False))
        PF1.make_vfs(0)
        kubelet.wait_devices(FAST, health())
    finally:
        probe.write_text("1")
