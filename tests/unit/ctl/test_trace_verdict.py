"""What is concluded from facts that the lab's kernel and NICs do not have; tests/ctl and tests/hw have the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.ctl.trace.facts import CAN, CANNOT, MAY, BridgePort, End, Far, Medium
from cni.ctl.trace.verdict import judge, judge_far
from cni.kernel.bridge_vlans import Vlans
from cni.state.port_profile import Port
from cni.state.probe_results import MEND

NIC = Medium("eth1", 2, "eth1", "up", 1500, "02:00:00:00:01:01", frozenset({("eth1", "")}))
PF = replace(NIC, name="eth3", index=4, device="eth3v0", embedded="bridge", nics=frozenset({("eth3", "")}))
BRIDGE = replace(NIC, name="br0", index=5, device="br0")


def end(number: int, medium: Medium | None = NIC, **fields: Any) -> End:
    mac = f"02:00:00:00:00:0{number}"
    known = {
        "device": "macvtap",
        "mode": "bridge",
        "status": "in use",
        "mac": mac,
        "link_mac": mac,
        "mtu": 1500,
    }
    return End(name=f"net1 of p{number}", id=f"id{number}", medium=medium, **{**known, **fields})


def tap(number: int, medium: Medium = BRIDGE, *, vlans: Vlans | None = None, isolated: bool = False) -> End:
    port = BridgePort(f"vth{number}", medium.name, True, isolated, vlans)
    return end(number, medium, device="tap", mode="pepa" if isolated else "bridge", bridge_port=port)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "why"),
    [
        (end(1, PF), end(2, PF), CAN, "within the NIC, by the embedded switch of eth3"),
        (
            end(1, PF, vlan=7),
            end(2, PF, vlan=8),
            CANNOT,
            "net1 of p1 is in VLAN 7, net1 of p2 is in VLAN 8 on eth3",
        ),
        (
            end(1, replace(PF, embedded="vepa")),
            end(2, replace(PF, embedded="vepa")),
            MAY,
            "would have to reflect",
        ),
        (
            end(1, replace(PF, embedded="vepa", reflects=False)),
            end(2, replace(PF, embedded="vepa", reflects=False)),
            CANNOT,
            "the embedded switch of eth3 is in vepa mode, and the switch does not reflect",
        ),
        (
            end(1, replace(PF, embedded="vepa", reflects=True)),
            end(2, replace(PF, embedded="vepa", reflects=True)),
            CAN,
            "through the switch, which reflects",
        ),
        (
            end(1, PF),
            end(2, replace(PF, device="eth3", embedded=None)),
            MAY,
            "embedded switch of eth3: net1 of p1 is on its VF, net1 of p2 is on itself",
        ),
        (end(1, PF), end(2), MAY, "net1 of p1 is on eth3, net1 of p2 is on eth1"),
        (end(1, mode="16"), end(2), MAY, "is in mode 16, net1 of p2 is in mode bridge on eth1"),
        (
            tap(1, replace(BRIDGE, filtering=True)),
            tap(2, replace(BRIDGE, filtering=True)),
            MAY,
            "cannot be read",
        ),
        (
            tap(1, replace(BRIDGE, reflects=True), isolated=True),
            tap(2, replace(BRIDGE, reflects=True), isolated=True),
            MAY,
            "which reflects to br0",
        ),
        (end(1, port=Port(mac_spoof_check=True), intact=None), end(2), MAY, "filters cannot be read"),
        (end(1, status="old", medium=None), end(2), CANNOT, "before this boot"),
        (end(1, status="in progress"), end(2), CANNOT, "an ADD or DEL is at work on it"),
        (end(1, replace(NIC, index=0, state="missing")), end(2), CANNOT, "lower device eth1 is not there"),
    ],
)
def test_facts_that_the_lab_does_not_have(a: End, b: End, verdict: str, why: str) -> None:
    found = judge(a, b)
    assert found.verdict == verdict
    assert why in found.summary


@pytest.mark.parametrize(
    ("one", "two", "verdict"),
    [
        (("eth1", "100"), ("eth1", "100"), MAY),
        (("eth1", "100"), ("eth1", "200"), CANNOT),
        (("eth1", "100"), ("eth1", ""), CANNOT),
        (("eth1", "100"), ("eth2", "100"), MAY),
        (("eth1", "100"), ("eth2", "200"), CANNOT),
        (("eth1", "100"), ("eth2", ""), MAY),
        (("eth1", "100.5"), ("eth2", "100"), CANNOT),
    ],
)
def test_two_devices_and_their_tags(one: tuple[str, str], two: tuple[str, str], verdict: str) -> None:
    media = [replace(NIC, index=number, nics=frozenset({nic})) for number, nic in ((7, one), (8, two))]
    assert judge(end(1, media[0]), end(2, media[1])).verdict == verdict
    # A bridge with vlan_filtering may set the tag itself.
    assert judge(end(1, replace(media[0], filtering=True)), end(2, media[1])).verdict == MAY


def test_the_next_steps() -> None:
    vepa = [end(number, replace(NIC, reflects=False), mode="vepa") for number in (1, 2)]
    assert judge(*vepa).next_steps == (MEND,)
    assert judge(*(replace(each, medium=NIC) for each in vepa)).next_steps == ("vmtapctl probe eth1",)
    far = judge_far(end(1), Far("10.0.0.9"))
    assert far.next_steps == ("on the node that has it: vmtapctl trace 10.0.0.9 02:00:00:00:00:01",)
    same = judge_far(end(1), Far("02:00:00:00:00:01", "02:00:00:00:00:01"))
    assert (same.verdict, "both have the MAC" in same.summary) == (CANNOT, True)


def test_the_nodes_firewall_on_a_bridge() -> None:
    walled = replace(BRIDGE, firewalled=True)
    assert any("firewall" in each for each in judge(tap(1, walled), tap(2, walled)).warnings)
    assert not judge(end(1, walled), end(2, walled)).warnings
    assert not judge(tap(1), tap(2)).warnings


MEDIA = st.builds(
    replace,
    st.sampled_from([NIC, PF, BRIDGE]),
    state=st.sampled_from(["up", "no carrier", "down", "missing"]),
    reflects=st.sampled_from([True, False, None]),
    nics=st.frozensets(st.sampled_from([("eth1", ""), ("eth1", "100"), ("eth2", "100")])),
    filtering=st.booleans(),
)
ENDS = st.builds(
    end,
    st.integers(1, 9),
    st.none() | MEDIA,
    device=st.sampled_from(["macvtap", "tap"]),
    mode=st.sampled_from(["bridge", "vepa", "pepa", "passthru", None]),
    status=st.sampled_from(["in use"] * 6 + ["idle", "down", "gone", "old", "in progress", "no carrier"]),
    waiting=st.booleans(),
    port=st.none() | st.just(Port(mac_spoof_check=True)),
    intact=st.sampled_from([True, False, None]),
    bridge_port=st.none()
    | st.builds(BridgePort, st.just("vth"), st.just("br0"), st.booleans(), st.booleans()),
)


@given(ENDS, ENDS)
def test_it_is_the_same_from_both_ends_and_has_a_reason(a: End, b: End) -> None:
    found, back = judge(a, b), judge(b, a)
    assert found.verdict == back.verdict
    assert {each.text for each in found.reasons} == {each.text for each in back.reasons}
    per_way = [
        each
        for each in found.reasons
        if " from " not in each.text and each.text in {way.path for way in found.ways}
    ]
    assert len(per_way) <= 1 or a.name == b.name
    assert bool(found.reasons) == (found.verdict != CAN)
    assert found.summary.startswith(f"{a.name} {found.verdict} talk to {b.name}: ")
    assert found.document()["verdict"] == found.verdict


@given(ENDS)
def test_nothing_is_certain_of_what_is_elsewhere(a: End) -> None:
    found = judge_far(a, Far("10.0.0.9"))
    assert found.verdict in (MAY, CANNOT)
    assert found.reasons
