"""probe: what it says of the lab's switch is what the switch does, it sends nothing else, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from cni.state import probe_results
from lab import frames
from tests.ctl.conftest import Ctl, announced, lldp_frame
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

YES, NO, UNKNOWN = 0, 1, 2
ETH_P_ALL = 0x0003
_RTMGRP_LINK = 1
EVB_IDENTIFIER = bytes.fromhex("0080c20d")  # the OUI of IEEE 802.1, and the subtype


def evb(bridge: int, station: int) -> tuple[int, bytes]:
    """An EVB TLV with these status octets; the rest of it is timers and the mode."""
    return 127, EVB_IDENTIFIER + bytes([bridge, station, 0x72, 0x54, 0x14])


STOPS = """
import os, signal, sys
from cni.ctl import __main__, probe
exchange, write = probe._exchange, os.write
def write_and_stop(fd, data):
    sent = write(fd, data)
    if data.startswith(probe._VNET_HEADER):
        os.write = write
        os.kill(os.getpid(), signal.SIGSTOP)
    return sent
def exchange_and_stop(host, lower):
    os.write = write_and_stop
    return exchange(host, lower)
probe._exchange = exchange_and_stop
sys.exit(__main__.main())
"""


@contextmanager
def stopped(ctl: Ctl) -> Iterator[subprocess.Popen[bytes]]:
    """A probe of eth1 that has stopped itself after its first frame: who stopped it from outside could be too late."""
    argv = [*ctl.argv()[:3], sys.executable, "-c", STOPS, "probe", "eth1", "--json"]
    with subprocess.Popen(argv, env=ctl.env(), stdout=subprocess.PIPE) as running:
        os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield running
        finally:
            running.kill()


def test_a_switch_that_reflects(ctl: Ctl, lab: Lab) -> None:
    lab.switch.reflect(True)
    document = ctl.json("probe", "eth1", status=YES)
    assert document.keys() == {"source", "reflects", "why", "time", "switch"}
    assert (document["source"], document["reflects"], document["switch"]) == ("eth1", True, [])
    said = ctl("probe", "eth1", status=YES).stdout
    assert said.splitlines()[0] == "eth1  reflects"
    assert "on this node reach each other" in said


def test_a_switch_that_does_not(ctl: Ctl) -> None:
    assert ctl.json("probe", "eth1", status=NO)["reflects"] is False
    said = ctl("probe", "eth1", status=NO).stdout
    assert said.splitlines()[0] == "eth1  does not reflect"
    assert "turn on reflective relay" in said


def test_a_bridge_hands_on_what_the_switch_reflects(ctl: Ctl, lab: Lab) -> None:
    assert ctl.json("probe", "br0", status=NO)["reflects"] is False
    lab.switch.reflect(True, "uplink")
    assert ctl.json("probe", "br0", status=YES)["reflects"] is True


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("link set eth1 down", "ip link set eth1 up"),
        ("link set eth1 master br0", "probe br0"),
        ("link add link eth1 name taker type macvlan mode passthru", "the kernel refuses macvtaps on it"),
    ],
)
def test_a_source_that_cannot_be_probed(ctl: Ctl, lab: Lab, change: str, why: str) -> None:
    lab.switch.reflect(True)
    lab.node.ip(change)
    document = ctl.json("probe", "eth1", status=UNKNOWN)
    assert document["reflects"] is None
    assert why in document["why"]
    assert ctl("probe", "eth1", status=UNKNOWN).stdout.startswith("eth1  unknown\n")


def test_without_carrier(ctl: Ctl, lab: Lab) -> None:
    lab.switch.ip("link set node down")
    assert "no carrier" in ctl.json("probe", "eth1", status=UNKNOWN)["why"]


def test_what_is_not_ethernet(ctl: Ctl) -> None:
    assert "not an Ethernet device" in ctl.json("probe", "lo", status=UNKNOWN)["why"]


def test_a_source_that_is_not_there(ctl: Ctl) -> None:
    done = ctl("probe", "eth7", status=os.EX_NOINPUT)
    assert done.stderr == "vmtapctl: eth7 is not on this node (ip link lists what is there)\n"
    assert not ctl.plugin.state.exists()


def test_the_policy_is_not_asked(ctl: Ctl, lab: Lab) -> None:
    ctl.plugin.policy.write_text("interfaces: [{name: other, source: {dev: eth7}}]\nallowUnlisted: false\n")
    lab.switch.reflect(True)
    ctl("probe", "eth1", status=YES)


def test_without_privilege(ctl: Ctl) -> None:
    less = ["setpriv", "--bounding-set", "-sys_admin"]
    argv = [*ctl.argv()[:3], *less, *ctl.argv("probe", "eth1")[3:]]
    done = subprocess.run(argv, env=ctl.env(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (os.EX_NOPERM, "")
    assert "run it as root" in done.stderr


@pytest.mark.parametrize(
    ("machine", "change", "why"),
    [
        ("switch", "link set node down", "meanwhile, it has no carrier"),
        ("node", "link set eth1 down", "meanwhile, it is down"),
        ("node", "link delete eth1", "meanwhile, it was deleted"),
    ],
)
def test_it_is_lost_meanwhile(ctl: Ctl, lab: Lab, *, machine: str, change: str, why: str) -> None:
    with stopped(ctl) as running:
        getattr(lab, machine).ip(change)
        running.send_signal(signal.SIGCONT)
        said, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == UNKNOWN
    assert why in json.loads(said)["why"]


def test_frames_come_back_one_way_only(ctl: Ctl, lab: Lab) -> None:
    """The test is what reflects: the first frame, and no other."""
    with frames.packet_socket(lab.switch, "node", ETH_P_ALL) as port, stopped(ctl) as running:
        port.settimeout(LIMIT)
        port.send(port.recv(2048))
        running.send_signal(signal.SIGCONT)
        said, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == UNKNOWN
    assert "one way only" in json.loads(said)["why"]


def test_several_at_once(ctl: Ctl, lab: Lab) -> None:
    lab.switch.reflect(True)
    running = [
        subprocess.Popen(ctl.argv("probe", "eth1"), env=ctl.env(), stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert [each.wait(LIMIT) for each in running] == [YES] * 4
    assert [path.name for path in (ctl.plugin.state / "probes").iterdir()] == ["eth1.json"]


def test_nothing_else_is_sent_and_nothing_left(ctl: Ctl, lab: Lab) -> None:
    before = lab.node.links()
    with frames.packet_socket(lab.peer, "eth0", ETH_P_ALL) as capture:
        ctl("probe", "eth1", status=NO)
        with frames.packet_socket(lab.switch, "peer") as port:
            port.send(frames.Frame(frames.BROADCAST, "02:00:00:00:00:09", "end").pack())
        seen = frames.collect({"peer": capture}, until="end", timeout=LIMIT)["peer"]
    assert seen
    assert {frame.ethertype for frame in seen} == {frames.ETHERTYPE}
    after = lab.node.links()
    assert after.keys() == before.keys()
    assert after["eth1"]["promiscuity"] == 0
    lab.node.ip("link add link eth1 name taker type macvtap mode passthru")  # refused beside any other


def test_killed(ctl: Ctl, lab: Lab) -> None:
    with lab.node.call(_link_events) as events:
        with stopped(ctl) as running:
            assert lab.node.links()["eth1"]["promiscuity"] > 0
            running.send_signal(signal.SIGKILL)
        events.settimeout(LIMIT)
        while lab.node.links()["eth1"]["promiscuity"]:
            events.recv(1 << 16)
    lab.node.ip("link add link eth1 name taker type macvtap mode passthru")
    assert not (ctl.plugin.state / "probes").exists()


def _link_events() -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, _RTMGRP_LINK))
    return events


@pytest.mark.parametrize(
    ("tlv", "known", "said"),
    [
        (
            evb(0b010, 0b0011),
            {"capable": True, "on": False, "requested": False, "status": None},
            "possible, off; not requested",
        ),
        (
            evb(0b111, 0b1101),
            {"capable": True, "on": True, "requested": True, "status": True},
            "is on; requested",
        ),
        (
            evb(0b000, 0b0100),
            {"capable": False, "on": False, "requested": True, "status": False},
            "not possible; requested",
        ),
    ],
)
def test_what_the_switch_says_of_it(
    ctl: Ctl, lab: Lab, tlv: tuple[int, bytes], known: dict[str, object], said: str
) -> None:
    """Apart from itself, and to another address: EVB is for the nearest customer bridge."""
    lab.switch.reflect(True)
    others = (127, b"\x00\x80\xc2\x01\x00\x01"), (127, b"\x00\x12\x0f\x01\x03\x6c\x00\x00\x10")
    with announced(lab, lldp_frame(*others), lldp_frame(others[0], tlv, to="01:80:c2:00:00:00")):
        document = ctl.json("probe", "eth1", "--lldp", "30", status=YES)
        text = ctl("probe", "eth1", "--lldp", "30", status=YES).stdout
    assert document["switch"] == [{"nic": "eth1", "system": "leaf-12", "port": "Eth1/7", "evb": known}]
    assert "leaf-12 port Eth1/7, at eth1" in text
    assert said in text


@pytest.mark.parametrize(
    "tlv", [(127, b"\x00\x80\xc2\x0d"), (127, EVB_IDENTIFIER + b"\x07"), (126, EVB_IDENTIFIER + bytes(5))]
)
def test_a_switch_that_says_nothing_of_it(ctl: Ctl, lab: Lab, tlv: tuple[int, bytes]) -> None:
    """Nor does one whose EVB TLV is cut short."""
    lab.switch.reflect(True)
    with announced(lab, lldp_frame(tlv)):
        document = ctl.json("probe", "eth1", "--lldp", "2", status=YES)
        text = ctl("probe", "eth1", "--lldp", "2", status=YES).stdout
    assert document["switch"] == [{"nic": "eth1", "system": "leaf-12", "port": "Eth1/7", "evb": None}]
    assert "the switch sent no EVB TLV" in text


def test_a_switch_without_lldp(ctl: Ctl, lab: Lab) -> None:
    lab.switch.reflect(True)
    assert "no frame was received in 1 s" in ctl("probe", "eth1", "--lldp", "1", status=YES).stdout
    lab.node.ip("link set eth1 down")
    assert "no frame was received in 1 s" in ctl("probe", "eth1", "--lldp", "1", status=UNKNOWN).stdout


def test_doctor_goes_by_the_last_probe(ctl: Ctl, lab: Lab) -> None:
    def said() -> list[tuple[str, str, str]]:
        findings = ctl.json("doctor", status=None)["findings"]
        return [
            (each["severity"], each["message"], each["nextStep"])
            for each in findings
            if each["check"].startswith("relay")
        ]

    ctl.plugin.policy.write_text("interfaces: [{name: data, source: {dev: eth1}, modes: [vepa, bridge]}]\n")
    [(severity, message, step)] = said()
    assert (severity, step) == ("warning", "vmtapctl probe eth1")
    assert "not probed" in message
    when = ctl.json("probe", "eth1", status=NO)["time"]
    [(severity, message, step)] = said()
    assert severity == "warning"
    assert f"does not reflect ({when})" in message
    assert "turn on reflective relay" in step
    lab.switch.reflect(True)
    ctl("probe", "eth1", status=YES)
    [(severity, message, step)] = said()
    assert (severity, step) == ("ok", "")
    assert "guests in vepa mode reach each other" in message
    lab.switch.ip("link set node down")
    assert said() == []  # the carrier is said already
    lab.switch.ip("link set node up")
    lab.node.wait_until_up("eth1")
    [(severity, message, step)] = said()
    assert (severity, step) == ("warning", "vmtapctl probe eth1")
    assert "its carrier has changed" in message


def test_doctor_asks_for_a_probe_where_vepa_is_used(ctl: Ctl, lab: Lab) -> None:
    def checks() -> set[str]:
        return {each["check"] for each in ctl.json("doctor", status=None)["findings"]}

    pod = lab.pod()
    ctl.add(pod)
    assert "relay eth1" not in checks()
    ctl.add(pod, ifname="net2", source="eth1", mode="vepa")
    assert "relay eth1" in checks()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"source": 1}', "["])
def test_what_cannot_be_understood_is_no_probe(ctl: Ctl, content: str) -> None:
    folder = ctl.plugin.state / "probes"
    folder.mkdir(parents=True)
    (folder / "eth1.json").write_text(content)
    assert probe_results.load(str(ctl.plugin.state), "eth1") is None


def test_a_probe_of_an_earlier_boot_is_none(ctl: Ctl, lab: Lab) -> None:
    lab.switch.reflect(True)
    ctl("probe", "eth1", status=YES)
    assert probe_results.load(str(ctl.plugin.state), "eth1")
    path = ctl.plugin.state / "probes/eth1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot_id": "another"}))
    assert probe_results.load(str(ctl.plugin.state), "eth1") is None
