"""The agent as a DaemonSet: what it may do, and what the node offers by it."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lab.kubernetes.cluster import NODE
from lab.wire import NIC
from tests.agent.conftest import Agent
from tests.cluster.conftest import CAPACITY, pod
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.kubernetes.cluster import Cluster
    from tests.cluster.conftest import Release

HEADER = Path("/usr/include/linux/capability.h")


def test_it_is_ready_with_its_stated_capabilities_and_no_other(release: Release) -> None:
    machine = release.cluster.machine
    [container] = release.daemonset()["spec"]["template"]["spec"]["containers"]
    stated = container["securityContext"]["capabilities"]
    assert stated["drop"] == ["ALL"]
    numbers = dict(re.findall(r"#define CAP_(\w+)\s+(\d+)\n", HEADER.read_text()))
    mask = sum(1 << int(numbers[name]) for name in stated["add"])
    [process] = [number for number, command in machine.processes().items() if "vmtapd" in command]
    lines = machine.path(f"/proc/{process}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    for name in ("CapBnd", "CapPrm", "CapEff"):
        assert int(status[name], 16) == mask, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_idle_connections_fail_no_probe(release: Release) -> None:
    """On both addresses, for longer than a pod that fails its readiness probe stays ready."""
    [node] = release.cluster.get("nodes")["items"]
    [address] = [each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP"]

    def connect() -> list[socket.socket]:
        idle = [("127.0.0.1", 9742), (address, 9741)] * 100
        return [socket.create_connection(each, timeout=LIMIT) for each in idle]

    def status() -> tuple[int, bool]:
        items = json.loads(release.kubectl("get", "pods", "-o", "json"))["items"]
        [agent] = [each for each in items if each["metadata"]["name"].startswith("vmtap-")]
        [container] = agent["status"]["containerStatuses"]
        return container["restartCount"], container["ready"]

    before = status()
    until = time.monotonic() + 25
    with ExitStack() as stack:
        while time.monotonic() < until:
            for each in release.cluster.lab.node.call(connect):
                stack.enter_context(each)
            assert status() == before == (before[0], True)
            time.sleep(1)


def test_the_nodes_resources_follow_the_interfaces(release: Release) -> None:
    release.wait_resource("dataplane", CAPACITY)
    release.wait_resource("narrow", 1)
    usual = release.values["interfaces"]
    other = {"name": "another", "source": {"dev": "br0"}, "capacity": 3}
    release.install(interfaces=[{**usual[0], "capacity": 7}, other])
    release.wait_resource("dataplane", 7)
    release.wait_resource("another", 3)
    release.wait_resource("narrow", 0)
    release.install(interfaces=usual)
    release.wait_resource("dataplane", CAPACITY)
    release.wait_resource("narrow", 1)
    release.wait_resource("another", 0)


def test_a_nic_without_carrier_has_nothing_to_allocate(release: Release) -> None:
    release.wait_resource("dataplane", CAPACITY)
    release.cluster.lab.switch.ip("link set node down")
    try:
        release.wait_resource("dataplane", 0)
        release.wait_resource("dataplane", CAPACITY, "capacity")
    finally:
        release.cluster.lab.switch.ip("link set node up")
    release.cluster.lab.node.wait_until_up(NIC)
    release.wait_resource("dataplane", CAPACITY)


def test_when_the_older_of_two_plugins_ends_the_node_keeps_the_devices(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Kubernetes 1.34 disconnects the newer one then. The resource namespace is the agents' own."""
    policy = tmp_path / "interfaces.yaml"
    policy.write_text(json.dumps({"interfaces": [{"name": "data", "source": {"dev": NIC}, "capacity": 3}]}))
    flags = ("--device-plugin", "--resource-namespace", "overlap.example.org")
    older, newer = (Agent(cluster.machine, tmp_path / name, policy, flags) for name in ("older", "newer"))
    path = r"{.status.allocatable.overlap\.example\.org/data}"
    wanting = pod("overlap")
    wanting["spec"]["containers"][0]["resources"] = {"limits": {"overlap.example.org/data": 1}}
    try:
        older.start().said("registered with the kubelet")
        cluster.wait(f"node/{NODE}", f"jsonpath={path}=3")
        newer.start().said("registered with the kubelet")
        older.end()
        lost = newer.wait_for("not registered; tried again")
        assert lost["error"] == "the kubelet ended its ListAndWatch stream"
        newer.wait_for("registered with the kubelet")
        cluster.wait(f"node/{NODE}", f"jsonpath={path}=3")
        cluster.apply(wanting)
        assert newer.wait_for("allocated")["resource"] == "overlap.example.org/data"
    finally:
        cluster.kubectl("delete", "pod", "overlap", "--ignore-not-found", f"--timeout={LIMIT}s")
        for each in (older, newer):
            if each.process:
                each.end()
