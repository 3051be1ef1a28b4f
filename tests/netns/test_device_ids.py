"""ADD of a device that a kubelet has allocated: the index, the node and the CDI spec that Allocate promised."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import pytest

from cni import plugin as plugins
from cni.attach.call import Request
from cni.state import deviceid
from tests.runner import config

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab
    from tests.runner import Plugin

POLICY = """
interfaces:
  - {name: wire, source: {dev: eth1}, capacity: 3}
  - {name: bridge, source: {dev: br0}}
"""


@pytest.fixture(autouse=True)
def policy(plugin: Plugin) -> None:
    plugin.policy.write_text(POLICY)
    plugin.policy.chmod(0o644)


def test_the_link_and_the_node_that_were_promised(lab: Lab, plugin: Plugin) -> None:
    pod, conf = lab.pod(), config(deviceID="wireMvp2")
    for _ in range(2):  # the index is the same each time
        plugin("ADD", conf, netns=pod).ok()
        index = pod.links()["net1"]["ifindex"]
        assert index == deviceid.ifindex("wire", 2)
        status = (plugin.state / "dev" / f"tap{index}").stat()
        assert stat.S_ISCHR(status.st_mode)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (107, 107, 0o660)
        plugin("CHECK", conf | {"prevResult": plugin_result(plugin)}, netns=pod).ok()
        plugin("DEL", conf, netns=pod).ok()
        assert plugin.leftovers() == []


def plugin_result(plugin: Plugin) -> dict[str, object]:
    """prevResult for CHECK, from the record."""
    (path,) = (plugin.state / "attachments").glob("*.json")
    record = json.loads(path.read_text())
    interface = {"name": record["ifname"], "mac": record["mac"], "sandbox": record["netns"]}
    return {"cniVersion": "1.1.0", "interfaces": [interface]}


def test_a_device_that_is_in_use_still(lab: Lab, plugin: Plugin) -> None:
    """Its pod is going, and the next one came first: to be tried again, and then it works."""
    old, new, conf = lab.pod("old"), lab.pod("new"), config(deviceID="wireMvp0")
    plugin("ADD", conf, netns=old, container="old").ok()
    said = plugin("ADD", conf, netns=new, container="new").error(11)["msg"]
    assert "wireMvp0" in said
    assert "old" in said
    assert "net1" not in new.links()
    plugin("DEL", conf, netns=old, container="old").ok()
    plugin("ADD", conf, netns=new, container="new").ok()
    plugin("DEL", conf, netns=new, container="new").ok()
    assert plugin.leftovers() == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"deviceID": "wireMvp3"}, "wireMvp0 to wireMvp2"),
        ({"deviceID": "bridgeMvp100"}, "offers 100 devices"),
        ({"deviceID": "bridgeMvp1", "device": "tap"}, "resource name"),
        ({"deviceID": "wireMvp4096", "interface": None}, "names no interface"),
    ],
)
def test_a_device_that_cannot_be(lab: Lab, plugin: Plugin, fields: dict[str, object], said: str) -> None:
    given = {key: value for key, value in fields.items() if value is not None}
    assert said in plugin("ADD", config(**given), netns=lab.pod()).error(7)["msg"]
    assert plugin.leftovers() == []


def test_a_device_of_a_bridge_is_a_macvtap(lab: Lab, plugin: Plugin) -> None:
    """Without a device id a tap would be made; what a kubelet allocates has a node."""
    pod, conf = lab.pod(), config(deviceID="bridgeMvp99")
    plugin("ADD", conf, netns=pod).ok()
    assert pod.links()["net1"]["linkinfo"]["info_kind"] == "macvtap"
    plugin("DEL", conf, netns=pod).ok()


def test_cdi(lab: Lab, plugin: Plugin, tmp_path: Path) -> None:
    pod, folder = lab.pod(), tmp_path / "cdi"

    def handle(command: str) -> plugins.Response:
        env = plugin.environment(command, pod)
        stdin = json.dumps(config(deviceID="wireMvp1", owner=5)).encode()
        given = plugin.given(cdi=str(folder))
        return plugin.node.call(lambda: plugins.handle(Request(env, stdin), given))

    assert handle("ADD").status == 0
    (path,) = folder.iterdir()
    assert path.name == "vmtap-wireMvp1.json"
    spec = json.loads(path.read_text())
    (device,) = spec["devices"]
    (node,) = device["containerEdits"]["deviceNodes"]
    index = deviceid.ifindex("wire", 1)
    made = os.stat(plugin.state / "dev" / f"tap{index}").st_rdev
    assert (spec["kind"], device["name"], node["path"]) == ("vmtap.dev/tap", "wireMvp1", f"/dev/tap{index}")
    assert (os.makedev(node["major"], node["minor"]), node["uid"], node["gid"]) == (made, 5, 107)
    assert handle("DEL").status == 0
    assert list(folder.iterdir()) == []
    assert plugin.leftovers() == []
