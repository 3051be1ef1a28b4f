"""Claims in sandboxes of containerd 2, which has NRI and CDI, without a kubelet: what starts, and with what device.

A pod that runs without its NIC, or with another pod's device, must never be.
"""

from __future__ import annotations

import os
import signal
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.state import cdi
from cni.state.claims import Claim, ClaimDevice, Claims
from cni.state.store import Store
from lab.assets.programs import CLUSTER
from lab.runtimes.containerd import SANDBOX, Containerd
from lab.runtimes.cri import Container, CriError
from lab.runtimes.machine import Machine
from tests.agent.claims.conftest import WIRE
from tests.agent.conftest import SHIM, Agent
from tests.runner import pod_args
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.runtimes.cri import Pod
    from lab.wire import Lab

RUN = "/run/vmtap"
CDI = "/run/cdi"
SLEEP = ["/bin/busybox", "sleep", "infinity"]
SHELL = ["/bin/busybox", "sh", "-euc"]
PODS = """
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "ipam":
 {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]]}}]}
"""
WITHOUT_NRI = """
[plugins."io.containerd.nri.v1.nri"]
disable = true
"""


@dataclass
class Node:
    """A machine with an agent that attaches claims. The test is the kubelet, and Prepare."""

    lab: Lab
    machine: Machine
    folder: Path
    agent: Agent

    def containerd(self, more: str = "") -> Containerd:
        """Started now; a context manager. more: the end of its config."""
        programs = CLUSTER.get()
        path = f"{programs}:{os.environ['PATH']}"
        return Containerd(
            self.machine,
            self.folder,
            netconf=self.folder / "net.d",
            plugins=programs / "cni",
            env={"PATH": path},
            more=more,
        )

    def connected(self) -> None:
        """Waits until the agent is a plugin of the runtime's."""
        self.agent.wait_for("NRI")

    def restart(self) -> None:
        """Start the agent, and wait until it is a plugin of the runtime's, which it may be before it is ready."""
        self.agent.log.clear()
        self.agent.start()
        self.agent.said("NRI")

    def give(self, device: int, netns: str) -> None:
        """Let a macvtap in that network namespace have the device's minor, which is free."""
        show = "mount -t sysfs none /sys; cat /sys/class/net/$0/macvtap/*/dev"
        for number in range(
            64
        ):  # the kernel gives the lowest one that is free, and other tests take some, too
            name = f"stolen{number}"
            self.machine.run(["ip", "link", "add", "link", "eth1", "name", name, "type", "macvtap"])
            made = self.machine.run(["unshare", "-m", "sh", "-ec", show, name]).stdout.strip()
            self.lab.node.ip(f"link set {name} netns {self.machine.path(netns)}")
            if made == f"{os.major(device)}:{os.minor(device)}":
                return
        pytest.fail("no macvtap got the minor")

    @property
    def store(self) -> Store:
        return Store(self.machine.path(RUN))

    def prepare(self, pod: str = "vm") -> Claim:
        """What Prepare leaves."""
        device = ClaimDevice(
            request="nic",
            device="wire-0",
            pool="node",
            share="",
            ifname="net1",
            ifindex=0,
            mac=None,
            config={"cniVersion": "1.1.0", "name": "claim-nic", "type": "vmtap", **WIRE},
            args=pod_args(pod, "lab", f"uid-{pod}"),
        )
        claim = Claim(str(uuid.uuid4()), "lab", f"{pod}-nic", f"uid-{pod}", pod, (device,))
        index = self.store.reserve_ifindex(claim.attachment(device))
        claim = replace(claim, devices=(replace(device, ifindex=index),))
        Claims(self.machine.path(RUN)).save(claim)
        self.machine.path(CDI).mkdir(exist_ok=True)
        cdi.write_claim(str(self.machine.path(CDI)), claim, {}, str(self.folder / "bin/hook"), RUN)
        return claim

    def container(self, claim: Claim) -> Container:
        """A container that gets the claim's device."""
        return Container(SANDBOX, SLEEP, cdi=[cdi.claim_name(claim.uid, 0)])

    def netns(self, containerd: Containerd, pod: Pod) -> str:
        """The path of a pod's network namespace on the machine."""
        spaces = containerd.cri.details(pod)["runtimeSpec"]["linux"]["namespaces"]
        return str(next(each["path"] for each in spaces if each["type"] == "network"))

    def shown(self, containerd: Containerd, container: str, claim: Claim) -> tuple[str, str]:
        """(the device of the container's node, the device of its link), both as MAJOR:MINOR; opens the node."""
        index = claim.devices[0].ifindex
        node, link = f"/dev/tap{index}", f"/sys/class/net/net1/macvtap/tap{index}/dev"
        script = f"exec 3<>{node}; busybox stat -c '%t:%T' {node}; busybox cat {link}"
        have, want = containerd.cri.exec(container, [*SHELL, script]).split()
        return ":".join(str(int(word, 16)) for word in have.split(":")), want


