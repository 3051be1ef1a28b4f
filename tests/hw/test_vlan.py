"""VLANs on a source without virtual functions: the devices that attachments share, and the tags on the wire."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from cni.kernel import tapdev
from cni.state.store import Store
from lab.frames import BROADCAST, VNET_HEADER, Frame, collect, packet_socket, write_tap
from lab.process import run
from tests.agent.conftest import Agent
from tests.hw.nic import killed
from tests.migration.conftest import VM, arp, rarp
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lab.hw import Root
    from lab.wire import Netns
    from tests.runner import Plugin


@pytest.fixture(autouse=True)
def clean(node: Root, plugin: Plugin) -> Iterator[None]:
    """Nothing is left: no device, no state."""
    before = set(node.links())
    yield
    for record in list(Store(plugin.state).records()):
        plugin("DEL", config(), container=record.container_id, netns=record.netns).ok()
    assert set(node.links()) == before
    assert plugin.leftovers() == []


def _vlans(node: Root) -> dict[str, dict[str, Any]]:
    return {
        name: link
        for name, link in node.links().items()
        if link.get("linkinfo", {}).get("info_kind") == "vlan"
    }


@pytest.mark.parametrize("protocol", ["802.1Q", "802.1ad"])
def test_frames_have_the_tag_on_the_wire_and_none_in_the_guest(
    node: Root, plugin: Plugin, pods: Callable[[], Netns], protocol: str
) -> None:
    pod = pods()
    conf = config(source="pf1", vlan=100, vlanProtocol=protocol)
    answer = plugin("ADD", conf, netns=pod).ok()
    mac = answer["interfaces"][0]["mac"]
    pod.wait_until_up("net1")
    (record,) = Store(plugin.state).records()
    with pod.path.open() as namespace:
        (fd,) = tapdev.open_queues(namespace.fileno(), record, 1)
    # The wire's end would take the tag off into the packet's metadata: so it sends and gets by a VLAN device.
    run(
        [
            "ip",
            "link",
            "add",
            "link",
            "wire1",
            "name",
            "far",
            "up",
            "type",
            "vlan",
            "proto",
            protocol,
            "id",
            "100",
        ]
    )
    try:
        node.wait_until_up("far")
        with packet_socket(node, "far") as far:
            write_tap(fd, Frame(BROADCAST, mac, "out"))
            collect({"far": far}, until="out")
            far.send(Frame(mac, "02:00:00:00:00:99", "in").pack())
            collect({"guest": fd}, until="in")
    finally:
        os.close(fd)
        run(["ip", "link", "delete", "far"])
    plugin("CHECK", conf | {"prevResult": answer}, netns=pod).ok()


def test_attachments_share_the_device_and_the_last_one_takes_it_along(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    conf = config(source="pf1", vlan=100)
    with ThreadPoolExecutor() as threads:
        for answer in threads.map(
            lambda number: plugin("ADD", conf, netns=pods(), container=f"c{number}"), range(3)
        ):
            answer.ok()
    ((name, link),) = _vlans(node).items()
    assert link["ifalias"] == "vmtap: VLAN 100 of pf1"
    assert name.endswith(".100")
    plugin("ADD", config(source="pf1", vlan=200), netns=pods(), container="other").ok()
    assert len(_vlans(node)) == 2
    for number in range(3):
        assert name in _vlans(node)
        plugin("DEL", conf, container=f"c{number}").ok()
    assert name not in _vlans(node)


def test_somebody_elses_device_is_used_and_stays(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    run(["ip", "link", "add", "link", "pf1", "name", "theirs", "up", "type", "vlan", "id", "100"])
    try:
        plugin("ADD", config(source="pf1", vlan=100), netns=pods()).ok()
        assert set(_vlans(node)) == {"theirs"}
        plugin("DEL", config(source="pf1", vlan=100)).ok()
        assert set(_vlans(node)) == {"theirs"}
    finally:
        run(["ip", "link", "delete", "theirs"])


def _theirs(*settings: str) -> None:
    """A VLAN device of pf1 that vmtap did not make."""
    run(["ip", "link", "add", "link", "pf1", "name", "theirs", *settings, "type", "vlan", "id", "100"])


def test_the_mtu_is_that_of_somebody_elses_device(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    _theirs("up", "mtu", "1400")
    try:
        answer = plugin("ADD", config(source="pf1", vlan=100), netns=(pod := pods())).ok()
        assert (answer["interfaces"][0]["mtu"], pod.links()["net1"]["mtu"]) == (1400, 1400)
        plugin("CHECK", config(source="pf1", vlan=100, prevResult=answer), netns=pod).ok()
        plugin("DEL", config(source="pf1", vlan=100)).ok()
        refused = plugin("ADD", config(source="pf1", vlan=100, mtu=1450), netns=pod)
        assert "mtu 1450 is more than the 1400 of VLAN device 'theirs'" in refused.error(7)["msg"]
        assert plugin.leftovers() == []
    finally:
        run(["ip", "link", "delete", "theirs"])


def test_somebody_elses_device_that_is_down_is_refused(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    _theirs("down")
    try:
        refused = plugin("ADD", config(source="pf1", vlan=100), netns=pods())
        assert "'ip link set theirs up'" in refused.error(spec.SOURCE_BUSY)["msg"]
        assert "UP" not in node.links()["theirs"]["flags"]
    finally:
        run(["ip", "link", "delete", "theirs"])


@pytest.mark.parametrize("vmtaps", [True, False], ids=["of a pod of vmtap's", "of another pod"])
def test_a_device_in_a_pod_is_named(
    node: Root, plugin: Plugin, pods: Callable[[], Netns], *, vmtaps: bool
) -> None:
    """The reference plugin vlan puts the NIC's only device of the VLAN into its pod."""
    pod = pods()
    if vmtaps:
        plugin("ADD", config(source="pf1"), netns=pod, container="c0").ok()
    _theirs()
    run(["ip", "link", "set", "theirs", "netns", pod.path])
    refused = plugin("ADD", config(source="pf1", vlan=100), netns=pods())
    msg = refused.error(spec.SOURCE_BUSY)["msg"]
    assert "VLAN 100 of 'pf1' has a device in another network namespace" in msg
    assert "as 'theirs'" in msg
    assert (str(pod.path) if vmtaps else "ip netns list-id") in msg


