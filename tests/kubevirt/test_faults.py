"""Three faults that kubevirt/macvtap-cni has under KubeVirt and vmtap must not; pods ask as KubeVirt's would."""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cni.state import deviceid
from lab.frames import BROADCAST, ETHERTYPE, Frame, collect, packet_socket, write_tap
from lab.wire import NIC
from tests.kubevirt.conftest import LauncherPod, Nodes
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab
    from tests.runner import Plugin

MAC = "02:00:00:00:00:07"
DEVICE: dict[str, Any] = {"deviceID": "dataplaneMvp3"}
PEER_MAC = "02:00:00:00:00:fe"
MAC_IN_USE = 103
ETH_P_ALL = 0x0003
ETH_P_IPV6 = 0x86DD
ICMPV6, ROUTER_SOLICITATION = 58, 133


def test_a_refused_add_heals_at_the_kubelets_retry(lab: Lab, plugin: Plugin) -> None:
    """The same pod and deviceID, another sandbox, and no Allocate in between: the kubelet allocates once a pod.

    The old plugin made the link at Allocate and deletes it when ADD fails, so that every retry says "Link not
    found", also when what had refused it is gone.
    """
    other = LauncherPod(plugin, lab.pod("other"), vm="other")
    other.add("red", interface="dataplane", mac=MAC)
    for sandbox in (1, 2):
        pod = LauncherPod(plugin, lab.pod(f"sandbox{sandbox}"), sandbox=sandbox)
        error = pod.request("ADD", "red", mac=MAC, **DEVICE).error(MAC_IN_USE)
        assert "other" in error["msg"]
        assert "red" not in str(pod.netns.links())
        pod.request("DEL", "red", mac=MAC, **DEVICE).ok()  # the runtime's, of a sandbox that failed
    other.request("DEL", "red", interface="dataplane").ok()
    pod = LauncherPod(plugin, lab.pod("sandbox3"), sandbox=3)
    pod.add("red", mac=MAC, **DEVICE)
    link = pod.link("red")
    assert (link["address"], link["ifindex"]) == (MAC, deviceid.ifindex("dataplane", 3))
    with packet_socket(lab.peer, "eth0") as wire, _opened(pod.node("red")) as guest:
        write_tap(guest.fd, Frame(BROADCAST, MAC, "healed"))
        collect({"wire": wire}, until="healed")


def test_a_vms_pods_on_two_nodes_have_one_mac(nodes: Nodes) -> None:
    """The target of a migration gets the MAC that the guest has, though nobody gave one and all else differs.

    The old plugin leaves the MAC to the kernel, which makes up another for each link: the guest is deaf on the target.
    """
    source = LauncherPod(nodes.first, nodes.lab.pod("source"), suffix="x7k2p")
    target = LauncherPod(nodes.second, nodes.lab.pod("target"), suffix="9qwz4")
    neighbour = LauncherPod(nodes.second, nodes.lab.pod("neighbour"), vm="vm2")
    results = [
        source.add("red", deviceID="dataplaneMvp3"),
        target.add("red", deviceID="dataplaneMvp41"),
        neighbour.add("red", deviceID="dataplaneMvp3"),
    ]
    macs = [pod.link("red")["address"] for pod in (source, target, neighbour)]
    assert [result["interfaces"][0]["mac"] for result in results] == macs
    assert macs[0] == macs[1] != macs[2]


