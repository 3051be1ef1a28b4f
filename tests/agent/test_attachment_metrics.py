"""The metrics of each attachment, after real frames through its fd, and where something of it is gone."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from cni.agent import attachment_metrics
from cni.agent.metrics import Registry
from cni.kernel import nft
from cni.state.store import Store
from lab.frames import VNET_HEADER, packet_socket
from lab.wire import BRIDGE, NIC
from tests.agent.conftest import Agent
from tests.agent.test_metrics import Samples, parse
from tests.netns.conftest import open_queues
from tests.netns.test_port import ALL_PROTOCOLS, FOREIGN, SPOOFED, ethernet
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cni.state.record import Record
    from lab.wire import Lab, Netns

POLICY = f"""
interfaces:
- {{name: nic, source: {{dev: {NIC}}}, port: {{macSpoofCheck: true, trunk: []}}}}
- {{name: bridged, source: {{dev: {BRIDGE}}}, port: {{macSpoofCheck: true, trunk: []}}}}
- {{name: shaped, source: {{dev: {NIC}}}, port: {{rate: {{out: 1Mbit}}}}}}
- {{name: policed, source: {{dev: {NIC}}}, port: {{rate: {{in: 1Mbit}}}}}}
- {{name: bridged-shaped, source: {{dev: {BRIDGE}}}, port: {{rate: {{in: 1Mbit}}}}}}
- {{name: bridged-policed, source: {{dev: {BRIDGE}}}, port: {{rate: {{out: 1Mbit}}}}}}
"""
LAUNCHER = "IgnoreUnknown=1;K8S_POD_NAMESPACE=tenant;K8S_POD_NAME=virt-launcher-web-abcde"
BODY = b"\x88\xb5" + bytes(86)
"""Of a frame of 100 bytes without a tag."""
SENT = 2000
"""More frames than a queue has room for."""
SO_SNDBUFFORCE = 32


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags=("--metrics", "127.0.0.1:0"))
    made.policy.write_text(POLICY)
    yield made.start()
    if made.process:
        made.end()


def attach(agent: Agent, pod: Netns, interface: str, *, container: str = "c1", args: str = "") -> Record:
    conf = config(interface=interface)
    agent.shim()("ADD", conf, netns=pod, container=container, args=args).ok()
    return next(each for each in Store(agent.run).records() if each.container_id == container)


def read(lab: Lab, run: Path) -> Samples:
    """What an agent with that state folder would show now."""
    registry = Registry()
    attachment_metrics.declare(registry, Store(run))

    def failed(name: str, error: Exception) -> None:
        raise AssertionError(name) from error

    return parse(lab.node.call(lambda: registry.render(failed)).decode())


def of(samples: Samples, name: str, **labels: str) -> dict[str, float]:
    """The last label's value → the sample's, of the metric's samples with these labels."""
    last = {"refused_frames_total": "reason"}.get(name, "direction")
    return {
        dict(found)[last]: value
        for (each, found), value in samples.items()
        if each == f"vmtap_attachment_{name}" and labels.items() <= dict(found).items()
    }


