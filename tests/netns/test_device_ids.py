"""ADD of a device that a kubelet has allocated: the index, the node and the CDI spec that Allocate promised."""

from __future__ import annotations

import json
import os
import secrets
import stat
from fcntl import ioctl
from typing import TYPE_CHECKING

import pytest

from cni import plugin as plugins
from cni.attach.call import Request
from cni.errors import CniError
from cni.kernel import netns, tapdev
from cni.state import deviceid
from cni.state.minors import MOST, Given, Minors
from cni.state.record import boot_id
from tests.netns.conftest import records
from tests.runner import config, pod_args

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cni.state.record import Record
    from lab.wire import Lab, Netns
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


# The minor of another pod's node


def device(pod: Netns, ifname: str = "net1") -> tuple[int, int]:
    """(major, minor) of the macvtap of that name."""
    namespace = netns.open_path(str(pod.path))
    try:
        return tapdev.number(namespace, ifname)[1:]
    finally:
        os.close(namespace)


def is_reached(number: tuple[int, int], pod: Netns, ifname: str = "net1") -> bool:
    """Whether whoever has a node of that number opens the pod's macvtap by it."""
    try:
        fd = tapdev.open_node(number)
    except OSError:
        return False
    try:
        found = ioctl(fd, tapdev.SIOCGIFHWADDR, bytes(40))[18:24].hex(":")
    except OSError:
        return False
    finally:
        os.close(fd)
    return found == str(pod.links()[ifname]["address"])


def delete_own_link(plugin: Plugin, pod: Netns) -> None:
    pod.ip("link delete net1")


def end(plugin: Plugin, pod: Netns) -> None:
    plugin("DEL", config(deviceID="wireMvp0"), netns=pod, container="old").ok()


@pytest.mark.parametrize("victims", [{"deviceID": "wireMvp1"}, {"interface": "wire"}], ids=["node", "none"])
@pytest.mark.parametrize("gone", [delete_own_link, end])
def test_another_pods_link_gets_no_minor_that_a_container_may_have_a_node_of(
    lab: Lab, plugin: Plugin, gone: Callable[[Plugin, Netns], None], victims: dict[str, object]
) -> None:
    """A pod with NET_ADMIN deletes its link; or its container runs on after DEL. Its node and device rule stay."""
    old, new = lab.pod("old"), lab.pod("new")
    victims = victims | {
        "mac": f"02:{secrets.token_bytes(5).hex(':')}"
    }  # no other test's, and no other pod's
    plugin("ADD", config(deviceID="wireMvp0"), netns=old, container="old", args=pod_args("old")).ok()
    number = device(old)
    assert is_reached(number, old)
    gone(plugin, old)
    plugin("ADD", config(**victims), netns=new, container="new", args=pod_args("new")).ok()
    assert device(new) != number
    assert not is_reached(number, new)
    (record,) = records(plugin, new)
    if record.node:
        assert is_reached((os.major(found := os.stat(record.node).st_rdev), os.minor(found)), new)
    plugin("CHECK", config(**victims) | {"prevResult": result_of(record)}, netns=new, container="new").ok()
    for container, pod in (("old", old), ("new", new)):
        plugin("DEL", config(), netns=pod, container=container).ok()
    assert plugin.leftovers() == []
    assert not any(link.startswith(("lower", "m")) for link in lab.node.links())


def result_of(record: Record) -> dict[str, object]:
    interface = {"name": record.ifname, "mac": record.mac, "sandbox": record.netns}
    return {"cniVersion": "1.1.0", "interfaces": [interface]}


def test_many_minors_of_other_pods_are_passed_over(lab: Lab, plugin: Plugin) -> None:
    """Also those that are free only after the first one was passed over."""
    pod, entries = lab.pod(), Minors(str(plugin.state))
    plugin("ADD", config(interface="wire"), netns=pod, ifname="net0").ok()
    first = device(pod, "net0")[1]
    others = range(max(0, first - 20), first + 20)
    for minor in others:
        entries.give(minor, Given("a-1", boot_id(), "another"))
    plugin("ADD", config(interface="wire"), netns=pod).ok()
    assert device(pod)[1] not in others


def test_the_pod_itself_may_get_its_minor_again(lab: Lab, plugin: Plugin) -> None:
    """It gets a new sandbox, for example. An entry of an earlier boot counts for nobody."""
    pod, entries = lab.pod(), Minors(str(plugin.state))
    plugin("ADD", config(deviceID="wireMvp0"), netns=pod, args=pod_args()).ok()
    plugin("DEL", config(deviceID="wireMvp0"), netns=pod).ok()
    uid = pod_args().rpartition("=")[2]
    assert [each.pod for each in entries.all().values()] == [uid]
    many = 400  # minors are the whole machine's, and other tests take some
    for minor in range(0, many, 2):
        entries.give(minor, Given("a-1", boot_id(), uid))
        entries.give(minor + 1, Given("a-1", "an earlier boot", "another"))
    plugin("ADD", config(deviceID="wireMvp0"), netns=pod, container="c2", args=pod_args()).ok()
    assert device(pod)[1] < many
    assert entries.all()[device(pod)[1]].attachment.startswith("c2-")


def test_a_node_that_no_kubelet_passes_on_keeps_its_minor_until_del(lab: Lab, plugin: Plugin) -> None:
    pod, entries, conf = lab.pod(), Minors(str(plugin.state)), config(interface="wire", owner=107)
    plugin("ADD", conf, netns=pod).ok()
    number = device(pod)
    assert [*entries.all()] == [number[1]]
    pod.ip("link delete net1")
    other = lab.pod("other")
    plugin("ADD", config(interface="wire"), netns=other, container="c2").ok()
    assert device(other) != number
    plugin("DEL", conf, netns=pod).ok()
    assert entries.all() == {}


def test_there_is_a_limit_and_it_refuses(lab: Lab, plugin: Plugin) -> None:
    pod, entries = lab.pod(), Minors(str(plugin.state))
    far = 1 << 19
    for minor in range(far, far + MOST):
        entries.give(minor, Given("a-1", boot_id(), "another"))
    with pytest.raises(CniError, match="whose end was not seen"):
        entries.give(far - 1, Given("a-1", boot_id(), "another"))
    said = plugin("ADD", config(deviceID="wireMvp0"), netns=pod, args=pod_args()).error(11)["msg"]
    assert "its setting cgroup" in said
    assert "net1" not in pod.links()
    assert plugin.leftovers() == []
    plugin("ADD", config(interface="wire"), netns=pod).ok()
