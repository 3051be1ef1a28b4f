"""The agent as a DaemonSet: what it may do, and what the node offers by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lab.wire import NIC
from tests.cluster.conftest import CAPACITY

if TYPE_CHECKING:
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
