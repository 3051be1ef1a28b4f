"""What a policy, a network config and a runtime make of a port together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cni.config import policy as policies
from cni.config import port as ports
from cni.errors import CniError
from cni.state.port_profile import Port, vlans

if TYPE_CHECKING:
    from pathlib import Path

MACS = ["00:00:5e:00:01:07", "00:00:5e:00:01:08"]


def decide(
    policy: dict[str, Any],
    wanted: dict[str, Any],
    free: bool = False,
    on_vlan: bool = False,
    **bandwidth: int,
) -> Port | None:
    return ports.decide(policy, wanted, bandwidth, free=free, on_vlan=on_vlan)


def refusal(policy: dict[str, Any], wanted: dict[str, Any]) -> str:
    with pytest.raises(CniError) as refused:
        decide(policy, wanted)
    assert refused.value.code == 7
    return refused.value.msg


def test_nothing() -> None:
    assert decide({}, {}) is None
    assert decide({"macSpoofCheck": False, "dhcpServer": True}, {}) is None
    assert decide({"macs": MACS}, {}) is None


@pytest.mark.parametrize(
    ("name", "strict", "attribute"),
    [
        ("macSpoofCheck", True, "mac_spoof_check"),
        ("ipSpoofCheck", True, "ip_spoof_check"),
        ("dhcpServer", False, "dhcp_server"),
        ("routerAdvertisements", False, "router_advertisements"),
    ],
)
def test_a_switch(name: str, strict: bool, attribute: str) -> None:
    for policy, wanted in (
        ({name: strict}, {}),
        ({}, {name: strict}),
        ({name: not strict}, {name: strict}),
        ({name: strict}, {name: strict}),
    ):
        port = decide(policy, wanted)
        assert port
        assert getattr(port, attribute) is strict
    assert decide({name: not strict}, {}) is decide({}, {name: not strict}) is None
    assert f"port.{name}: " in refusal({name: strict}, {name: not strict})
    assert decide({}, {name: not strict}, free=True) is None


def test_macs() -> None:
    checked = {"macSpoofCheck": True}
    assert decide({**checked, "macs": [MACS[0].upper()]}, {}) == Port(mac_spoof_check=True, macs=(MACS[0],))
    assert decide({**checked, "macs": MACS}, {"macs": MACS[1:]}) == Port(
        mac_spoof_check=True, macs=(MACS[1],)
    )
    assert decide({**checked, "macs": MACS}, {"macs": []}) == Port(mac_spoof_check=True)
    assert decide({}, {**checked, "macs": MACS}) == Port(mac_spoof_check=True, macs=tuple(MACS))
    assert refusal(checked, {"macs": MACS[:1]}).endswith("the policy allows none")
    assert refusal({**checked, "macs": MACS[:1]}, {"macs": MACS}).endswith(f"the policy allows {MACS[0]}")


def test_addresses() -> None:
    checked = {"ipSpoofCheck": True}
    wide = {**checked, "addresses": ["10.1.0.0/16", "2001:db8::/32"]}
    port = decide(wide, {})
    assert port
    assert port.addresses == ("10.1.0.0/16", "2001:db8::/32")
    for narrow in (["10.1.2.3"], ["10.1.2.0/24", "2001:db8:1::5/64"], []):
        port = decide(wide, {"addresses": narrow})
        assert port
        assert port.addresses == tuple(narrow)
    for outside in ("10.2.0.1", "10.0.0.0/8", "::/0", "2001:db9::1"):
        assert "the policy allows" in refusal(wide, {"addresses": [outside]})
    for wrong in ("10.1.0.0/33", "10.1", "::/129", "1.2.3.4.5", ":::"):
        assert "it is no IPv4 or IPv6 address" in refusal({"addresses": [wrong]}, {})
    port = decide({}, {**checked, "addresses": ["10.1.2.3"]}, free=True)
    assert port
    assert port.addresses == ("10.1.2.3",)
    assert "port.macs" in refusal(checked, {"macs": MACS[:1]})


def test_a_trunk() -> None:
    assert decide({"trunk": [100, "200-210"]}, {}) == Port(trunk=("100", "200-210"))
    assert decide({"trunk": ["100-200"]}, {"trunk": [150, "160-170"]}) == Port(trunk=("150", "160-170"))
    assert decide({"trunk": [100, 101]}, {"trunk": ["100-101"]}) == Port(trunk=("100-101",))
    assert decide({"trunk": [100]}, {"trunk": []}) == Port(trunk=())
    assert decide({}, {"trunk": [100]}) == Port(trunk=("100",))
    assert 'port.trunk: "200-99" is refused: the range ends' in refusal({}, {"trunk": ["200-99"]})
    assert 'port.trunk: "99-100" is refused: the policy allows 100' in refusal(
        {"trunk": [100]}, {"trunk": ["99-100"]}
    )


def test_tags_that_other_fields_of_the_policy_refuse() -> None:
    """A policy that checks what frames contain lets no tagged frames pass; so does one that gives a guest one VLAN."""
    assert refusal({"dhcpServer": False}, {"trunk": [100]}).endswith("the policy allows none")
    port = decide({"macSpoofCheck": True}, {"trunk": [100]})
    assert port
    assert port.tags == ("100",)
    with pytest.raises(CniError, match="the policy allows none"):
        decide({"macSpoofCheck": True}, {"trunk": [100]}, on_vlan=True)
    port = decide({"macSpoofCheck": True}, {}, on_vlan=True)
    assert port
    assert port.tags == ()
    assert decide({}, {"macSpoofCheck": True}, on_vlan=True) == port
    port = decide({"macSpoofCheck": True}, {})
    assert port
    assert port.tags is None


def test_the_smallest_rate() -> None:
    assert decide(
        {"rate": {"out": "1Gbit"}}, {}, egressRate=0, ingressRate=64_000, ingressBurst=800_000
    ) == Port(out_rate=10**9, in_rate=64_000, in_burst=100_000)
    assert decide(
        {"rate": {"out": "1Gbit", "burst": "1MiB"}}, {"rate": {"out": "10kbit", "burst": "64KiB"}}
    ) == Port(out_rate=10_000, out_burst=64 << 10)
    assert decide({"rate": {"in": "1Mbit"}}, {"rate": {"in": "1Gbit"}}) == Port(in_rate=10**6)
    assert decide({"broadcast": 10}, {"broadcast": 5}) == decide({}, {"broadcast": 5}) == Port(broadcast=5)


def test_rates_that_the_kernel_cannot_keep() -> None:
    """A config is refused; a runtime's bandwidth may be any number, and is brought within bounds."""
    assert decide({"rate": {"out": "100Gbit", "burst": "256MiB"}}, {})
    for rate in (
        {"in": "101Gbit"},
        {"out": "999999Gbit"},
        {"out": "1Gbit", "burst": "63KiB"},
        {"burst": "257MiB"},
    ):
        assert "a rate is at most 100Gbit, and a burst 64KiB to 256MiB" in refusal({}, {"rate": rate})
        assert "port.rate." in refusal({"rate": rate}, {})
    assert decide({}, {}, egressRate=10**15, egressBurst=10**12) == Port(out_rate=10**11, out_burst=1 << 28)
    assert decide({}, {}, ingressRate=1, ingressBurst=8) == Port(in_rate=1000, in_burst=1 << 16)


