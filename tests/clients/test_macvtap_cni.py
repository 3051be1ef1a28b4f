"""A network config of kubevirt/macvtap-cni, as its users have it, on the executable under its name."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lab.wire import Lab
    from tests.runner import Plugin

POLICY = """
interfaces:
  - name: dataplane
    source: {dev: eth1}
    modes: [vepa, bridge]
  - name: other # a bridge is a lower device like any other
    source: {dev: br0}
"""


@pytest.fixture
def macvtap(plugin: Plugin) -> Plugin:
    """The executable under the old name, on a node with a policy."""
    plugin.policy.write_text(POLICY)
    plugin.policy.chmod(0o644)
    return replace(plugin, executable="macvtap")


def _config(**fields: Any) -> dict[str, Any]:
    return {"cniVersion": "0.3.1", "name": "dataplane", "type": "macvtap", **fields}


def test_the_device_id_selects_the_interface(lab: Lab, macvtap: Plugin) -> None:
    pod = lab.pod()
    answer = macvtap(
        "ADD", _config(deviceID="dataplaneMvp7", mtu=1400), netns=pod, args="MAC=02:00:00:00:00:07"
    ).ok()
    link = pod.links()["net1"]
    assert answer["interfaces"] == [{"name": "net1", "mac": "02:00:00:00:00:07", "sandbox": str(pod.path)}]
    assert (link["linkinfo"]["info_kind"], link["linkinfo"]["info_data"]["mode"]) == ("macvtap", "vepa")
    assert (link["address"], link["mtu"], link["link_index"]) == (
        "02:00:00:00:00:07",
        1400,
        lab.node.links()["eth1"]["ifindex"],
    )
    macvtap("DEL", _config(deviceID="dataplaneMvp7"), netns=pod).ok()
    assert macvtap.leftovers() == []


@pytest.mark.parametrize(("fields", "owner"), [({}, (107, 107)), ({"owner": 5, "group": 6}, (5, 6))])
def test_the_device_belongs_to_qemu(
    lab: Lab, macvtap: Plugin, fields: dict[str, int], owner: tuple[int, int]
) -> None:
    pod = lab.pod()
    macvtap("ADD", _config(deviceID="dataplaneMvp7", **fields), netns=pod).ok()
    (node,) = [path for path in macvtap.leftovers() if "/dev/" in path]
    status = os.stat(node)
    assert (status.st_uid, status.st_gid) == owner
    assert stat.S_ISCHR(status.st_mode)
    assert node.endswith(f"/tap{pod.links()['net1']['ifindex']}")


def test_promisc_mode(lab: Lab, macvtap: Plugin) -> None:
    pod = lab.pod()
    macvtap("ADD", _config(deviceID="otherMvp0", promiscMode=True), netns=pod).ok()
    link = pod.links()["net1"]
    assert "PROMISC" in link["flags"]
    assert link["linkinfo"]["info_kind"] == "macvtap"


def test_an_interface_that_no_policy_names(lab: Lab, macvtap: Plugin) -> None:
    error = macvtap("ADD", _config(deviceID="databaseMvp0"), netns=lab.pod()).error(7)
    assert "dataplane" in error["msg"]


def test_without_a_device_id(lab: Lab, macvtap: Plugin) -> None:
    """What the old plugin called `failed to lookup device ""`."""
    error = macvtap("ADD", _config(), netns=lab.pod()).error(7)
    assert "deviceID" in error["msg"]
