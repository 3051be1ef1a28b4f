"""What a config asks for is on the link, and only that; read back from the kernel."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import netns, tapdev
from lab.frames import BROADCAST, ETHERTYPE, Frame, collect, packet_socket, write_tap
from lab.wire import BRIDGE, NIC, Lab
from tests.fakeipam import FakeIpam
from tests.netns.conftest import records
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fakeipam import FakeIpam
    from tests.netns.conftest import Attached
from tests.runner import Plugin

MAC = "02:00:00:00:01:01"
OTHER = "02:00:00:00:01:02"
THIRD = "02:00:00:00:01:03"
PEER_MAC = "02:00:00:00:00:fe"
LAUNCHER = "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=virt-launcher-{vm}-{suffix}"

KINDS: list[dict[str, Any]] = [{"source": NIC}, {"source": BRIDGE}, {"device": "tap"}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["macvtap", "bridge-tap", "plain-tap"])


def tap_mac(attached: Attached) -> str:
    return str(attached.link()["address"])


@pytest.mark.parametrize(
    ("fields", "args", "mac"),
    [
        ({"mac": MAC}, "", MAC),
        ({"mac": MAC}, f"MAC={OTHER}", OTHER),
        (
            {"mac": MAC, "capabilities": {"mac": True}, "runtimeConfig": {"mac": THIRD}},
            f"MAC={OTHER}",
            THIRD,
        ),
    ],
    ids=["config", "CNI_ARGS", "runtimeConfig"],
)
def test_the_mac_that_is_given(
    lab: Lab, attach: Callable[..., Attached], fields: dict[str, Any], args: str, mac: str
) -> None:
    made = attach(lab.pod(), source=NIC, args=args, **fields)
    assert (made.link()["address"], made.record.mac, made.result["interfaces"][0]["mac"]) == (mac, mac, mac)


@each_kind
def test_a_frame_for_the_mac_arrives(lab: Lab, attach: Callable[..., Attached], kind: dict[str, Any]) -> None:
    """A macvtap's MAC is the guest's, a plain tap's must not be."""
    made = attach(lab.pod(), mac=MAC, **kind)
    assert (tap_mac(made) == MAC) is ("source" in kind)
    link = "net1" if "source" not in kind else "eth0"
    with packet_socket(made.pod if "source" not in kind else lab.peer, link) as other:
        other.send(Frame(MAC, PEER_MAC, "to the guest").pack())
        collect({"guest": made.fd}, until="to the guest")
        write_tap(made.fd, Frame(PEER_MAC, MAC, "from the guest"))
        collect({"other": other}, until="from the guest")


def test_the_derived_mac_is_the_vms_on_any_node(
    lab: Lab, plugin: Plugin, attach: Callable[..., Attached], tmp_path: Path
) -> None:
    def mac(vm: str, suffix: str, container: str) -> str:
        args = LAUNCHER.format(vm=vm, suffix=suffix)
        made = attach(lab.pod(), source=NIC, args=args, container=container, opened=False)
        return made.record.mac

    here = mac("db", "abcde", "c1")
    assert int(here[:2], 16) & 3 == 2  # locally administered, unicast
    assert mac("web", "abcde", "c2") != here
    with Lab() as elsewhere:  # another node: the pod of the migrated VM
        there = replace(plugin, node=elsewhere.node, state=tmp_path / "elsewhere")
        args = LAUNCHER.format(vm="db", suffix="fghij")
        target = there("ADD", config(source=NIC), netns=elsewhere.pod(), args=args, container="c9").ok()
    assert target["interfaces"][0]["mac"] == here


@each_kind
def test_mtu(attach: Callable[..., Attached], lab: Lab, kind: dict[str, Any]) -> None:
    by_default = attach(lab.pod(), container="c1", **kind)
    assert by_default.link()["mtu"] == by_default.record.mtu == 1500
    assert by_default.result["interfaces"][0]["mtu"] == 1500
    given = attach(lab.pod(), container="c2", mtu=1400, **kind)
    assert given.link()["mtu"] == 1400


