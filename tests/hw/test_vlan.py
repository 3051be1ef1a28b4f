"""VLANs on a source without virtual functions: the devices that attachments share, and the tags on the wire."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

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

    from lab.wire import Netns
    from tests.hw.nic import Root
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