@pytest.mark.parametrize("interface", ["nic", "bridged"])
def test_the_traffic_of_a_guest(agent: Agent, lab: Lab, interface: str) -> None:
    """What is refused counts as traffic where the filters are behind the link, seen from where the frame comes."""
    pod = lab.pod()
    record = attach(agent, pod, interface, args=LAUNCHER)
    if interface == "bridged":
        lab.node.wait_until_up(f"vth{record.ifindex:08x}")
    (fd,) = open_queues(pod, record)
    pod.wait_until_up("net1")
    tagged = ((0x8100, 7),)
    mine, foreign = ethernet(BODY, src=record.mac), ethernet(BODY, src=SPOOFED)
    theirs = ethernet(BODY, src=FOREIGN, dst=record.mac)
    other = ethernet(BODY, src=FOREIGN, dst=record.mac, tags=tagged)
    try:
        with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
            for frame in (mine, mine, mine, foreign, foreign):
                os.write(fd, bytes(VNET_HEADER) + frame)
            for frame in (other, theirs, theirs, theirs, theirs):
                peer.send(frame)
            for _ in range(4):
                os.read(fd, 1 << 16)
    finally:
        os.close(fd)
    names = {"namespace": "tenant", "pod": "virt-launcher-web-abcde", "interface": "net1"}
    status, _, text = agent.get("/metrics")
    assert status == 200
    found = parse(text)
    macvtap = interface == "nic"
    assert of(found, "packets_total", **names) == ({"in": 5, "out": 3} if macvtap else {"in": 4, "out": 5})
    assert of(found, "bytes_total", **names) == (
        {"in": 500, "out": 300} if macvtap else {"in": 400, "out": 500}
    )
    assert of(found, "drops_total", **names) == {"in": 0, "out": 0}
    refused = of(found, "refused_frames_total", **names)
    assert refused == {"source-mac": 2, "other-mac": 0, "tag-sent": 0, "tag-received": 1}
    info = {
        **names,
        "mac": record.mac,
        "vm": "web",
        "network": record.network,
        "source": NIC if macvtap else BRIDGE,
        "mode": "bridge" if interface == "bridged" else str(record.mode),
        "device": record.device,
    }
    assert found["vmtap_attachment_info", tuple(sorted(info.items()))] == 1


@pytest.mark.parametrize("interface", ["nic", "bridged"])
def test_a_guest_that_does_not_read(agent: Agent, lab: Lab, interface: str) -> None:
    """A macvtap counts what it drops as received, too; a tap counts what is read."""
    pod = lab.pod()
    record = attach(agent, pod, interface)
    (fd,) = open_queues(pod, record)
    pod.wait_until_up("net1")
    if interface == "bridged":
        lab.node.wait_until_up(f"vth{record.ifindex:08x}")
    names = {"namespace": "", "pod": "c1", "interface": "net1"}
    drained = 0

    def accounted() -> float:
        """Those that the guest has read now, and those that were dropped."""
        nonlocal drained
        with suppress(BlockingIOError):
            while os.read(fd, 1 << 16):
                drained += 1
        return drained + of(read(lab, agent.run), "drops_total", **names)["in"]

    try:
        os.set_blocking(fd, False)
        with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
            # What waits in a queue is still in the sender's buffer.
            peer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 24)
            for _ in range(SENT):
                peer.send(ethernet(BODY, src=FOREIGN, dst=record.mac))
            until(accounted, "frames are missing", lambda now: now == SENT)
    finally:
        os.close(fd)
    found = parse(agent.get("/metrics")[2])
    drops = of(found, "drops_total", **names)
    assert drops["in"] > 0
    assert drops == {"in": SENT - drained, "out": 0}
    assert of(found, "packets_total", **names)["in"] == (SENT if interface == "nic" else drained)


@pytest.mark.parametrize(
    ("interface", "direction"),
    [("shaped", "out"), ("policed", "in"), ("bridged-shaped", "in"), ("bridged-policed", "out")],
)
def test_what_exceeds_the_rate_is_refused(agent: Agent, lab: Lab, interface: str, direction: str) -> None:
    pod = lab.pod()
    record = attach(agent, pod, interface)
    if interface.startswith("bridged"):
        lab.node.wait_until_up(f"vth{record.ifindex:08x}")
    (fd,) = open_queues(pod, record)
    pod.wait_until_up("net1")
    theirs = ethernet(BODY.ljust(1400), src=FOREIGN, dst=record.mac)
    mine = bytes(VNET_HEADER) + ethernet(BODY.ljust(1400), src=record.mac)
    try:
        with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
            peer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 24)
            for _ in range(200):
                if direction == "out":
                    os.write(fd, mine)
                else:
                    peer.send(theirs)
            names = {"pod": "c1", "interface": "net1"}
            refused = until(
                lambda: of(read(lab, agent.run), "refused_frames_total", **names),
                "nothing is refused",
                lambda now: now.get("rate", 0) > 0,
            )
    finally:
        os.close(fd)
    assert refused.keys() == {"rate"}
    assert refused["rate"] < 200