def test_the_mac_outlives_another_network_and_a_cut_name(nodes: Nodes, tmp_path: Path) -> None:
    """KubeVirt names the pod's interface after the VM's own name of the network, which the NAD reference is no part of.

    The other cluster has the same objects, and another seed.
    """
    seeds = {name: tmp_path / name for name in ("ours", "theirs")}
    for name, file in seeds.items():
        file.write_text(f"{nodes.first.policy.read_text()}\nmacSeed: {name}\n")
        file.chmod(0o644)
    first, second = (replace(plugin, policy=seeds["ours"]) for plugin in (nodes.first, nodes.second))
    elsewhere = replace(nodes.second, policy=seeds["theirs"], state=tmp_path / "state3")
    for vm in ("db", "x" * 43, "x" * 44, "x" * 63):
        pods = [
            LauncherPod(first, nodes.lab.pod(f"{len(vm)}s"), vm=vm, suffix="x7k2p"),
            LauncherPod(second, nodes.lab.pod(f"{len(vm)}t"), vm=vm, suffix="9qwz4"),
            LauncherPod(elsewhere, nodes.lab.pod(f"{len(vm)}e"), vm=vm, suffix="9qwz4"),
        ]
        networks = ("red", "blue", "red")
        macs = []
        for pod, network in zip(pods, networks, strict=True):
            macs.append(pod.add("red", name=network, **DEVICE)["interfaces"][0]["mac"])
            assert pod.link("red")["address"] == macs[-1]
            pod.request("DEL", "red", name=network, **DEVICE).ok()
        assert macs[0] == macs[1] != macs[2]


def test_the_targets_link_is_silent_until_the_guest_speaks(nodes: Nodes) -> None:
    """While the guest still runs on the source, nothing that the target's pod does takes its MAC off the source's port.

    The old plugin's link comes up with IPv6: the target's kernel sends MLD reports and neighbour and router
    solicitations with the guest's MAC, the switch believes them, and what was for the guest goes to the target.
    """
    lab = nodes.lab
    source = LauncherPod(nodes.first, lab.pod("source"), suffix="x7k2p")
    target = LauncherPod(nodes.second, lab.pod("target"), suffix="9qwz4")
    mac = source.add("red", **DEVICE)["interfaces"][0]["mac"]
    with ExitStack() as stack:
        wire = stack.enter_context(packet_socket(lab.peer, "eth0", ETH_P_ALL))
        there = stack.enter_context(_opened(source.node("red")))
        write_tap(there.fd, Frame(BROADCAST, mac, "here I am"))
        collect({"wire": wire}, until="here I am")
        assert nodes.port_of(mac) == "node"

        target.add("red", **DEVICE)
        # What it would be like: a link beside it that nobody silenced. Its last word is a router solicitation.
        control = lab.pod("control")
        nodes.second.node.ip(f"link add link {NIC} name loud netns {control.path} type macvtap mode bridge")
        control.ip("link set loud up")
        loud = control.links()["loud"]["address"]
        heard: list[Frame] = []
        numbers = itertools.count()

        def listen() -> list[Frame]:
            token = f"to the guest {next(numbers)}"
            wire.send(Frame(mac, PEER_MAC, token).pack())
            got = collect({"source": there.fd}, until=token)  # none is lost
            assert not [frame for frame in got["source"] if frame.dst == mac]
            heard.extend(collect({"wire": wire}, timeout=0)["wire"])
            return list(heard)

        def loud_solicits(frames: list[Frame]) -> bool:
            return any(frame.src == loud and _solicits_a_router(frame) for frame in frames)

        until(listen, "the control link never spoke", loud_solicits)
        assert [frame for frame in heard if frame.src == mac and frame.ethertype != ETHERTYPE] == []
        assert nodes.port_of(loud) == "node2"
        assert nodes.port_of(mac) == "node"

        # The guest has moved, and says so.
        here = stack.enter_context(_opened(target.node("red")))
        write_tap(here.fd, Frame(BROADCAST, mac, "here I am now"))
        collect({"wire": wire}, until="here I am now")
        assert nodes.port_of(mac) == "node2"
        wire.send(Frame(mac, PEER_MAC, "welcome").pack())
        collect({"target": here.fd}, until="welcome")


class _opened:  # noqa: N801 - a context manager that reads like a function
    """The device as the guest's QEMU has it: one queue, by the path that the container gets."""

    def __init__(self, node: Path) -> None:
        self.fd = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> _opened:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _solicits_a_router(frame: Frame) -> bool:
    payload = frame.token if frame.ethertype == ETH_P_IPV6 else ""
    return payload[12:14] == f"{ICMPV6:02x}" and payload[80:82] == f"{ROUTER_SOLICITATION:02x}"