def test_the_mtu_is_the_sources(plugin: Plugin) -> None:
    with Lab(mtu=9000) as jumbo:
        there = replace(plugin, node=jumbo.node)
        for at, source in enumerate((NIC, BRIDGE)):
            pod = jumbo.pod()
            there("ADD", config(source=source), netns=pod, container=f"c{at}").ok()
            assert pod.links()["net1"]["mtu"] == 9000
            there("DEL", config(source=source), netns=pod, container=f"c{at}").ok()


def test_flags(lab: Lab, attach: Callable[..., Attached]) -> None:
    plain = attach(lab.pod(), container="c1", source=NIC, opened=False).link()
    assert {"UP", "ALLMULTI"} <= set(plain["flags"])
    assert "PROMISC" not in plain["flags"]
    other = attach(lab.pod(), container="c2", source=NIC, promisc=True, allmulti=False, opened=False).link()
    assert {"UP", "PROMISC"} <= set(other["flags"])
    assert "ALLMULTI" not in other["flags"]


def test_allmulti_brings_groups_that_nobody_joined(lab: Lab, attach: Callable[..., Attached]) -> None:
    groups = [f"33:33:ff:00:00:{at:02x}" for at in range(16)]
    hears = attach(lab.pod(), container="c1", source=NIC)
    deaf = attach(lab.pod(), container="c2", source=NIC, allmulti=False)
    with packet_socket(lab.peer, "eth0") as peer:
        for group in groups:
            peer.send(Frame(group, PEER_MAC, group).pack())
        peer.send(Frame(BROADCAST, PEER_MAC, "marker").pack())
        got = collect({"hears": hears.fd, "deaf": deaf.fd}, until="marker")
    assert [frame.token for frame in got["hears"]] == groups
    # The filter is a hash of 256 values: a stray group may share one with a group that the pod's kernel is in.
    assert len(got["deaf"]) < len(groups) / 2


def test_bcqueuelen(lab: Lab, attach: Callable[..., Attached]) -> None:
    link = attach(lab.pod(), source=NIC, bcqueuelen=1234, opened=False).link()
    assert link["linkinfo"]["info_data"]["bcqueuelen"] == 1234


@each_kind
def test_alias_and_ifindex(lab: Lab, attach: Callable[..., Attached], kind: dict[str, Any]) -> None:
    made = attach(lab.pod(), container="c1", opened=False, **kind)
    link = made.link()
    assert link["ifalias"] == "vmtap/wire/c1/net1"
    assert link["ifindex"] == made.record.ifindex >= 0x10000000


def test_ifindexes_are_unique_on_the_host(lab: Lab, plugin: Plugin) -> None:
    pods = [lab.pod(f"p{at}") for at in range(8)]

    def add(at: int) -> None:
        plugin("ADD", config(source=NIC), netns=pods[at], container=f"c{at}").ok()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(len(pods))))
    indexes = {pod.links()["net1"]["ifindex"] for pod in pods}
    assert len(indexes) == len(pods)
    assert indexes == {record.ifindex for pod in pods for record in records(plugin, pod)}


@each_kind
def test_two_queues_share_the_frames(lab: Lab, attach: Callable[..., Attached], kind: dict[str, Any]) -> None:
    made = attach(lab.pod(), queues=2, mac=MAC, **kind)
    assert len(made.fds) == 2
    link = "net1" if "source" not in kind else "eth0"
    with packet_socket(made.pod if "source" not in kind else lab.peer, link) as other:
        tokens = [f"frame {at}" for at in range(32)]
        for at, token in enumerate(tokens):
            other.send(Frame(MAC, f"02:00:00:00:02:{at:02x}", token).pack())
        got: list[str] = []

        def read() -> list[str]:
            for frames in collect({"first": made.fds[0], "second": made.fds[1]}, timeout=0.1).values():
                # On a plain tap the pod's kernel is the other end, and may speak.
                got.extend(frame.token for frame in frames if frame.ethertype == ETHERTYPE)
            return list(got)

        until(read, "not every frame arrived at one of the two", lambda arrived: len(arrived) >= len(tokens))
        assert sorted(got) == sorted(tokens)
        for at, fd in enumerate(made.fds):
            write_tap(fd, Frame(PEER_MAC, MAC, f"from queue {at}"))
            collect({"other": other}, until=f"from queue {at}")