def test_they_can_be_off(lab: Lab, tmp_path: Path) -> None:
    flags = ("--metrics", "127.0.0.1:0", "--no-attachment-metrics")
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags=flags).start()
    try:
        agent.shim()("ADD", config(source=NIC, mode="vepa"), netns=lab.pod()).ok()
        text = agent.get("/metrics")[2]
    finally:
        agent.end()
    assert "vmtap_attachments{" in text
    assert "vmtap_attachment_" not in text


@pytest.mark.parametrize("interface", ["nic", "bridged"])
@pytest.mark.parametrize("gone", ["link", "alias", "namespace"])
def test_what_is_gone_has_no_values(agent: Agent, lab: Lab, interface: str, gone: str) -> None:
    pod, other = lab.pod(), lab.pod()
    attach(agent, pod, interface)
    attach(agent, other, interface, container="other")
    agent.end()  # or it would repair this
    if gone == "link":
        pod.ip("link del net1")
    elif gone == "alias":
        pod.ip("link set net1 alias vmtap/x/y/z")
    else:
        pod.close()
    found = read(lab, agent.run)
    assert {dict(labels)["pod"] for _, labels in found} == {"other"}
    assert of(found, "refused_frames_total", pod="other").keys() == {
        "source-mac",
        "other-mac",
        "tag-sent",
        "tag-received",
    }


def test_filters_that_are_gone_are_not_zero(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod, "nic")
    agent.end()
    pod.run(["nft", "flush", "ruleset"])
    found = read(lab, agent.run)
    assert of(found, "refused_frames_total") == {}
    assert of(found, "packets_total").keys() == {"in", "out"}


def test_without_nf_tables_the_rest_is_there(agent: Agent, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(agent, lab.pod(), "nic")
    agent.end()
    monkeypatch.setattr(nft, "NETLINK_NETFILTER", 31)  # a protocol without a driver: EPROTONOSUPPORT
    found = read(lab, agent.run)
    assert of(found, "refused_frames_total") == {}
    assert of(found, "packets_total").keys() == {"in", "out"}


def test_the_newest_of_a_pods_name(agent: Agent, lab: Lab) -> None:
    """A StatefulSet's pod was replaced, and its last sandbox has not ended."""
    for number in range(4):  # the order of their ids is another one
        args = "K8S_POD_NAMESPACE=tenant;K8S_POD_NAME=db-0"
        conf = config(interface="nic", mac=f"02:00:00:00:01:0{number}")
        agent.shim()("ADD", conf, netns=lab.pod(), container=f"c{number}", args=args).ok()
    agent.end()
    for newest in Store(agent.run).records():
        for each in Store(agent.run).records():
            os.utime(agent.run / f"attachments/{each.id}.json", (each == newest, each == newest))
        found = read(lab, agent.run)
        macs = [dict(labels)["mac"] for name, labels in found if name == "vmtap_attachment_info"]
        assert macs == [newest.mac]


def test_a_table_without_end_does_not_keep_the_agent(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod with NET_ADMIN adds rules to vmtap's table."""
    monkeypatch.setattr(nft, "_MOST_ANSWERS", 2)
    pod = lab.pod()
    rules = "\n".join(f"add rule netdev vmtap-port-net1 c ether type {kind} counter" for kind in range(3000))
    table = "add table netdev vmtap-port-net1\nadd chain netdev vmtap-port-net1 c\n"
    pod.run(["nft", "-f", "-"], stdin=table + rules)

    def listed() -> int:
        with nft.opened() as netlink:
            return len([*nft.counts(netlink, "vmtap-port-net1")])

    assert 0 < pod.call(listed) < 1000


class _Empty(Store):
    """Counts how often the records are read."""

    reads = 0

    def records(self) -> Iterator[Record]:
        self.reads += 1
        return iter(())


def test_scrapes_do_not_read_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cni.agent.attachment_metrics.time.monotonic", lambda: now)
    store, registry = _Empty(tmp_path), Registry()
    attachment_metrics.declare(registry, store)

    def failed(name: str, error: Exception) -> None:
        raise AssertionError(name) from error

    for _ in range(10):
        registry.render(failed)
    assert store.reads == 1
    now += 5
    registry.render(failed)
    assert store.reads == 2
