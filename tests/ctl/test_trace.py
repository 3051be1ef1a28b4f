"""trace: each verdict is compared with what the kernel does with frames from fd to fd."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.state.store import Store
from lab.frames import BROADCAST, ETHERTYPE, Frame, collect, packet_socket, write_tap
from lab.wire import BRIDGE, BRIDGE_UPLINK, NIC
from tests.ctl.conftest import Ctl
from tests.fakeipam import FakeIpam
from tests.netns.conftest import Attached, open_queues, records
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab
    from tests.agent.conftest import Agent

CAN, CANNOT, MAY = 0, 1, 2
VERDICTS = {"can": CAN, "cannot": CANNOT, "may": MAY}
VEPA, PEPA, LINK = {"mode": "vepa"}, {"mode": "pepa"}, {"mode": "bridge"}
TAP, ISOLATED = {"source": BRIDGE, "mode": "bridge"}, {"source": BRIDGE, "device": "tap", "mode": "pepa"}
ON_BRIDGE = {"source": BRIDGE, "device": "macvtap"}
MARKER, PEER = "marker", "02:00:00:00:00:fe"
LISTED = ["ip", "link", "show"]


@dataclass(frozen=True)
class Case:
    """What is attached, what is done to it, and what the frames then do: (unicast, broadcast) of each way."""

    a: dict[str, Any]
    b: dict[str, Any]
    verdict: str
    passing: tuple[bool, bool, bool, bool]
    """a's unicast, a's broadcast, b's unicast, b's broadcast arrive."""
    why: str
    reflects: bool = False
    probed: tuple[str, ...] = ()
    node: tuple[str, ...] = ()
    """Commands of ip(8) on the node; {a} and {b} are the host ends of the taps."""
    switch: tuple[str, ...] = ()
    pod_a: tuple[str, ...] = ()
    dead: bool = False
    """Whether not even the peer on the wire reaches both."""
    nft: str = ""
    """A command of nft(8) in the pod of a."""


ALL, NONE, UNICAST = (True,) * 4, (False,) * 4, (True, False, True, False)
YES: dict[str, Any] = {"reflects": True, "probed": (NIC,)}
NO: dict[str, Any] = {"probed": (NIC,)}
CASES = {
    "bridge": Case(LINK, LINK, "can", ALL, "macvlan driver on eth1"),
    "bridge, reflected": Case(LINK, LINK, "can", ALL, "macvlan driver", **YES),
    "vepa, not probed": Case(VEPA, VEPA, "may", NONE, "not probed"),
    "vepa, plain switch": Case(VEPA, VEPA, "cannot", NONE, "does not reflect", **NO),
    "vepa, reflected": Case(VEPA, VEPA, "can", ALL, "which reflects", **YES),
    "pepa, plain switch": Case(PEPA, PEPA, "cannot", NONE, "does not reflect", **NO),
    "pepa, reflected": Case(PEPA, PEPA, "may", UNICAST, "no broadcast arrives", **YES),
    "pepa, not probed": Case(PEPA, PEPA, "may", NONE, "not probed"),
    "bridge and vepa": Case(LINK, VEPA, "cannot", NONE, "does not reflect", **NO),
    "bridge and vepa, reflected": Case(
        LINK, VEPA, "can", ALL, "net1 of a is in bridge mode, net1 of b is in vepa", **YES
    ),
    "bridge and pepa": Case(LINK, PEPA, "cannot", NONE, "does not reflect", **NO),
    "bridge and pepa, reflected": Case(LINK, PEPA, "may", UNICAST, "no broadcast", **YES),
    "vepa and pepa, reflected": Case(VEPA, PEPA, "may", UNICAST, "no broadcast", **YES),
    "taps": Case(TAP, TAP, "can", ALL, "bridge br0"),
    "isolated taps": Case(ISOLATED, ISOLATED, "cannot", NONE, "isolated ports"),
    "tap and isolated tap": Case(TAP, ISOLATED, "can", ALL, "bridge br0"),
    "tap and macvtap on the bridge": Case(TAP, ON_BRIDGE | LINK, "can", ALL, "bridge br0"),
    "isolated tap and macvtap on the bridge": Case(ISOLATED, ON_BRIDGE | VEPA, "can", ALL, "bridge br0"),
    "macvtaps on the bridge": Case(ON_BRIDGE | LINK, ON_BRIDGE | LINK, "can", ALL, "macvlan driver on br0"),
    "vepa on the bridge": Case(
        ON_BRIDGE | VEPA, ON_BRIDGE | VEPA, "cannot", NONE, "does not reflect", probed=(BRIDGE,)
    ),
    "tap and macvtap elsewhere": Case(TAP, LINK, "may", ALL, "net1 of a is on eth2, net1 of b is on eth1"),
    "a bridge without a NIC": Case(
        TAP, LINK, "cannot", NONE, "no NIC", node=("link set eth2 nomaster",), dead=True
    ),
    "link down": Case(
        LINK, LINK, "cannot", NONE, "its link is down", pod_a=("link set net1 down",), dead=True
    ),
    "tap down": Case(TAP, TAP, "cannot", NONE, "its link is down", pod_a=("link set net1 down",), dead=True),
    "lower device down": Case(
        LINK, LINK, "cannot", NONE, "lower device eth1 is down", node=("link set eth1 down",), dead=True
    ),
    "no carrier": Case(
        LINK, LINK, "cannot", NONE, "eth1 has no carrier", switch=("link set node down",), dead=True
    ),
    "bridge's uplink without carrier": Case(
        TAP, TAP, "can", ALL, "bridge br0", switch=("link set uplink down",), dead=True
    ),
    "bridge down": Case(
        TAP, TAP, "cannot", NONE, "bridge br0 is down", node=("link set br0 down",), dead=True
    ),
    "host end off the bridge": Case(
        TAP, TAP, "cannot", NONE, "no port of br0", node=("link set {a} nomaster",), dead=True
    ),
    "host end down": Case(
        TAP, TAP, "cannot", NONE, "does not forward", node=("link set {a} down",), dead=True
    ),
    "another MAC at the link": Case(
        LINK,
        LINK,
        "cannot",
        (True, True, False, True),
        "delivered",
        pod_a=("link set net1 address 02:00:00:00:00:77",),
        dead=True,
    ),
    "filters": Case(
        LINK | {"port": {"macSpoofCheck": True, "trunk": []}}, LINK, "can", ALL, "macvlan driver"
    ),
    "filters that were changed": Case(
        LINK | {"port": {"macSpoofCheck": True}},
        LINK,
        "may",
        (False, False, True, True),
        "not those of its profile",
        nft="add rule netdev vmtap-port-net1 out drop",
        dead=True,
    ),
    "filtered tap": Case(
        TAP | {"port": {"macSpoofCheck": True, "dhcpServer": False}}, TAP, "can", ALL, "bridge br0"
    ),
}


def host_end(made: Attached) -> str:
    return f"vth{made.record.ifindex:08x}"


def passes(lab: Lab, a: Attached, b: Attached, *, dead: bool) -> tuple[bool, ...]:
    """Which of the four frames arrive: a's unicast and broadcast at b, b's at a."""
    fds = {"a": a.fd, "b": b.fd}
    macs = {"a": a.record.mac, "b": b.record.mac}
    wanted = []
    for sender, receiver in (("a", "b"), ("b", "a")):
        for to, dst in (("unicast", macs[receiver]), ("broadcast", BROADCAST)):
            frame = Frame(dst, macs[sender], f"{sender} {to}")
            with suppress(OSError):  # the link is down
                write_tap(fds[sender], frame)
            wanted.append((receiver, frame.token))
    if not dead:
        with packet_socket(lab.peer, "eth0") as peer:
            peer.send(Frame(BROADCAST, PEER, MARKER).pack())
            got = collect(fds, until=MARKER)
    else:
        got = collect(fds, timeout=0.3)
    seen = {
        (name, frame.token)
        for name, frames in got.items()
        for frame in frames
        if frame.ethertype == ETHERTYPE
    }
    return tuple(each in seen for each in wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_what_frames_do(
    ctl: Ctl, lab: Lab, attach: Callable[..., Attached], name: str
) -> None:
    case = CASES[name]
    for port in ("node", "uplink"):
        lab.switch.reflect(case.reflects, port)
    for device in case.probed:
        ctl("probe", device, status=None)
    a = attach(lab.pod("a"), container="a", **{"source": NIC} | case.a)
    b = attach(lab.pod("b"), container="b", **{"source": NIC} | case.b)
    names = {"a": host_end(a), "b": host_end(b)}
    lab.switch.ip(*case.switch)
    lab.node.ip(*(each.format(**names) for each in case.node))
    a.pod.ip(*case.pod_a)
    if case.nft:
        a.pod.run(["nft", case.nft])
    for command in case.switch:
        device = NIC if "node" in command else BRIDGE_UPLINK
        until(lambda: lab.node.links()[device]["operstate"] == "DOWN", f"{device} has a carrier")  # noqa: B023
    pair, text = traced(ctl, case.verdict, "a/net1", "b/net1")
    assert pair["summary"].startswith(f"net1 of a {case.verdict} talk to net1 of b: ")
    assert case.why in " ".join([pair["summary"], *pair["reasons"]])
    assert text.startswith(f"{pair['summary']}\n")
    assert ("once mended" in text) == pair["blocked"]
    assert passes(lab, a, b, dead=case.dead) == case.passing
    agrees(pair, case.passing)


def traced(ctl: Ctl, verdict: str, *names: str) -> tuple[dict[str, Any], str]:
    """The document of the one pair, and the text."""
    status = VERDICTS[verdict]
    text = ctl("trace", *names, status=status).stdout
    document = ctl.json("trace", *names, status=status)
    assert document["verdict"] == verdict
    [pair] = document["pairs"]
    assert pair["verdict"] == verdict
    return pair, text


def agrees(pair: dict[str, Any], arrived: tuple[bool, ...]) -> None:
    """The verdict, and what it states of each way, is no other than what the frames did."""
    if pair["verdict"] == "can":
        assert arrived == ALL
    if pair["verdict"] == "cannot":
        assert not (arrived[0] and arrived[2])
    if pair["blocked"]:
        return
    if pair["reasons"] and "filters" in pair["reasons"][0]:
        return
    stated = [way[kind] for way in pair["ways"] for kind in ("unicast", "broadcast")]
    assert [each in (None, seen) for each, seen in zip(stated, arrived, strict=True)] == [True] * 4


def test_no_process_has_the_device_open(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    attach(lab.pod("a"), container="a", source=NIC, mode="bridge")
    b = attach(lab.pod("b"), container="b", source=NIC, mode="bridge", opened=False)
    pair, _ = traced(ctl, "cannot", "a/net1", "b/net1")
    assert pair["reasons"] == ["net1 of b: no process has its device open: there is no guest that receives"]
    b.pod.ip("link delete net1")
    pair, text = traced(ctl, "cannot", "b/net1", "a/net1")
    assert "its link is gone" in pair["summary"]
    assert "plain tap" not in text
    assert "vmtapctl doctor" in text


def test_a_process_that_may_not_see_who_has_a_device_open(
    ctl: Ctl, lab: Lab, attach: Callable[..., Attached]
) -> None:
    """As vmtapctl in the container of an agent without CAP_SYS_PTRACE."""
    attach(lab.pod("a"), container="a", source=NIC, mode="bridge")
    attach(lab.pod("b"), container="b", source=NIC, mode="bridge")
    less = ["setpriv", "--bounding-set", "-sys_ptrace"]
    argv = [*ctl.argv()[:3], *less, *ctl.argv("trace", "a", "b")[3:]]
    done = subprocess.run(argv, env=ctl.env(), capture_output=True, text=True, check=False)
    assert (done.returncode, "may not see whether its device is open" in done.stdout) == (MAY, True), done
    assert done.stderr == ""


def test_a_link_that_waits_for_its_guest(agent: Agent, lab: Lab) -> None:
    """In vepa mode, until its guest is heard. Its MAC is heard from the wire, so that it waits for longer than 5 s."""
    shim = agent.shim()
    ctl, made = Ctl(shim), []
    with ExitStack() as stack:
        for name in ("a", "b"):
            shim("ADD", config(source=NIC, mode="bridge"), netns=(pod := lab.pod(name)), container=name).ok()
            [record] = records(shim, pod)
            [fd] = open_queues(pod, record)
            stack.callback(os.close, fd)
            pod.wait_until_up("net1")
            made.append(Attached(pod, record, [fd], {}))
        a, b = made
        with packet_socket(lab.peer, "eth0") as peer:

            def heard() -> bool:
                peer.send(Frame(BROADCAST, b.record.mac, "elsewhere").pack())
                return Store(agent.run).is_elsewhere(b.record.id)

            until(heard, "the agent does not hear the MAC from the wire")
        write_tap(a.fd, Frame(BROADCAST, a.record.mac, "awake"))
        until(lambda: a.link()["linkinfo"]["info_data"]["mode"], "a waits", lambda mode: mode == "bridge")
        ctl("probe", NIC, status=1)
        pair, _ = traced(ctl, "cannot", "a/net1", "b/net1")
        assert "net1 of b waits for its guest" in pair["summary"]
        assert any("the VM runs elsewhere" in each for each in pair["warnings"])
        assert pair["nextSteps"] == ["the agent sets bridge mode at the guest's first frame"]
        write_tap(a.fd, Frame(b.record.mac, a.record.mac, "lost"))
        with packet_socket(lab.peer, "eth0") as peer:
            peer.send(Frame(BROADCAST, PEER, MARKER).pack())
            tokens = {frame.token for frame in collect({"b": b.fd}, until=MARKER)["b"]}
        assert "lost" not in tokens
        write_tap(b.fd, Frame(BROADCAST, b.record.mac, "awake"))
        until(lambda: b.link()["linkinfo"]["info_data"]["mode"], "b waits", lambda mode: mode == "bridge")
        pair, _ = traced(ctl, "can", "a/net1", "b/net1")
        assert passes(lab, a, b, dead=False) == ALL


def test_macvtaps_on_a_macvlan_whose_lower_device_is_in_another_namespace(
    ctl: Ctl, lab: Lab, attach: Callable[..., Attached]
) -> None:
    """As on a node that is a container. The kernel puts them beside the macvlan; an index of the node is another's."""
    for name in ("mv0", "mv1"):
        lab.peer.ip(f"link add link eth0 name {name} netns {lab.node.path} type macvlan mode bridge")
        lab.node.ip(f"link set {name} up")
    lab.node.wait_until_up("mv0", "mv1")
    a = attach(lab.pod("a"), container="a", source="mv0", mode="bridge")
    b = attach(lab.pod("b"), container="b", source="mv1", mode="bridge")
    pair, _ = traced(ctl, "can", "a", "b")
    assert "macvlan driver on mv0" in pair["summary"]
    assert passes(lab, a, b, dead=True) == ALL
    attach(lab.pod("c"), container="c", source=NIC, mode="bridge")
    assert "net1 of c is on eth1" in traced(ctl, "may", "a", "c")[0]["summary"]