@pytest.fixture
def node(lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """The agent runs; containerd does not."""
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d/10-pods.conflist").write_text(PODS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/vmtap-hook").symlink_to(SHIM)
    (tmp_path / "bin/hook").write_text(f'#!/bin/sh\nVMTAP_WAIT=2 exec {tmp_path}/bin/vmtap-hook "$@"\n')
    (tmp_path / "bin/hook").chmod(0o755)
    (tmp_path / "interfaces.yaml").write_text('{"interfaces": [{"name": "wire", "source": {"dev": "eth1"}}]}')
    lab.node.ip("link add cni0 up type bridge")  # the plugin would make it, and leave it
    with Machine(lab.node) as machine:
        agent = Agent(
            machine,
            Path(RUN),
            tmp_path / "interfaces.yaml",
            flags=("--dra", "--node=node", f"--hook={tmp_path}/bin/vmtap-hook"),
            env={"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"},
        )
        made = Node(lab, machine, tmp_path, agent)
        agent.start()
        yield made
        if agent.process:
            agent.end()


@pytest.fixture
def containerd(node: Node) -> Iterator[Containerd]:
    """With NRI, and the agent connected."""
    with node.containerd() as made:
        node.connected()
        yield made


def test_a_pods_life(node: Node, containerd: Containerd) -> None:
    claim = node.prepare()
    pod = containerd.cri.run_pod("vm")
    container = containerd.cri.run(pod, node.container(claim))
    have, want = node.shown(containerd, container, claim)
    assert have == want
    record = node.store.load(claim.attachment(claim.devices[0]))
    assert record
    assert record.netns == node.netns(containerd, pod)
    containerd.cri.remove(container)
    again = containerd.cri.run(pod, node.container(claim))  # the container starts again in its sandbox
    assert node.shown(containerd, again, claim) == (want, want)
    containerd.cri.remove_pod(pod.id)
    assert node.store.load(record.id) is None
    assert not Path(node.store.node(record.ifindex)).exists()
    assert node.store.reserved_by(record.ifindex) == record.id
    second = containerd.cri.run_pod("vm", attempt=1)
    once_more = containerd.cri.run(second, node.container(claim))
    have, want = node.shown(containerd, once_more, claim)
    assert have == want


def test_a_pod_whose_claim_cannot_be_attached_has_no_sandbox(node: Node, containerd: Containerd) -> None:
    node.prepare()
    node.agent.policy.write_text('{"interfaces": []}')
    with pytest.raises(CriError, match="ResourceClaim lab/vm-nic, request nic"):
        containerd.cri.run_pod("vm")
    containerd.cri.run_pod("another")


def test_a_dead_driver_and_a_remade_sandbox(node: Node, containerd: Containerd) -> None:
    """The first sandbox's device node stays on the node, and its minor is another pod's by now."""
    claim = node.prepare()
    first = containerd.cri.run_pod("vm")
    containerd.cri.run(first, node.container(claim))
    index = claim.devices[0].ifindex
    left = Path(node.store.node(index)).stat().st_rdev
    node.agent.end(signal.SIGKILL)
    containerd.cri.stop_pod(first.id)
    other = containerd.cri.run_pod("other")
    node.give(left, node.netns(containerd, other))
    assert Path(node.store.node(index)).stat().st_rdev == left

    second = containerd.cri.run_pod(
        "vm", attempt=1
    )  # NRI has no plugin, so nothing keeps the sandbox from being
    stale = containerd.cri.create(second, node.container(claim), "stale")
    with pytest.raises(CriError, match="the agent vmtapd does not answer"):
        containerd.cri.start(stale)

    node.restart()
    until(lambda: node.store.load(claim.attachment(claim.devices[0])), "the claim is not attached")
    until(lambda: Path(node.store.node(index)).exists(), "there is no device node")
    container = containerd.cri.run(second, node.container(claim), "heals")
    have, want = node.shown(containerd, container, claim)
    assert have == want


