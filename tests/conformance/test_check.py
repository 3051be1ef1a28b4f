"""Checklist items 22 and 23: CHECK is true after ADD, and false when something that ADD made is not so any more."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import netns, tapdev
from cni.state.store import in_netns
from lab.wire import BRIDGE, NIC
from tests.conformance.test_invocation import VERSIONS, each_device
from tests.runner import config

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab, Netns
    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin

CHECKED = [version for version in VERSIONS if version >= "0.4.0"]


def test_item_22_needs_prev_result(plugin: Plugin, pod: Netns) -> None:
    """Without prevResult CHECK is error 7; with a malformed one, or one that cannot be ours, an error too."""
    conf = config(source=NIC)
    plugin("ADD", conf, netns=pod).ok()
    assert "prevResult is missing" in plugin("CHECK", conf, netns=pod).error(7)["msg"]
    plugin("CHECK", conf | {"prevResult": {"interfaces": 5}}, netns=pod).error(6)
    plugin("CHECK", conf | {"prevResult": {"interfaces": [{"name": "net1"}]}}, netns=pod).error(108)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("link delete net1", "gone"),
        ("link set net1 down", "state"),
        ("link set net1 address 02:00:00:00:16:01", "MAC"),
        ("link set net1 mtu 1500", "MTU"),
        ("link set net1 alias other", "ifalias"),
        ("link delete net1; link add net1 type bridge; link set net1 up alias vmtap/wire/c1/net1", "kind"),
    ],
)
@each_device
def test_item_22_link(plugin: Plugin, pod: Netns, fields: dict[str, Any], change: str, named: str) -> None:
    """Error 108 names what is wrong with the link: gone, down, its MAC, a greater MTU, its alias, its kind."""
    conf = config(mtu=1400, **fields)
    result = plugin("ADD", conf, netns=pod).ok()
    pod.ip(*change.split("; "))
    error = plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)
    assert named in error["msg"]


def test_item_22_mode(plugin: Plugin, pod: Netns) -> None:
    """Its mode."""
    conf = config(source=NIC, mode="vepa")
    result = plugin("ADD", conf, netns=pod).ok()
    pod.ip("link set net1 type macvtap mode bridge")
    assert "mode" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)["msg"]


def test_item_22_lower_device(plugin: Plugin, pod: Netns, spare: str) -> None:
    """Its lower device: the policy's name means another NIC now."""
    policy = "interfaces:\n- {{name: dataplane, source: {{dev: {0}}}, type: ethernet}}\n"
    plugin.policy.write_text(policy.format(NIC))
    conf = config(interface="dataplane")
    result = plugin("ADD", conf, netns=pod).ok()
    plugin.policy.write_text(policy.format(spare))
    assert "lower device" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)["msg"]


def test_item_22_replaced(plugin: Plugin, pod: Netns, lab: Lab) -> None:
    """That it is the very link that ADD made: one that looks the same has another index."""
    conf = config(source=NIC)
    result = plugin("ADD", conf, netns=pod).ok()
    mac = result["interfaces"][0]["mac"]
    pod.ip("link delete net1")
    lab.node.ip(f"link add link {NIC} name net1 netns {pod.path} address {mac} type macvtap mode bridge")
    pod.ip("link set net1 alias vmtap/wire/c1/net1", "link set net1 up")
    assert "ifindex" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)["msg"]


@pytest.mark.parametrize("change", ["nomaster", "isolated", "delete"])
def test_item_22_bridge_port(plugin: Plugin, pod: Netns, lab: Lab, change: str) -> None:
    """A tap's port: on that bridge, and isolated or not as the mode says."""
    conf = config(source=BRIDGE, device="tap", mode="bridge")
    result = plugin("ADD", conf, netns=pod).ok()
    port = result["interfaces"][1]["name"]
    if change == "isolated":
        lab.node.run(["bridge", "link", "set", "dev", port, "isolated", "on"])
    else:
        lab.node.ip(f"link delete {port}" if change == "delete" else f"link set {port} nomaster")
    error = plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)
    assert BRIDGE in error["msg"]


def test_item_22_addresses(plugin: Plugin, pod: Netns, host_local: HostLocal) -> None:
    """With "addressing": "link", the addresses that are on it."""
    conf = config(source=NIC, addressing="link", ipam=host_local.ipam)
    result = plugin("ADD", conf, netns=pod).ok()
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    pod.ip("address delete 10.9.0.2/24 dev net1")
    assert "10.9.0.2/24" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)["msg"]


@pytest.mark.parametrize("change", ["gone", "another device"])
def test_item_22_device_node(plugin: Plugin, pod: Netns, change: str) -> None:
    """The device node that ADD made for an owner: there, and of the link's character device."""
    conf = config(source=NIC, owner=107, group=107)
    result = plugin("ADD", conf, netns=pod).ok()
    (node,) = (plugin.state / "dev").iterdir()
    assert (node.stat().st_uid, node.stat().st_gid) == (107, 107)
    node.unlink()
    if change == "another device":
        os.mknod(node, 0o20660, os.makedev(1, 3))
    assert str(node) in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(108)["msg"]