@pytest.mark.parametrize("source", [None, BRIDGE])
def test_the_owner_of_a_tap(lab: Lab, attach: Callable[..., Attached], source: str | None) -> None:
    where = {"source": source} if source else {}
    uid, gid = 40107, 40108  # nobody's: ip shows names where there are any
    made = attach(lab.pod(), device="tap", owner=uid, group=gid, opened=False, **where)
    data = made.link()["linkinfo"]["info_data"]
    assert (data["user"], data["group"], data["persist"]) == (uid, gid, True)


def test_the_owner_of_a_macvtaps_node(lab: Lab, plugin: Plugin, attach: Callable[..., Attached]) -> None:
    made = attach(lab.pod(), source=NIC, owner=107, group=108, opened=False)
    node = plugin.state / "dev" / f"tap{made.record.ifindex}"
    status = node.stat()
    assert stat.S_ISCHR(status.st_mode)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (107, 108, 0o660)
    namespace = netns.open_path(str(made.pod.path))
    try:
        _, *number = tapdev.number(namespace, "net1")
    finally:
        os.close(namespace)
    assert status.st_rdev == os.makedev(*number)
    plugin("DEL", config(source=NIC), netns=made.pod).ok()
    assert plugin.leftovers() == []


def test_the_pods_name_may_be_the_hosts(lab: Lab, attach: Callable[..., Attached]) -> None:
    before = lab.node.links()
    made = attach(lab.pod(), source=NIC, ifname=NIC)
    assert made.pod.links()[NIC]["linkinfo"]["info_kind"] == "macvtap"
    after = lab.node.links()
    assert after.keys() == before.keys()
    assert {name: link["ifindex"] for name, link in after.items()} == {
        name: link["ifindex"] for name, link in before.items()
    }


def test_addresses_are_the_guests_unless_asked_for(lab: Lab, plugin: Plugin, tmp_path: Path) -> None:
    ipam = FakeIpam(tmp_path / "ipam")
    by_ipam = [{"dst": "10.7.0.0/16"}, {"dst": "10.8.0.0/16", "gw": "10.6.0.9", "priority": 77}]
    ips = [{"address": "10.6.0.5/24", "gateway": "10.6.0.1"}, {"address": "fd06::5/64"}]
    ipam.write(answer={"cniVersion": "1.1.0", "ips": ips, "routes": by_ipam})
    leasing = replace(plugin, cni_path=str(ipam.folder))

    def show(addressing: str, container: str, source: str) -> tuple[str, str]:
        pod = lab.pod()
        fields = config(source=source, addressing=addressing, ipam=ipam.config)
        result = leasing("ADD", fields, netns=pod, container=container).ok()
        assert [ip["address"] for ip in result["ips"]] == ["10.6.0.5/24", "fd06::5/64"]
        leasing("CHECK", fields | {"prevResult": result}, netns=pod, container=container).ok()
        addresses = pod.run(["ip", "-br", "address", "show", "dev", "net1"]).stdout
        routes = pod.run(["ip", "route", "show", "dev", "net1"]).stdout
        return addresses, routes

    for at, source in enumerate((NIC, BRIDGE)):
        addresses, routes = show("guest", f"g{at}", source)
        assert "10.6.0.5" not in addresses
        assert "fd06::5" not in addresses
        assert routes == ""
    addresses, routes = show("link", "l0", NIC)
    assert "10.6.0.5/24" in addresses
    assert "fd06::5/64" in addresses
    assert "10.7.0.0/16 via 10.6.0.1" in routes
    assert "10.8.0.0/16 via 10.6.0.9" in routes
    assert "metric 77" in routes
