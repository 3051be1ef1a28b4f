"""containerd with runc, driven over CRI as a kubelet does it: what a pod gets, and what is left of it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from lab.proto import cri_pb2 as api
from lab.runtimes.containerd import SANDBOX
from lab.runtimes.cri import Container, CriError, Pod
from tests.fakeipam import GATE, FakeIpam
from tests.runtimes.conftest import WIRE
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.runtimes.containerd import Containerd
    from tests.runtimes.conftest import Node

SLEEP = Container(SANDBOX, ["/bin/busybox", "sleep", "infinity"])
SHELL = ["/bin/busybox", "sh", "-euc"]
OWN_DEV = """
mount -t tmpfs -o mode=755 none /dev
mkdir /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 none /dev/pts
ln -s pts/ptmx /dev/ptmx
ln -s /proc/self/fd /dev/fd
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/zero c 1 5
mknod -m 666 /dev/full c 1 7
mknod -m 666 /dev/random c 1 8
mknod -m 666 /dev/urandom c 1 9
"""
"""What a runtime gives a privileged container but for the host's devices."""


def _at_once(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(len(names)) as threads:
        return list(threads.map(function, names))


def _interface(containerd: Containerd, pod: Pod, name: str = "eth1") -> dict[str, Any]:
    """What containerd noted of an interface of the pod."""
    interface: dict[str, Any] = containerd.cri.details(pod)["cniResult"]["Interfaces"][name]
    return interface


@pytest.mark.parametrize("node", ["agent", "one-shot"], indirect=True)
def test_pods_outlive_a_killed_containerd(node: Node) -> None:
    node.network("20-wire", WIRE)
    with node.containerd() as containerd:
        before = node.traces()
        pods = _at_once(containerd.cri.run_pod, [f"pod{number}" for number in range(10)])
        macs = {_interface(containerd, pod)["Mac"] for pod in pods}
        assert len(macs) == 10
        container = containerd.cri.run(pods[0], SLEEP)
        containerd.kill()
        assert {record["mac"] for record in node.records()} == macs
        containerd.start()
        assert containerd.cri.pods() == {pod.id: True for pod in pods}
        index = int(containerd.cri.exec(container, [*SHELL, "busybox cat /sys/class/net/eth1/ifindex"]))
        assert index in {record["ifindex"] for record in node.records()}
        pods += _at_once(containerd.cri.run_pod, ["late0", "late1"])
        _at_once(containerd.cri.remove_pod, [pod.id for pod in pods])
        assert containerd.cri.pods() == {}
        node.left(before)


def test_an_add_whose_containerd_was_killed_is_undone(node: Node) -> None:
    """Nobody is there to take its result. The DEL that comes with containerd's return finds nothing to do."""
    ipam = FakeIpam(node.folder / "ipam")
    (node.plugins / "fake").symlink_to(ipam.folder / "fake")
    ipam.write(ADD=GATE)
    gate = ipam.seen / "gate"
    os.mkfifo(gate)
    node.network("20-wire", WIRE | {"ipam": ipam.config})
    with node.containerd() as containerd, ThreadPoolExecutor(1) as thread:
        before = node.traces()
        pod = thread.submit(containerd.cri.run_pod, "pod")
        until(lambda: ipam.leases() != set(), "the delegate was not run")
        containerd.kill()
        with pytest.raises(CriError):
            pod.result()
        with gate.open("w") as answer:
            answer.write("go on\n")
        until(lambda: not ipam.leases() and not node.records(), "the ADD is not undone")
        ipam.write()
        containerd.start()
        [(killed, ready)] = containerd.cri.pods().items()
        assert not ready
        again = containerd.cri.run_pod("pod", attempt=1)
        assert len(node.records()) == 1
        _at_once(containerd.cri.remove_pod, [killed, again.id])
        assert not ipam.leases()
        node.left(before)


def test_a_refusal_reaches_the_pods_events(node: Node) -> None:
    node.policy({"name": "dataplane", "source": {"dev": "eth1"}, "type": "ethernet", "modes": ["vepa"]})
    node.network("20-wire", {"type": "vmtap", "interface": "dataplane", "mode": "bridge"})
    with node.containerd() as containerd:
        before = node.traces()
        with pytest.raises(CriError, match=r'mode: "bridge" is refused: interface \S+ allows vepa'):
            containerd.cri.run_pod("pod")
        node.left(before)
        node.policy({"name": "dataplane", "source": {"dev": "eth1"}, "type": "ethernet"})
        pod = containerd.cri.run_pod("pod")
        containerd.cri.remove_pod(pod.id)
        node.left(before)


def test_a_result_that_containerd_does_not_know_leaves_nothing(node: Node) -> None:
    node.network("20-wire", WIRE, version="1.1.0")
    with node.containerd() as containerd:
        before = node.traces()
        with pytest.raises(CriError, match="unsupported CNI result version"):
            containerd.cri.run_pod("pod")
        node.left(before)


def test_the_agent_is_restarted_while_pods_come_and_go(node: Node) -> None:
    node.network("20-wire", WIRE)
    with node.containerd() as containerd:
        before = node.traces()

        enough = threading.Event()

        def come_and_go(name: str) -> None:
            """Pod after pod, and retries as a kubelet makes them."""
            for attempt in itertools.count():
                try:
                    containerd.cri.remove_pod(containerd.cri.run_pod(name, attempt=attempt).id)
                except CriError as error:
                    assert "the agent" in str(error), error
                else:
                    if enough.is_set():
                        return

        with ThreadPoolExecutor(4) as threads:
            rounds = [threads.submit(come_and_go, f"pod{number}") for number in range(4)]
            try:
                for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
                    until(lambda: bool(node.records()), "no pod is attached")
                    node.agent.end(number)
                    node.agent.start()
            finally:
                enough.set()
            for each in rounds:
                each.result()
        assert node.agent.get("/healthz")[0] == 200
        node.left(before)


@pytest.mark.parametrize("its_own", [False, True], ids=["the kernel's /dev", "a /dev of its own"])
def test_a_container_opens_its_own_device_and_no_other(node: Node, its_own: bool) -> None:
    """What a device plugin's DeviceSpec comes to: here, the device is named by hand.

    Also where the node is a container itself, as kind's are: the kernel's devtmpfs, with its tap nodes, is not there.
    """
    if its_own:
        node.machine.run(["/bin/sh", "-euc", OWN_DEV])
    node.network("20-wire", WIRE | {"owner": 107, "group": 107})
    with node.containerd() as containerd:
        before = node.traces()
        own, other = _at_once(containerd.cri.run_pod, ["own", "other"])
        tap = node.device(_interface(containerd, own)["Mac"])
        assert node.machine.path(f"/dev/{tap.name}").exists() != its_own
        device = api.Device(container_path=f"/dev/{tap.name}", host_path=str(tap), permissions="rw")
        user = Container(
            SANDBOX, SLEEP.command, devices=[device], user=107, group=107, drop=["ALL"], no_new_privs=True
        )
        container = containerd.cri.run(own, user)
        look = f"busybox stat -c '%u:%g %a %t:%T' /dev/{tap.name}; exec 3<>/dev/{tap.name}; echo opened"
        shown, opened = containerd.cri.exec(container, [*SHELL, look]).splitlines()
        owner, mode, number = shown.split()
        assert (owner, mode, opened) == ("107:107", "660", "opened")

        # Root with the right to make nodes, in another pod: its device cgroup says no.
        root = containerd.cri.run(other, SLEEP)
        major, minor = (int(word, 16) for word in number.split(":"))
        make = f"busybox mknod /tmp-tap c {major} {minor}; exec 3<>/tmp-tap"
        with pytest.raises(CriError, match="Operation not permitted"):
            containerd.cri.exec(root, [*SHELL, make])
        _at_once(containerd.cri.remove_pod, [own.id, other.id])
        node.left(before)
