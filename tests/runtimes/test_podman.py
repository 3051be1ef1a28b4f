"""podman with its CNI backend: the same networks, for a single host without Kubernetes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from lab.process import LabError
from tests.runtimes.conftest import WIRE

if TYPE_CHECKING:
    from lab.runtimes.podman import Podman
    from tests.runtimes.conftest import Node

NETWORKS = ("10-pods", "wire")


def _mac(podman: Podman, name: str) -> str:
    """By podman's own account."""
    shown = podman("inspect", name, "--format", "{{json .NetworkSettings.Networks}}")
    mac: str = json.loads(shown)["wire"]["MacAddress"]
    return mac


@pytest.mark.parametrize("node", ["agent", "one-shot"], indirect=True)
def test_containers_come_stop_start_and_go(node: Node) -> None:
    node.network("wire", WIRE | {"owner": 107})
    podman = node.podman()
    before = node.traces()
    names = [f"vm{number}" for number in range(4)]
    with ThreadPoolExecutor(len(names)) as threads:
        ids = list(threads.map(lambda name: podman.run(name, NETWORKS), names))
    macs = {name: _mac(podman, name) for name in names}
    records = {record["mac"]: record for record in node.records()}
    assert set(macs.values()) == set(records)
    assert {record["container_id"] for record in records.values()} == set(ids)
    for name, mac in macs.items():
        assert podman.exec(name, "cat", "/sys/class/net/eth1/address") == mac
        index = podman.exec(name, "cat", "/sys/class/net/eth1/ifindex")
        assert index == str(records[mac]["ifindex"])
        assert node.machine.path(node.device(mac)).is_char_device()

    podman("stop", "--time", "0", names[0])
    assert len(node.records()) == 3
    podman("start", names[0])
    assert _mac(podman, names[0]) == macs[names[0]]
    podman.remove(*names)
    node.left(before)


def test_a_refusal_is_what_podman_says(node: Node) -> None:
    node.network("wire", WIRE | {"source": "eth7"})
    podman = node.podman()
    before = node.traces()
    with pytest.raises(LabError, match="source device 'eth7' is not on this node"):
        podman.run("vm", NETWORKS)
    podman.remove("vm")
    node.left(before)


def test_a_container_gets_its_device_by_a_cdi_name(node: Node) -> None:
    """As a kubelet would hand the name of Allocate's answer on; the deviceID is in the config, in Multus's place."""
    node.agent.end()
    node.agent.flags += ("--device-route", "cdi")
    node.agent.start()
    node.policy({"name": "dataplane", "source": {"dev": "eth1"}, "type": "ethernet"})
    node.network("wire", {"type": "vmtap", "deviceID": "dataplaneMvp7", "mode": "bridge"})
    podman = node.podman()
    before = node.traces()
    podman.run(
        "vm", NETWORKS, "--device", "vmtap.dev/tap=dataplaneMvp7", "--user", "107:107", "--cap-drop", "all"
    )
    [record] = node.records()
    device = f"/dev/tap{record['ifindex']}"
    look = f"busybox stat -c '%u:%g %a' {device} && exec 3<>{device} && echo opened"
    assert podman.exec("vm", "sh", "-c", look).splitlines() == ["107:107 660", "opened"]
    podman.remove("vm")
    node.left(before)