_PORTS = st.fixed_dictionaries(
    {},
    optional={
        "macSpoofCheck": st.booleans(),
        "ipSpoofCheck": st.booleans(),
        "dhcpServer": st.booleans(),
        "routerAdvertisements": st.booleans(),
        "macs": st.lists(st.sampled_from(MACS), max_size=2),
        "addresses": st.lists(st.sampled_from(["10.1.0.0/16", "10.1.2.3", "::/0", "fe80::/64"]), max_size=2),
        "trunk": st.lists(st.sampled_from([0, 100, "100", "100-4094", "7-9", 4094]), max_size=3),
        "broadcast": st.integers(1, 3),
        "rate": st.fixed_dictionaries(
            {}, optional={each: st.sampled_from(["1kbit", "2kbit", "1Mbit"]) for each in ("out", "in")}
        ),
    },
)


@given(_PORTS, _PORTS, st.booleans(), st.integers(0, 3000))
def test_a_network_config_never_widens(
    policy: dict[str, Any], wanted: dict[str, Any], on_vlan: bool, rate: int
) -> None:
    bound = decide(policy, {}, on_vlan=on_vlan) or Port()
    try:
        port = decide(policy, wanted, on_vlan=on_vlan, egressRate=rate) or Port()
    except CniError as error:
        assert error.msg.startswith("port.")
        return
    assert port.wider_than(bound) == []


@given(_PORTS, _PORTS)
def test_wider(one: dict[str, Any], other: dict[str, Any]) -> None:
    """No profile is wider than itself or than none; two of which neither is wider let the same pass."""
    ours, others = (decide(each, {}) or Port() for each in (one, other))
    assert ours.wider_than(ours) == ours.wider_than(Port()) == []
    assert len(Port().wider_than(ours)) >= len({*ours.fields()} - {"macs", "addresses"})
    if not ours.wider_than(others) and not others.wider_than(ours):
        assert (ours.ip_spoof_check, ours.out_rate, ours.broadcast) == (
            others.ip_spoof_check,
            others.out_rate,
            others.broadcast,
        )
        assert (ours.tags is None) is (others.tags is None)
        assert vlans(ours.tags or ()) == vlans(others.tags or ())


@pytest.mark.parametrize(
    ("port", "field"),
    [
        ({"trunk": list(range(65))}, "port.trunk"),
        ({"trunk": [4095]}, "port.trunk[0]"),
        ({"trunk": ["100-"]}, "port.trunk[0]"),
        ({"trunk": ["1-5000"]}, "port.trunk[0]"),
        ({"macs": ["00:00:5e:00:01"]}, "port.macs[0]"),
        ({"macs": [MACS[0]] * 33}, "port.macs"),
        ({"addresses": ["somewhere"]}, "port.addresses[0]"),
        ({"addresses": ["::1"] * 33}, "port.addresses"),
        ({"rate": {"out": "0Mbit"}}, "port.rate.out"),
        ({"rate": {"out": 1000}}, "port.rate.out"),
        ({"rate": {"burst": "64kB"}}, "port.rate.burst"),
        ({"broadcast": 0}, "port.broadcast"),
        ({"macSpoofcheck": True}, "port"),
    ],
)
def test_what_the_schema_refuses(tmp_path: Path, port: dict[str, Any], field: str) -> None:
    assert f"interfaces[0].{field}" in _refused(tmp_path, port)


def test_the_policy_names_the_entry(tmp_path: Path) -> None:
    assert 'interfaces[0].port.trunk: "9-8" is refused' in _refused(tmp_path, {"trunk": ["9-8"]})


def _refused(folder: Path, port: dict[str, Any]) -> str:
    path = folder / "interfaces.yaml"
    path.write_text(
        yaml.safe_dump({"interfaces": [{"name": "data", "source": {"dev": "eth0"}, "port": port}]})
    )
    path.chmod(0o644)
    with pytest.raises(CniError) as refused:
        policies.load(path)
    assert refused.value.code == 7
    return refused.value.msg
