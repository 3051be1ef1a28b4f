"""podman with its CNI backend: the same networks, for a single host without Kubernetes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from lab.wire import LabError
from tests.runtimes.conftest import WIRE

if TYPE_CHECKING:
    from lab.podman import Podman
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