def test_a_container_with_a_node_of_another_pod(node: Node, containerd: Containerd) -> None:
    """Created while the driver was dead, it is started when the agent answers: its node is the other pod's."""
    claim = node.prepare()
    first = containerd.cri.run_pod("vm")
    left = Path(node.store.node(claim.devices[0].ifindex)).stat().st_rdev
    node.agent.end(signal.SIGKILL)
    containerd.cri.stop_pod(first.id)
    other = containerd.cri.run_pod("other")
    node.give(left, node.netns(containerd, other))
    second = containerd.cri.run_pod("vm", attempt=1)
    stale = containerd.cri.create(second, node.container(claim), "stale")
    node.restart()
    with pytest.raises(CriError, match="create the container again"):
        containerd.cri.start(stale)
    container = containerd.cri.run(second, node.container(claim), "heals")
    have, want = node.shown(containerd, container, claim)
    assert have == want


def test_two_pods_with_one_claim(node: Node, containerd: Containerd) -> None:
    claim = node.prepare("first")
    first, second = containerd.cri.run_pod("first"), containerd.cri.run_pod("second")
    container = containerd.cri.run(first, node.container(claim))
    with pytest.raises(CriError, match=r"lab/first .*a device has one pod"):
        containerd.cri.run(second, node.container(claim))
    have, want = node.shown(containerd, container, claim)
    assert have == want
    containerd.cri.remove_pod(second.id)
    assert node.shown(containerd, container, claim) == (want, want)


def test_containerd_is_killed_and_started_again(node: Node, containerd: Containerd) -> None:
    claim, late = node.prepare(), node.prepare("late")
    pod = containerd.cri.run_pod("vm")
    container = containerd.cri.run(pod, node.container(claim))
    before = node.shown(containerd, container, claim)
    containerd.kill()
    containerd.start()
    node.connected()
    assert node.shown(containerd, container, claim) == before
    second = containerd.cri.run_pod("late")
    until(lambda: Path(node.store.node(late.devices[0].ifindex)).exists(), "there is no device node")
    other = containerd.cri.run(second, node.container(late))
    have, want = node.shown(containerd, other, late)
    assert have == want
    # The ended sandbox of a pod is listed when the agent connects, and the pod's next one is attached.
    containerd.cri.stop_pod(pod.id)
    node.agent.end(signal.SIGKILL)
    third = containerd.cri.run_pod("vm", attempt=1)
    node.restart()
    until(lambda: Path(node.store.node(claim.devices[0].ifindex)).exists(), "there is no device node")
    again = containerd.cri.run(third, node.container(claim), "again")
    have, want = node.shown(containerd, again, claim)
    assert have == want
    containerd.cri.remove_pod(pod.id)  # of the sandbox that has ended
    assert node.shown(containerd, again, claim) == (want, want)


def test_without_nri_the_hook_attaches(node: Node) -> None:
    claim = node.prepare()
    with node.containerd(WITHOUT_NRI) as containerd:
        pod = containerd.cri.run_pod("vm")
        with pytest.raises(CriError, match=r"device 1:3 .* create the container again"):
            containerd.cri.run(pod, node.container(claim), "first")
        container = containerd.cri.run(pod, node.container(claim))
        have, want = node.shown(containerd, container, claim)
        assert have == want
        index = int(containerd.cri.exec(container, [*SHELL, "busybox cat /sys/class/net/net1/ifindex"]))
        assert index == claim.devices[0].ifindex
        containerd.cri.remove_pod(pod.id)
        until(lambda: node.store.load(claim.attachment(claim.devices[0])) is None, "the attachment stays")
        assert node.store.reserved_by(index) == claim.attachment(claim.devices[0])


def test_the_agent_is_away_and_the_container_fails(node: Node, containerd: Containerd) -> None:
    claim = node.prepare()
    pod = containerd.cri.run_pod("vm")
    node.agent.end(signal.SIGKILL)
    with pytest.raises(CriError, match="the agent vmtapd does not answer"):
        containerd.cri.run(pod, node.container(claim), "one")
    node.agent.start()
    container = containerd.cri.run(pod, node.container(claim), "two")
    have, want = node.shown(containerd, container, claim)
    assert have == want