def test_a_probe_ends_with_the_carrier(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    for name in ("a", "b"):
        attach(lab.pod(name), container=name, source=NIC, mode="vepa")
    ctl("probe", NIC, status=1)
    traced(ctl, "cannot", "a", "b")
    for state in ("down", "up"):
        lab.switch.ip(f"link set node {state}")
        until(lambda: lab.node.links()[NIC]["operstate"] == state.upper(), "the carrier does not follow")  # noqa: B023
    pair, _ = traced(ctl, "may", "a", "b")
    assert "the carrier of eth1 has changed since it was probed" in pair["summary"]
    assert pair["nextSteps"] == ["vmtapctl probe eth1"]


def test_what_the_filters_have_refused(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    port = {"macSpoofCheck": True, "rate": {"out": "1Gbit"}}
    a = attach(lab.pod("a"), container="a", source=NIC, mode="bridge", port=port)
    b = attach(lab.pod("b"), container="b", source=NIC, mode="bridge")
    assert traced(ctl, "can", "a/net1", "b/net1")[0]["warnings"][-1].endswith("since the link was made")
    write_tap(a.fd, Frame(b.record.mac, PEER, "spoofed"))
    assert passes(lab, a, b, dead=False) == ALL
    pair, text = traced(ctl, "can", "a/net1", "b/net1")
    assert pair["warnings"] == [
        "net1 of a: its filters have refused frames since the link was made: 1 source-mac"
    ]
    assert pair["ends"][0]["refused"] == {"source-mac": 1}
    assert "macSpoofCheck, rate.out 1 Gbit/s" in text


def test_one_mac_and_other_mtus(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    mac = "02:00:00:00:00:42"
    attach(lab.pod("a"), container="a", source=NIC, mode="bridge", mac=mac)
    attach(lab.pod("b"), container="b", mac=mac, mtu=1400, **TAP)
    pair, _ = traced(ctl, "cannot", "a/net1", "b/net1")
    assert pair["summary"].endswith(f"both have the MAC {mac}")
    assert "net1 of a has MTU 1500, net1 of b 1400: longer frames than that may be lost" in pair["warnings"]


def test_plain_taps(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    attach(lab.pod("a"), container="a", device="tap")
    attach(lab.pod("b"), container="b", **LINK, source=NIC)
    pair, _ = traced(ctl, "may", "a/net1", "b/net1")
    assert "plain tap" in pair["summary"]
    pair, _ = traced(ctl, "may", "a/net1", PEER)
    assert pair["far"] == {"name": PEER, "mac": PEER, "links": []}


def test_an_end_that_is_not_on_this_node(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    """From its MAC or address, in either place, only this node's half is known."""
    a = attach(lab.pod("a"), container="a", source=NIC, mode="bridge")
    attach(lab.pod("b"), container="b", **TAP)
    for names in (("a/net1", PEER.upper()), (PEER, "a")):
        pair, text = traced(ctl, "may", *names)
        assert pair["summary"].startswith(f"net1 of a may talk to {PEER}: ")
        assert pair["nextSteps"] == [f"on the node that has it: vmtapctl trace {PEER} {a.record.mac}"]
        assert "to the wire by eth1" in text
    assert traced(ctl, "may", "a", "fd00::0:7")[0]["far"]["name"] == "fd00::7"
    nic = lab.node.links()[NIC]["address"]
    pair, _ = traced(ctl, "may", "a", nic)
    assert pair["nextSteps"] == ["vmtapctl probe eth1"]
    ctl("probe", NIC, status=1)
    assert "which the macvtap itself is on" in traced(ctl, "cannot", "a", nic)[0]["summary"]
    write_tap(a.fd, Frame(nic, a.record.mac, "to the host"))
    with packet_socket(lab.node, NIC) as node, packet_socket(lab.peer, "eth0") as peer:
        peer.send(Frame(BROADCAST, PEER, MARKER).pack())
        assert collect({"node": node}, until=MARKER)["node"] == []
    lab.node.ip("link set eth2 nomaster")
    assert "br0 has no NIC" in traced(ctl, "cannot", "b", PEER)[0]["summary"]
    a.pod.ip("link set net1 down")
    assert "its link is down" in traced(ctl, "cannot", "a", PEER)[0]["summary"]


def test_names(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    """A name may lead to several attachments of one pod: each pair is traced, and the best verdict counts."""
    pods = {name: lab.pod(name) for name in ("web", "db")}
    for name, pod in pods.items():
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID=u"
        for ifname, fields in (("net1", LINK | {"source": NIC}), ("net2", ISOLATED)):
            attach(pod, container=f"c-{name}", ifname=ifname, args=args, **fields)
    document = ctl.json("trace", "web", "shop/db")
    assert document["verdict"] == "can"
    assert [each["verdict"] for each in document["pairs"]] == ["can", "may", "may", "cannot"]
    assert ctl("trace", "web", "db").stdout.count("attachment ") == 4
    assert [each["verdict"] for each in ctl.json("trace", "web", "shop/db/net1", status=CAN)["pairs"]] == [
        "can",
        "may",
    ]
    [own] = ctl.json("trace", "web", "web", status=MAY)["pairs"]
    assert [each["name"] for each in own["ends"]] == ["net1 of shop/web", "net2 of shop/web"]
    for names, status, why in (
        (("net1", "web"), os.EX_USAGE, "names attachments of several pods: shop/db (c-db), shop/web (c-web)"),
        (("web/net1", "web/net1"), os.EX_USAGE, "are one attachment"),
        (("web", "mail"), os.EX_NOINPUT, "belongs to 'mail'"),
        (("mail", "web"), os.EX_NOINPUT, "belongs to 'mail'"),
        ((PEER, "10.77.0.9"), os.EX_NOINPUT, f"belongs to '{PEER}'"),
    ):
        done = ctl("trace", *names, status=status)
        assert (done.stdout, why in done.stderr) == ("", True), done.stderr


def test_a_sandbox_that_has_ended_without_a_del(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    """Its record has the name of the pod that came after it."""
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u"
    old = attach(lab.pod("old"), container="c-old", args=args, source=NIC, mode="bridge", mac=PEER)
    old.pod.ip("link delete net1")
    attach(lab.pod("new"), container="c-new", args=args, source=NIC, mode="bridge")
    attach(lab.pod("db"), container="db", source=NIC, mode="bridge")
    traced(ctl, "can", "web", "db")
    assert "its link is gone" in traced(ctl, "cannot", "c-old", "db")[0]["summary"]


def test_by_the_leased_address(ctl: Ctl, lab: Lab, tmp_path: Path) -> None:
    ipam = FakeIpam(tmp_path)
    plugin = replace(ctl.plugin, cni_path=str(tmp_path))
    for name, address in (("a", "10.9.0.5/24"), ("b", "fd00:0::5/64")):
        ipam.write(answer={"cniVersion": "1.1.0", "ips": [{"address": address}]})
        fields = config(source=NIC, mode="vepa", ipam=ipam.config)
        plugin("ADD", fields, netns=lab.pod(name), container=name).ok()
    pair, text = traced(ctl, "cannot", "10.9.0.5", "FD00::5")
    assert [each["name"] for each in pair["ends"]] == ["net1 of a", "net1 of b"]
    assert "10.9.0.5/24" in text
    assert "addresses" in ctl("show", "fd00::5").stdout


def test_the_page_has_every_key(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    attach(lab.pod("a"), container="a", **TAP | {"port": {"macSpoofCheck": True}})
    attach(lab.pod("b"), container="b", **LINK, source=NIC)
    page = (Path(__file__).parents[2] / "docs/vmtapctl.md").read_text()

    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner) if key not in ("port", "refused") else ()
        elif isinstance(value, list):
            for each in value:
                yield from keys(each)

    documents = ctl.json("trace", "a", "b", status=MAY), ctl.json("trace", "a", PEER, status=MAY)
    assert [key for key in sorted({*keys(list(documents))}) if f"`{key}`" not in page] == []


def test_nothing_is_sent_and_nothing_changes(ctl: Ctl, lab: Lab, attach: Callable[..., Attached]) -> None:
    port = {"macSpoofCheck": True}
    a = attach(lab.pod("a"), container="a", source=NIC, mode="vepa", port=port)
    attach(lab.pod("b"), container="b", **TAP | {"port": port})
    before = lab.node.run(LISTED).stdout, a.pod.run(["nft", "list", "ruleset"]).stdout
    with packet_socket(lab.peer, "eth0", 0x0003) as capture:
        ctl("trace", "a", "b", status=MAY)
        with packet_socket(lab.switch, "peer") as port_of_peer:
            port_of_peer.send(Frame(BROADCAST, PEER, MARKER).pack())
        assert collect({"peer": capture}, until=MARKER)["peer"] == []
    assert (lab.node.run(LISTED).stdout, a.pod.run(["nft", "list", "ruleset"]).stdout) == before


def test_a_bridge_that_is_gone_and_a_namespace_without_a_path(
    ctl: Ctl, lab: Lab, attach: Callable[..., Attached]
) -> None:
    attach(lab.pod("a"), container="a", **TAP)
    attach(lab.pod("b"), container="b", source=NIC, **LINK)
    lab.node.ip(f"link delete {BRIDGE}")
    pair, _ = traced(ctl, "cannot", "a", "b")
    assert "no port of br0 any more" in pair["summary"]