@pytest.mark.parametrize(
    "change",
    ["mtu 1300", "promisc on", "allmulticast off", "txqueuelen 77", "MAC"],
)
@each_device
def test_item_22_tolerates(plugin: Plugin, pod: Netns, fields: dict[str, Any], change: str) -> None:
    """What a later plugin may change, as tuning does (a MAC with prevResult's), is no error."""
    result = plugin("ADD", config(**fields), netns=pod).ok()
    if change == "MAC":
        result["interfaces"][0]["mac"] = "02:00:00:00:16:02"
        change = "address 02:00:00:00:16:02"
    pod.ip(f"link set net1 {change}")
    plugin("CHECK", config(prevResult=result, **fields), netns=pod).ok()


def test_item_22_tolerates_the_chain(plugin: Plugin, pod: Netns) -> None:
    """Interfaces, addresses and routes of others in prevResult are not ours to judge."""
    result = plugin("ADD", config(source=NIC), netns=pod).ok()
    result["interfaces"].insert(0, {"name": "ifb0", "mac": "02:00:00:00:16:03"})
    result["ips"] = [{"address": "192.0.2.9/24", "interface": 0}, {"address": "192.0.2.8/24", "interface": 1}]
    result["routes"] = [{"dst": "198.51.100.0/24", "gw": "192.0.2.1"}]
    plugin("CHECK", config(source=NIC, prevResult=result), netns=pod).ok()


@each_device
def test_item_22_opens_nothing(plugin: Plugin, pod: Netns, fields: dict[str, Any]) -> None:
    """CHECK opens no queue, which would take frames: it is true also while all that there can be are open."""
    result = plugin("ADD", config(**fields), netns=pod).ok()
    namespace = netns.open_path(str(pod.path))
    try:
        (record,) = in_netns(plugin.state, netns.identity(namespace))
        queues = tapdev.open_queues(namespace, record, 256 if record.device == "macvtap" else 1)
    finally:
        os.close(namespace)
    try:
        plugin("CHECK", config(prevResult=result, **fields), netns=pod).ok()
    finally:
        for fd in queues:
            os.close(fd)


def test_item_22_delegate(plugin: Plugin, pod: Netns, fake: FakeIpam, host_local: HostLocal) -> None:
    """The delegate's CHECK runs, and its error is ours; host-local finds a lease that is lost."""
    fake.write(CHECK="""echo '{"code": 117, "msg": "no such lease"}'; exit 1""")
    conf = config(source=NIC, ipam=fake.config)
    result = plugin("ADD", conf, netns=pod).ok()
    assert "no such lease" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(117)["msg"]
    plugin("DEL", conf, netns=pod).ok()

    conf = config(source=NIC, ipam=host_local.ipam)
    result = plugin("ADD", conf, netns=pod).ok()
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    (lease,) = host_local.folder.glob("*/10.*")
    lease.unlink()
    assert plugin("CHECK", conf | {"prevResult": result}, netns=pod).status == 1


@pytest.mark.parametrize("version", CHECKED)
@each_device
def test_item_23_true_after_add(
    plugin: Plugin, pod: Netns, host_local: HostLocal, version: str, fields: dict[str, Any]
) -> None:
    """Right after ADD, in every version that has CHECK, with what ADD answered."""
    conf = config(cniVersion=version, ipam=host_local.ipam, **fields)
    result = plugin("ADD", conf, netns=pod).ok()
    answer = plugin("CHECK", conf | {"prevResult": result}, netns=pod)
    assert (answer.status, answer.stdout) == (0, b"")


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "vepa", "promisc": True, "allmulti": False, "bcqueuelen": 100},
        {"mode": "pepa", "mtu": 1280, "queues": 4},
        {"owner": 107, "addressing": "link"},
        {"source": BRIDGE, "device": "tap", "mode": "pepa", "queues": 2, "owner": 107},
        {"source": BRIDGE, "device": "macvtap"},
        {"source": None, "device": "tap", "promisc": True, "addressing": "link"},
    ],
)
def test_item_23_options(plugin: Plugin, pod: Netns, host_local: HostLocal, fields: dict[str, Any]) -> None:
    """So with every option."""
    given = {"source": NIC} | fields
    conf = config(ipam=host_local.ipam, **{key: value for key, value in given.items() if value is not None})
    result = plugin("ADD", conf, netns=pod).ok()
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    plugin("DEL", conf, netns=pod).ok()
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


def test_item_23_without_record(plugin: Plugin, pod: Netns, tmp_path: Path) -> None:
    """So where the record is lost: link and prevResult say enough."""
    result = plugin("ADD", config(source=NIC), netns=pod).ok()
    other = replace(plugin, state=tmp_path / "another")
    other("CHECK", config(source=NIC, prevResult=result), netns=pod).ok()


@pytest.mark.parametrize("change", ["macSeed: other", "macPrefix: '02:ab:cd'"])
def test_a_changed_derivation_of_macs_leaves_running_attachments(
    plugin: Plugin, pod: Netns, change: str
) -> None:
    """CHECK compares with the result of ADD; only the next ADD gets another MAC."""
    entry = f"interfaces: [{{name: wire, source: {{dev: {NIC}}}}}]"
    plugin.policy.write_text(f"{entry}\nmacSeed: one\n")
    conf = config(interface="wire")
    result = plugin("ADD", conf, netns=pod).ok()
    plugin.policy.write_text(f"{entry}\n{change}\n")
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    before = pod.links()["net1"]["address"]
    assert before == result["interfaces"][0]["mac"]
    plugin("DEL", conf, netns=pod).ok()
    after = plugin("ADD", conf, netns=pod).ok()["interfaces"][0]["mac"]
    assert after != before
    assert after.startswith("02:ab:cd:") is ("Prefix" in change)
