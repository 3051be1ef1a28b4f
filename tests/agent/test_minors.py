"""The agent keeps a minor for a pod that had a node of it until the pod's control group is gone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from cni.agent import cgroups
from cni.agent.metrics import Registry
from cni.agent.reconcile.minors import Minors as Reconciled
from cni.state.minors import Given, Minors
from cni.state.record import boot_id
from cni.state.store import Store
from lab.wire import NIC
from tests.agent.conftest import Agent
from tests.netns.test_device_ids import device
from tests.runner import config, pod_args
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Lab

UID = "6b0d3b1c-2a55-4d0e-9d5b-0f6f0a4f2b11"
OTHER = UID.replace("6b", "7c")
LAYOUTS = {
    "cgroupfs": "kubepods/burstable/pod{dashed}",
    "cgroupfs, version 1": "memory/kubepods/pod{dashed}",
    "systemd": "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{lined}.slice",
    "systemd, version 1": "memory/kubepods.slice/kubepods-pod{lined}.slice",
    "kind": "system.slice/x.service/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{lined}.slice",
}
CONF = config(deviceID="dataMvp0", mode="bridge")


@dataclass
class Node:
    """An agent, with folders in the place of its host's control groups."""

    lab: Lab
    agent: Agent
    groups: Path

    @property
    def entries(self) -> Minors:
        return Minors(str(self.agent.run))

    def group(self, layout: str, uid: str = UID) -> Path:
        """The folder of a pod's group, made."""
        path = self.groups / layout.format(dashed=uid, lined=uid.replace("-", "_"))
        path.mkdir(parents=True)
        return path

    def entry(self) -> Given:
        """The only entry."""
        (given,) = self.entries.all().values()
        return given


@pytest.fixture
def node(lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """Not started."""
    flags = ("--cgroup", str(tmp_path / "cgroup"), "--reconcile-seconds", "1")
    made = Node(
        lab, Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags), tmp_path / "cgroup"
    )
    made.agent.policy.write_text(f"interfaces: [{{name: data, source: {{dev: {NIC}}}}}]")
    yield made
    if made.agent.process:
        made.agent.end()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_minor_is_free_again_when_the_pods_group_is_gone(node: Node, layout: str) -> None:
    group = node.group(layout)
    node.group(layout, OTHER)
    node.agent.start()
    shim, old, new = node.agent.shim(), node.lab.pod("old"), node.lab.pod("new")
    shim("ADD", CONF, netns=old, container="old", args=pod_args(uid=UID)).ok()
    number = device(old)
    assert node.entry().cgroup == str(group), "seen by the ADD itself"
    shim("DEL", CONF, netns=old, container="old").ok()
    shim("ADD", config(interface="data"), netns=new, container="new").ok()
    assert device(new) != number
    assert node.entry().pod == UID
    group.rmdir()
    assert node.agent.wait_for("a minor is free again")["minor"] == number[1]
    assert node.entries.all() == {}


def test_without_a_view_of_the_groups_it_stays(node: Node) -> None:
    """The agent is started without the mount, for example: no group is there, and that proves nothing."""
    layout = LAYOUTS["cgroupfs"]
    group = node.group(layout)
    node.agent.start()
    shim, pod = node.agent.shim(), node.lab.pod()
    shim("ADD", CONF, netns=pod, args=pod_args(uid=UID)).ok()
    shim("DEL", CONF, netns=pod).ok()
    shutil.rmtree(node.groups)
    node.agent.end()
    node.agent.start()
    shim("ADD", config(deviceID="dataMvp1"), netns=pod, container="c2", args=pod_args(uid=OTHER)).ok()
    minors = node.entries.all()
    assert sorted(each.pod for each in minors.values()) == [UID, OTHER]
    assert [each.cgroup for each in minors.values() if each.pod == OTHER] == [""]
    group.parent.mkdir(parents=True)  # as the host has it
    node.agent.wait_for("a minor is free again")
    assert node.entry().pod == OTHER
    node.group(layout, OTHER)
    until(lambda: node.entry().cgroup != "", "the group that came late was not seen")


def test_a_pod_without_a_uid_is_found_by_its_sandbox(node: Node) -> None:
    """Runtimes of before 2021 have no K8S_POD_UID."""
    group = node.group(LAYOUTS["systemd"])
    container = "d" * 64
    (group / f"cri-containerd-{container}.scope").mkdir()
    (group / f"cri-containerd-{container[1:]}.scope").mkdir()
    node.agent.start()
    args = pod_args().rpartition(";")[0]
    node.agent.shim()("ADD", CONF, netns=node.lab.pod(), container=container, args=args).ok()
    until(lambda: node.entry().cgroup == str(group), "the group was not found")
    assert node.entry().pod == container


def test_records_without_an_entry_get_one(node: Node) -> None:
    """Those of an agent that wrote none, and what an earlier boot left."""
    node.agent.start()
    shim, pod = node.agent.shim(), node.lab.pod()
    shim("ADD", CONF, netns=pod, args=pod_args(uid=UID)).ok()
    [(minor, given)] = node.entries.all().items()
    node.agent.end()
    node.entries.remove(minor)
    node.entries.give(minor + 1, Given("a-1", "an earlier boot", UID))
    node.entries.give(minor + 2, Given("b-1", boot_id()))
    node.agent.start()
    until(lambda: node.entries.all() == {minor: given}, f"not as before: {node.entries.all()}")


@pytest.mark.parametrize("pod", ["", UID])
def test_an_attachment_that_is_being_adopted_is_left_alone(node: Node, pod: str) -> None:
    """Its link is there and its record is not: its entry stays, and no lock is taken that adoption would miss."""
    store = Store(node.agent.run)
    store.prepare()
    store.minors.give(1, Given("a-1", boot_id(), pod))
    looking = Reconciled(
        SimpleNamespace(store=store),  # type: ignore[arg-type]
        cgroups.Cgroups(str(node.groups)),
        Registry(),
    )
    node.group(LAYOUTS["cgroupfs"])
    looking.complete(["a-1"])
    with patch.object(Store, "locked", side_effect=AssertionError):
        looking.look()
    assert node.entry() == Given("a-1", boot_id(), pod)
    looking.complete([])
    looking.look()
    assert node.entries.all().get(1) != Given("a-1", boot_id(), pod)