def test_a_link_with_the_devices_name_is_left_alone(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    name = f"v{node.links()['pf1']['ifindex']:x}.100"
    run(["ip", "link", "add", name, "type", "bridge"])
    try:
        refused = plugin("ADD", config(source="pf1", vlan=100), netns=pods())
        assert name in refused.error(spec.KERNEL_REFUSED)["msg"]
        assert "UP" not in node.links()[name]["flags"]
    finally:
        run(["ip", "link", "delete", name])


def test_the_mac_is_of_a_vm_in_the_same_vlan(node: Root, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    """Two VLANs may have one MAC each; the message names the VM of the VLAN, also after the NIC was renamed."""
    mac = "02:00:00:00:00:aa"
    for vlan in (100, 200):
        conf = config(source="pf1", vlan=vlan, mac=mac)
        plugin("ADD", conf, netns=pods(), container=f"a{vlan}").ok()
    run(["ip", "link", "set", "pf1", "down"])
    run(["ip", "link", "set", "pf1", "name", "renamed", "up"])
    try:
        for vlan in (100, 200):
            conf = config(source="renamed", vlan=vlan, mac=mac)
            refused = plugin("ADD", conf, netns=pods())
            assert f"by net1 of container a{vlan}" in refused.error(spec.MAC_IN_USE)["msg"]
    finally:
        run(["ip", "link", "set", "renamed", "down"])
        run(["ip", "link", "set", "renamed", "name", "pf1", "up"])


def test_the_link_of_a_vm_that_leaves_and_comes_back(
    node: Root, pods: Callable[[], Netns], tmp_path: Path
) -> None:
    """The agent hears its MAC on the VLAN device (docs/agent.md, the handover)."""
    agent = Agent(node, tmp_path / "run", tmp_path / "interfaces.yaml", ("--reconcile-seconds", "1")).start()
    pod, conf = pods(), config(source="pf1", vlan=100, mode="bridge", mac=VM)
    try:
        agent.shim()("ADD", conf, netns=pod).ok()
        pod.wait_until_up("net1")
        (record,) = Store(agent.run).records()
        assert record.handover
        with pod.path.open() as namespace:
            (fd,) = tapdev.open_queues(namespace.fileno(), record, 1)
        run(["ip", "link", "add", "link", "wire1", "name", "far", "up", "type", "vlan", "id", "100"])
        node.wait_until_up("far")
        with packet_socket(node, "far") as far:

            def mode(announce: Callable[[], object]) -> str:
                announce()
                found: str = pod.links()["net1"]["linkinfo"]["info_data"]["mode"]
                return found

            def here() -> None:
                os.write(fd, bytes(VNET_HEADER) + arp(VM))

            for _ in range(2):
                until(lambda: mode(here), "the guest is not heard", lambda seen: seen == "bridge")
                until(
                    lambda: mode(lambda: far.send(rarp(VM))),
                    "its announcement on the VLAN is not heard",
                    lambda seen: seen == "vepa",
                )
        os.close(fd)
        run(["ip", "link", "delete", "far"])
        agent.shim()("DEL", conf, netns=pod).ok()
    finally:
        agent.end()


@pytest.mark.parametrize(
    "where", ["cni.lower.vlan._make", "cni.lower.vlan._bring_up", "cni.kernel.macvtap.create"]
)
def test_a_killed_add_leaves_nothing_after_del(plugin: Plugin, pods: Callable[[], Netns], where: str) -> None:
    pod = pods()
    conf = config(source="pf1", vlan=100)
    killed(lambda: plugin("ADD", conf, netns=pod), where, 1)
    plugin("DEL", conf, netns=pod).ok()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"device": "tap"}, "vlan is refused"),
        ({"source": "pf1", "vlanPriority": 3}, "only type sr-iov"),
        ({"source": "lo"}, "is not an Ethernet device"),
    ],
)
def test_what_cannot_be_is_refused(
    plugin: Plugin, pods: Callable[[], Netns], fields: dict[str, Any], said: str
) -> None:
    assert said in plugin("ADD", config(vlan=100, **fields), netns=pods()).error(7)["msg"]
