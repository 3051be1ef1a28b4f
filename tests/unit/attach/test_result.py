"""cni.result: every version is read and written, and a chain loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cni import spec
from cni.attach import result
from cni.attach.result import DNS, IP, Interface, Result, Route
from cni.errors import CniError

FULL = Result(
    interfaces=(
        Interface("br0", mac="02:00:00:00:00:01"),
        Interface("net1", "02:00:00:00:00:02", 9000, "/run/netns/x", "/run/s", "0000:04:00.5"),
    ),
    ips=(IP("10.1.0.5/24", "10.1.0.1", 1), IP("fd00::5/64", interface=1), IP("10.2.0.5/24")),
    routes=(
        Route("0.0.0.0/0", "10.1.0.1"),
        Route("fd00:1::/64", "fd00::1", mtu=1400, advmss=1300, priority=5, table=0, scope=0),
    ),
    dns=DNS(("10.1.0.1", "fd00::1"), "example.org", ("a.example.org",), ("ndots:2",)),
)


def test_render_newest() -> None:
    assert result.render(FULL, "1.1.0") == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "br0", "mac": "02:00:00:00:00:01"},
            {
                "name": "net1",
                "mac": "02:00:00:00:00:02",
                "mtu": 9000,
                "sandbox": "/run/netns/x",
                "socketPath": "/run/s",
                "pciID": "0000:04:00.5",
            },
        ],
        "ips": [
            {"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1},
            {"address": "fd00::5/64", "interface": 1},
            {"address": "10.2.0.5/24"},
        ],
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "10.1.0.1"},
            {
                "dst": "fd00:1::/64",
                "gw": "fd00::1",
                "mtu": 1400,
                "advmss": 1300,
                "priority": 5,
                "table": 0,
                "scope": 0,
            },
        ],
        "dns": {
            "nameservers": ["10.1.0.1", "fd00::1"],
            "domain": "example.org",
            "search": ["a.example.org"],
            "options": ["ndots:2"],
        },
    }


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_render_04(version: str) -> None:
    document = result.render(FULL, version)
    assert document["cniVersion"] == version
    assert document["interfaces"] == [
        {"name": "br0", "mac": "02:00:00:00:00:01"},
        {"name": "net1", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x"},
    ]
    assert document["ips"] == [
        {"version": "4", "address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1},
        {"version": "6", "address": "fd00::5/64", "interface": 1},
        {"version": "4", "address": "10.2.0.5/24"},
    ]


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_render_02(version: str) -> None:
    document = result.render(FULL, version)
    del document["dns"]
    assert document == {
        "cniVersion": version,
        "ip4": {
            "ip": "10.1.0.5/24",
            "gateway": "10.1.0.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}],
        },
        "ip6": {"ip": "fd00::5/64", "routes": [{"dst": "fd00:1::/64", "gw": "fd00::1"}]},
    }


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_without_an_ip(version: str) -> None:
    bare = Result(interfaces=(Interface("net1"),))
    if result.needs_ip(version):
        with pytest.raises(CniError) as caught:
            result.render(bare, version)
        assert caught.value.code == spec.INCOMPATIBLE_VERSION
    else:
        assert result.render(bare, version) == {"cniVersion": version, "interfaces": [{"name": "net1"}]}


def test_needs_ip() -> None:
    assert [version for version in spec.VERSIONS if result.needs_ip(version)] == ["0.1.0", "0.2.0"]


V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)
ADDRESS = V4 | V6
NETWORK = st.one_of(
    st.builds("{}/{}".format, V4, st.integers(0, 32)), st.builds("{}/{}".format, V6, st.integers(0, 128))
)
NUMBER = st.integers(0, 2**32 - 1)
WORD = st.text(max_size=8)
WORDS = st.lists(WORD, max_size=3).map(tuple)
INTERFACES = st.lists(st.builds(Interface, WORD, WORD, NUMBER, WORD, WORD, WORD), max_size=3).map(tuple)
ROUTES = st.builds(
    Route, NETWORK, st.just("") | ADDRESS, NUMBER, NUMBER, NUMBER, st.none() | NUMBER, st.none() | NUMBER
)


@st.composite
def results(draw: st.DrawFn) -> Result:
    interfaces = draw(INTERFACES)
    index = st.integers(0, len(interfaces) - 1) if interfaces else st.none()
    ips = st.lists(st.builds(IP, NETWORK, st.just("") | ADDRESS, st.none() | index), max_size=3)
    return Result(
        interfaces,
        tuple(draw(ips)),
        tuple(draw(st.lists(ROUTES, max_size=3))),
        draw(st.builds(DNS, WORDS, WORD, WORDS, WORDS)),
    )


def expressible(whole: Result, version: str) -> Result:
    """What of a result is left in a version that knows less."""
    if version in ("1.0.0", "1.1.0"):
        return whole
    if version in ("0.3.0", "0.3.1", "0.4.0"):
        interfaces = (replace(each, mtu=0, socket_path="", pci_id="") for each in whole.interfaces)
        return replace(whole, interfaces=tuple(interfaces))
    ips: list[IP] = []
    routes: list[Route] = []
    for sign in (".", ":"):
        first = [replace(ip, interface=None) for ip in whole.ips if sign in ip.address][:1]
        ips += first
        routes += [Route(each.dst, each.gw) for each in whole.routes if first and (sign in each.dst)]
    return Result((), tuple(ips), tuple(routes), whole.dns)


def test_first_versions_tell_families_apart_by_colon() -> None:
    mapped = Result(ips=(IP("::ffff:10.0.0.1/120"),))
    assert list(result.render(mapped, "0.2.0")) == ["cniVersion", "ip6"]


@settings(max_examples=200, deadline=None)
@given(results(), st.sampled_from(spec.VERSIONS))
@example(FULL, "0.1.0")
@example(FULL, "0.4.0")
def test_round_trip(whole: Result, version: str) -> None:
    if result.needs_ip(version) and not whole.ips:
        return
    document = json.loads(json.dumps(result.render(whole, version)))
    assert document["cniVersion"] == version
    # The version is in the document, so what the reader expects does not matter.
    for expected in (version, "1.1.0", "0.2.0"):
        assert result.parse(document, expected) == expressible(whole, version)


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_version_may_be_absent(version: str) -> None:
    document = result.render(FULL, version)
    del document["cniVersion"]
    assert result.parse(document, version) == expressible(FULL, version)


def test_nulls_and_empty_dns_are_nothing() -> None:
    nothing = {"interfaces": None, "ips": None, "routes": None, "dns": {"nameservers": None}}
    assert result.parse(nothing, "1.1.0") == Result()
    assert result.parse({"ip4": None, "dns": {}}, "0.2.0") == Result()


def test_unknown_keys_are_passed_over() -> None:
    document = {"x": 1, "interfaces": [{"name": "a", "x": 1}], "ips": [{"address": "10.0.0.1/8", "x": 1}]}
    assert result.parse(document, "1.1.0") == Result((Interface("a"),), (IP("10.0.0.1/8"),))


@pytest.mark.parametrize(
    ("version", "document", "message"),
    [
        ("1.1.0", {"cniVersion": "7"}, 'prevResult.cniVersion: "7" is not allowed; give one of 0.1.0, 0.2.0'),
        ("1.1.0", {"cniVersion": 1}, "prevResult.cniVersion: 1 is not"),
        ("1.1.0", {"cniVersion": []}, "prevResult.cniVersion: [] is not"),
        ("1.1.0", {"interfaces": {}}, "prevResult.interfaces: {} is not allowed; give a list of objects"),
        ("1.1.0", {"interfaces": [{}, 1]}, "prevResult.interfaces[1]: 1 is not allowed; give an object"),
        (
            "1.1.0",
            {"interfaces": [{"name": 1}]},
            "prevResult.interfaces[0].name: 1 is not allowed; give a str",
        ),
        (
            "1.1.0",
            {"interfaces": [{"mtu": "9"}]},
            'prevResult.interfaces[0].mtu: "9" is not allowed; give an',
        ),
        ("1.1.0", {"interfaces": [{"mtu": -1}]}, "prevResult.interfaces[0].mtu: -1 is not"),
        ("1.1.0", {"interfaces": [{"mtu": True}]}, "prevResult.interfaces[0].mtu: true is not"),
        (
            "1.1.0",
            {"ips": [{}]},
            "prevResult.ips[0].address: null is not allowed; give an address with prefix",
        ),
        ("1.1.0", {"ips": [{"address": "10.0.0.1"}]}, 'prevResult.ips[0].address: "10.0.0.1" is not'),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/255.0.0.0"}]}, "prevResult.ips[0].address"),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/33"}]}, "prevResult.ips[0].address"),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/"}]}, "prevResult.ips[0].address"),
        ("1.1.0", {"ips": [{"address": "fe80::1%eth0/64"}]}, "prevResult.ips[0].address"),
        ("1.1.0", {"ips": [{"address": 1}]}, "prevResult.ips[0].address"),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]}, "prevResult.ips[0].gateway"),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/8", "gateway": "10.0.0.1/8"}]}, "prevResult.ips[0].gateway"),
        (
            "1.1.0",
            {"interfaces": [{}], "ips": [{"address": "10.0.0.1/8", "interface": 1}]},
            "prevResult.ips[0].interface: 1 is not allowed; give an index into the 1 interfaces",
        ),
        ("1.1.0", {"ips": [{"address": "10.0.0.1/8", "interface": -1}]}, "prevResult.ips[0].interface: -1"),
        (
            "0.4.0",
            {"ips": [{"address": "10.0.0.1/8", "version": "6"}]},
            'prevResult.ips[0].version: "6" is not allowed; give "4", which is what the address is',
        ),
        ("1.1.0", {"routes": [{"gw": "10.0.0.1"}]}, "prevResult.routes[0].dst: null"),
        ("1.1.0", {"routes": [{"dst": "default"}]}, 'prevResult.routes[0].dst: "default"'),
        ("1.1.0", {"dns": []}, "prevResult.dns: [] is not allowed; give an object"),
        (
            "1.1.0",
            {"dns": {"search": [1]}},
            "prevResult.dns.search: [1] is not allowed; give a list of strings",
        ),
        ("0.2.0", {"ip4": []}, "prevResult.ip4: [] is not"),
        (
            "0.2.0",
            {"ip4": {"ip": "fd00::1/64"}},
            'prevResult.ip4.ip: "fd00::1/64" is not allowed; give an IPv4',
        ),
        ("0.2.0", {"ip6": {"ip": "fd00::1/64", "routes": [1]}}, "prevResult.ip6.routes[0]: 1 is not"),
    ],
)
def test_malformed(version: str, document: dict[str, Any], message: str) -> None:
    with pytest.raises(CniError) as caught:
        result.parse(document, version)
    assert caught.value.code == spec.DECODING_FAILURE
    assert caught.value.msg.startswith(message)
    assert "\n" not in str(caught.value)


def test_errors_name_the_document() -> None:
    with pytest.raises(CniError, match=r"the answer of host-local\.ips: 1 is not allowed"):
        result.parse({"ips": 1}, "1.1.0", where="the answer of host-local")


def test_parse_dns() -> None:
    assert result.parse_dns(None) == DNS()
    assert result.parse_dns({"nameservers": ["10.0.0.1"], "domain": "x"}) == DNS(("10.0.0.1",), "x")
    with pytest.raises(CniError, match=r"dns\.domain: 1 is not allowed"):
        result.parse_dns({"domain": 1})


PREVIOUS = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x", "x": 1}],
    "ips": [{"address": "10.9.0.5/24", "interface": 0, "x": 2}],
    "routes": [{"dst": "0.0.0.0/0", "x": 3}],
    "dns": {"nameservers": ["10.9.0.1"], "x": 4},
    "x": 5,
}


def test_chain_keeps_what_we_do_not_know() -> None:
    own = Result(
        (Interface("net1"),),
        (IP("10.1.0.5/24", interface=0), IP("10.1.0.6/24")),
        (Route("10.3.0.0/16"),),
    )
    assert result.extend(PREVIOUS, own, "1.1.0") == {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x", "x": 1}, {"name": "net1"}],
        "ips": [
            {"address": "10.9.0.5/24", "interface": 0, "x": 2},
            {"address": "10.1.0.5/24", "interface": 1},
            {"address": "10.1.0.6/24"},
        ],
        "routes": [{"dst": "0.0.0.0/0", "x": 3}, {"dst": "10.3.0.0/16"}],
        "dns": {"nameservers": ["10.9.0.1"], "x": 4},
        "x": 5,
    }


def test_chain_with_resolvers_of_ours() -> None:
    own = Result(dns=DNS(("10.1.0.1",)))
    assert result.extend(PREVIOUS, own, "1.1.0") == PREVIOUS | {"dns": {"nameservers": ["10.1.0.1"]}}


def test_chain_without_anything_before() -> None:
    assert result.extend(None, FULL, "0.4.0") == result.render(FULL, "0.4.0")


def test_chain_leaves_its_input_alone() -> None:
    before = json.dumps(PREVIOUS)
    result.extend(PREVIOUS, FULL, "1.1.0")
    assert json.dumps(PREVIOUS) == before


def test_chain_across_versions() -> None:
    extended = result.extend(PREVIOUS, Result((Interface("net1"),)), "0.4.0")
    assert extended["cniVersion"] == "0.4.0"
    assert extended["interfaces"] == [{"name": "eth0", "sandbox": "/run/netns/x"}, {"name": "net1"}]
    assert extended["ips"] == [{"version": "4", "address": "10.9.0.5/24", "interface": 0}]


def test_chain_after_a_malformed_result() -> None:
    with pytest.raises(CniError) as caught:
        result.extend({"ips": 1}, FULL, "1.1.0")
    assert caught.value.code == spec.DECODING_FAILURE


@settings(max_examples=100, deadline=None)
@given(results(), results(), st.sampled_from([each for each in spec.VERSIONS if not result.needs_ip(each)]))
def test_chain_is_both_results_in_a_row(before: Result, own: Result, version: str) -> None:
    extended = result.parse(result.extend(result.render(before, version), own, version), version)
    before, own = expressible(before, version), expressible(own, version)
    shift = len(before.interfaces)
    ips = (replace(ip, interface=None if ip.interface is None else ip.interface + shift) for ip in own.ips)
    assert extended == Result(
        before.interfaces + own.interfaces,
        before.ips + tuple(ips),
        before.routes + own.routes,
        own.dns if own.dns != DNS() else before.dns,
    )
