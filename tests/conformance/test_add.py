"""Checklist items 14 to 18: what ADD makes, keeps, answers and undoes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import BRIDGE, NIC
from tests.conformance.test_invocation import VERSIONS, each_device
from tests.runner import config

if TYPE_CHECKING:
    from lab.wire import Lab, Netns
    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin

BEFORE: dict[str, Any] = {
    "interfaces": [
        {"name": "cni0", "mac": "02:00:00:00:0e:01"},
        {"name": "eth0", "mac": "02:00:00:00:0e:02", "sandbox": "/elsewhere"},
    ],
    "ips": [{"version": "4", "address": "10.8.0.7/24", "gateway": "10.8.0.1", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.8.0.1"}],
    "dns": {"nameservers": ["10.8.0.53"]},
    "example.org/extra": {"kept": True},
}
"""A prevResult of 0.3.0 to 0.4.0; later versions have no `version` in ips."""


def _before(version: str) -> dict[str, Any]:
    ips = [dict(each) for each in BEFORE["ips"]]
    if version in ("1.0.0", "1.1.0"):
        for each in ips:
            del each["version"]
    return BEFORE | {"cniVersion": version, "ips": ips}


def _stable(pod: Netns) -> dict[str, Any]:
    """The pod's links without what the kernel counts or decides a moment later."""
    keys = ("ifindex", "address", "mtu", "ifalias", "flags", "promiscuity", "allmulti")
    return {name: {key: link.get(key) for key in keys} for name, link in pod.links().items()}


@each_device
def test_item_14_foreign_link(
    plugin: Plugin, pod: Netns, host_local: HostLocal, lab: Lab, fields: dict[str, Any]
) -> None:
    """A link of that name in the pod makes ADD fail; it is untouched, and no address was asked for."""
    pod.ip("link add net1 mtu 1400 address 02:00:00:00:0e:0a type bridge")
    before, node = _stable(pod), set(lab.node.links())
    plugin("ADD", config(ipam=host_local.ipam, **fields), netns=pod).error(101)
    assert _stable(pod) == before
    assert set(lab.node.links()) == node
    assert host_local.leases() == []
    assert plugin.leftovers() == []


def test_item_14_own_link(plugin: Plugin, pod: Netns, host_local: HostLocal) -> None:
    """A second ADD of the same attachment fails, and the first one goes on to work."""
    conf = config(source=NIC, ipam=host_local.ipam)
    result = plugin("ADD", conf, netns=pod).ok()
    before = _stable(pod)
    plugin("ADD", conf, netns=pod).error(101)
    assert _stable(pod) == before
    assert host_local.leases() == ["10.9.0.2"]
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    plugin("DEL", conf, netns=pod).ok()
    assert (host_local.leases(), plugin.leftovers()) == ([], [])


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_item_15_chained(plugin: Plugin, pod: Netns, host_local: HostLocal, version: str) -> None:
    """All that prevResult says is in the answer, as it said it, keys that we do not know too; ours comes after it."""
    before = _before(version)
    conf = config(cniVersion=version, source=NIC, ipam=host_local.ipam, prevResult=before)
    result = plugin("ADD", conf, netns=pod).ok()
    ours = {key: result[key].pop() for key in ("interfaces", "ips", "routes")}
    assert result == before
    assert ours["interfaces"]["name"] == "net1"
    assert (ours["ips"]["address"], ours["ips"]["interface"]) == ("10.9.0.2/24", 2)
    assert ours["routes"] == {"dst": "0.0.0.0/0"}


def test_item_15_own_dns(plugin: Plugin, pod: Netns) -> None:
    """Extended: our dns goes before the previous one; with no addresses of ours, the previous ones stay alone."""
    before = _before("1.1.0")
    result = plugin("ADD", config(source=NIC, prevResult=before, dns={"domain": "vm"}), netns=pod).ok()
    assert result["dns"] == {"domain": "vm"}
    assert result["ips"] == before["ips"]


@each_device
def test_item_16_result(plugin: Plugin, pod: Netns, host_local: HostLocal, fields: dict[str, Any]) -> None:
    """Name, MAC and MTU are what the kernel has, the addresses point to our link, and no socketPath is made up."""
    result = plugin("ADD", config(mtu=1400, ipam=host_local.ipam, **fields), netns=pod).ok()
    ours = result["interfaces"][0]
    link = pod.links()["net1"]
    assert (ours["name"], ours["mtu"], link["mtu"]) == ("net1", 1400, 1400)
    plain = fields == {"device": "tap"}  # whose own MAC is the pod's end of the wire
    assert (ours["mac"] == link["address"]) is not plain
    assert result["ips"] == [{"address": "10.9.0.2/24", "gateway": "10.9.0.1", "interface": 0}]
    assert all("socketPath" not in each for each in result["interfaces"])
    assert link["ifalias"] == "vmtap/wire/c1/net1"
    assert "UP" in link["flags"]


@pytest.mark.parametrize("mode", ["vepa", "pepa", "private", "bridge"])
def test_item_16_mode(plugin: Plugin, pod: Netns, mode: str) -> None:
    """The kernel's mode is the one that was asked for."""
    plugin("ADD", config(source=NIC, mode=mode), netns=pod).ok()
    shown = pod.links()["net1"]["linkinfo"]
    assert shown["info_kind"] == "macvtap"
    assert shown["info_data"]["mode"] == {"pepa": "private"}.get(mode, mode)


def test_item_16_sandbox(plugin: Plugin, pod: Netns) -> None:
    """sandbox is CNI_NETNS to the letter, however odd the path."""
    path = f"/run/./{pod.path.name}"
    ours = plugin("ADD", config(source=NIC), netns=path).ok()["interfaces"][0]
    assert ours["sandbox"] == path
    link = plugin.policy.with_name("netns")
    os.symlink(pod.path, link)
    plugin("DEL", config(source=NIC), netns=link).ok()
    assert list(pod.links()) == ["lo"]


def test_item_16_host_end(plugin: Plugin, pod: Netns, lab: Lab) -> None:
    """The port that a tap on a bridge brings to the host is among the interfaces, as one without a sandbox."""
    result = plugin("ADD", config(source=BRIDGE, device="tap"), netns=pod).ok()
    port = result["interfaces"][1]
    link = lab.node.links()[port["name"]]
    assert link["master"] == BRIDGE
    assert port == {"name": port["name"], "mac": link["address"], "mtu": link["mtu"]}


@pytest.mark.parametrize("path", ["node", "/proc/self/ns/net"])
def test_item_17_own_netns(plugin: Plugin, lab: Lab, fake: FakeIpam, path: str) -> None:
    """The plugin's own namespace as CNI_NETNS is error 8, before the delegate or the state is touched."""
    before = set(lab.node.links())
    conf = config(source=NIC, ipam=fake.config)
    plugin("ADD", conf, netns=lab.node if path == "node" else path).error(8)
    assert set(lab.node.links()) == before
    assert fake.log() == []
    assert not plugin.state.exists()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"mac": "NIC's own"}, 103, id="the link is refused when it is set up"),
        pytest.param({"prevResult": {"interfaces": 5}}, 6, id="prevResult is malformed"),
        pytest.param({"addressing": "link"}, 100, id="an address is refused when all else is done"),
        pytest.param(
            {"addressing": "link", "source": BRIDGE, "device": "tap"}, 100, id="so with a tap on a bridge"
        ),
        pytest.param({"addressing": "link", "device": "tap", "source": None}, 100, id="so with a plain tap"),
        pytest.param({"addressing": "link", "owner": 107}, 100, id="so with a device node"),
    ],
)
def test_item_18_undone(
    plugin: Plugin, pod: Netns, fake: FakeIpam, fields: dict[str, Any], code: int
) -> None:
    """A failure after the delegate ran: its DEL runs, and links, state and promiscuity are as before."""
    routes = '[{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}]'  # by a gateway that no address reaches
    fake.write(ADD=f"""echo '{{"ips": [{{"address": "10.9.0.5/24"}}], "routes": {routes}}}'""")
    before = plugin.node.links()
    if "mac" in fields:
        fields = fields | {"mac": before[NIC]["address"]}
    wanted = {"source": NIC} | fields
    conf = config(ipam=fake.config, **{key: value for key, value in wanted.items() if value is not None})
    plugin("ADD", conf, netns=pod).error(code)
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert list(pod.links()) == ["lo"]
    after = plugin.node.links()
    assert {name: link["promiscuity"] for name, link in after.items()} == {
        name: link["promiscuity"] for name, link in before.items()
    }
    assert plugin.leftovers() == []


def test_item_18_source_vanishes(plugin: Plugin, pod: Netns, fake: FakeIpam, spare: str) -> None:
    """The source goes away between the decision and the link: undone, and named."""
    fake.write(ADD=f"""ip link delete {spare}; echo '{{"ips": [{{"address": "10.9.0.5/24"}}]}}'""")
    error = plugin("ADD", config(source=spare, ipam=fake.config), netns=pod).error(104)
    assert spare in error["msg"]
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


def test_item_18_undoing_fails(plugin: Plugin, pod: Netns, fake: FakeIpam, lab: Lab) -> None:
    """Where the delegate's DEL fails too, the first error is reported with that in its details; DEL ends it later."""
    failure = """echo '{"code": 111, "msg": "the database is away"}'; exit 1"""
    fake.write(DEL=failure)
    conf = config(source=NIC, mac=lab.node.links()[NIC]["address"], ipam=fake.config)
    error = plugin("ADD", conf, netns=pod).error(103)
    assert "the database is away" in error["details"]
    assert list(pod.links()) == ["lo"]
    fake.write()
    plugin("DEL", conf, netns=pod).ok()
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1", "DEL c1 net1"]
    assert plugin.leftovers() == []
