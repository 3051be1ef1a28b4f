"""Checklist items 8 to 11: the versions of the protocol, and what a result looks like in each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import NIC
from tests.conformance.test_invocation import VERSIONS
from tests.runner import config

if TYPE_CHECKING:
    from lab.wire import Netns
    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin

MAC = "02:00:00:00:0a:08"


@pytest.mark.parametrize("version", [*VERSIONS, "9.9.9"])
def test_item_08_echo(plugin: Plugin, version: str) -> None:
    """VERSION echoes the input's version, known to us or not, and lists those that we speak."""
    answer = plugin("VERSION", json.dumps({"cniVersion": version}).encode())
    assert answer.ok() == {"cniVersion": version, "supportedVersions": list(VERSIONS)}


@pytest.mark.parametrize("stdin", [b"", b"{}", b"{", b'{"cniVersion": 1}'])
def test_item_08_no_version(plugin: Plugin, stdin: bytes) -> None:
    """VERSION survives an empty or unreadable stdin."""
    assert plugin("VERSION", stdin).ok() == {"cniVersion": "1.1.0", "supportedVersions": list(VERSIONS)}


@pytest.mark.parametrize("absent", [{}, {"cniVersion": ""}], ids=["absent", "empty"])
def test_item_09_none_is_the_first(
    plugin: Plugin, pod: Netns, host_local: HostLocal, absent: dict[str, str]
) -> None:
    """No cniVersion means 0.1.0: so is the answer, and what came later is not there yet."""
    conf = {"name": "wire", "type": "vmtap", "source": NIC, "ipam": host_local.ipam} | absent
    result = plugin("ADD", conf, netns=pod).ok()
    assert result["cniVersion"] == "0.1.0"
    assert result["ip4"]["ip"] == "10.9.0.2/24"
    assert "cniVersion 0.1.0 has no CHECK" in plugin("CHECK", conf, netns=pod).error(1)["msg"]
    plugin("DEL", conf, netns=pod).ok()
    assert host_local.leases() == []


@pytest.mark.parametrize("version", ["0.5.0", "2.0.0", "1.1", "1.1.0\n", "v1.1.0"])
def test_item_09_unknown(plugin: Plugin, pod: Netns, version: str) -> None:
    """A version that we do not list is error 1, which lists those that we do."""
    error = plugin("ADD", config(source=NIC, cniVersion=version), netns=pod).error(1)
    assert json.dumps(version) in error["msg"]
    assert ", ".join(VERSIONS) in error["msg"]
    assert list(pod.links()) == ["lo"]


@pytest.mark.parametrize("command", ["CHECK", "GC", "STATUS"])
def test_item_09_unknown_to_all(plugin: Plugin, command: str) -> None:
    """So it is for every other command but DEL; and the version is looked at before anything else in the config."""
    plugin(command, {"cniVersion": "9.9.9", "name": 5, "mode": "flat"}, netns="/nowhere").error(1)


@pytest.mark.parametrize("version", VERSIONS)
def test_item_10_result(plugin: Plugin, pod: Netns, host_local: HostLocal, version: str) -> None:
    """The result is in the input's version, with all that the version has a word for and no more; so is DEL's end."""
    conf = config(cniVersion=version, source=NIC, mac=MAC, ipam=host_local.ipam, dns={"domain": "lab"})
    assert plugin("ADD", conf, netns=pod).ok() == {"cniVersion": version, **_expected(version, str(pod.path))}
    assert pod.links()["net1"]["address"] == MAC
    answer = plugin("DEL", conf, netns=pod)
    assert (answer.status, answer.stdout) == (0, b"")
    assert list(pod.links()) == ["lo"]
    assert host_local.leases() == []


def _expected(version: str, sandbox: str) -> dict[str, Any]:
    address, gateway, routes = "10.9.0.2/24", "10.9.0.1", [{"dst": "0.0.0.0/0"}]
    if version in ("0.1.0", "0.2.0"):
        return {"ip4": {"ip": address, "gateway": gateway, "routes": routes}, "dns": {"domain": "lab"}}
    rich = version in ("1.0.0", "1.1.0")
    family = {} if rich else {"version": "4"}
    mtu = {"mtu": 1500} if rich else {}
    return {
        "interfaces": [{"name": "net1", "mac": MAC, "sandbox": sandbox} | mtu],
        "ips": [{"address": address, "gateway": gateway, "interface": 0} | family],
        "routes": routes,
        "dns": {"domain": "lab"},
    }


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_item_10_without_address(plugin: Plugin, pod: Netns, version: str) -> None:
    """From 0.3.0 on a result needs no address: a VM's wire has none."""
    result = plugin("ADD", config(cniVersion=version, source=NIC), netns=pod).ok()
    assert list(result) == ["cniVersion", "interfaces"]
    assert list(pod.links()) == ["lo", "net1"]


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_item_10_needs_address(plugin: Plugin, pod: Netns, version: str) -> None:
    """Up to 0.2.0 it does: without IPAM that is error 1, and neither the kernel nor the state was touched."""
    error = plugin("ADD", config(cniVersion=version, source=NIC), netns=pod).error(1)
    assert "IP address" in error["msg"]
    assert list(pod.links()) == ["lo"]
    assert not plugin.state.exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("answer", ["{}", '{"cniVersion": "1.1.0", "ip4": {"ip": "10.9.0.5/24"}}'])
def test_item_10_got_no_address(
    plugin: Plugin, pod: Netns, fake: FakeIpam, version: str, answer: str
) -> None:
    """Where the delegate returns no address, or one in a form of another version, its DEL is run: error 109."""
    fake.write(ADD=f"echo '{answer}'")
    conf = config(cniVersion=version, source=NIC, ipam=fake.config)
    error = plugin("ADD", conf, netns=pod).error(109)
    assert "ipam.type 'fake' returned no address" in error["msg"]
    assert ("ip4" in answer) is ("CNI 0.2.0, and the result is of 1.1.0" in error["msg"])
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []


@pytest.mark.parametrize(
    ("command", "version"),
    [
        *(("CHECK", version) for version in VERSIONS if version < "0.4.0"),
        *((command, version) for command in ("GC", "STATUS") for version in VERSIONS if version < "1.1.0"),
    ],
)
def test_item_11_too_old(plugin: Plugin, pod: Netns, command: str, version: str) -> None:
    """CHECK before 0.4.0, GC and STATUS before 1.1.0 are error 1."""
    error = plugin(command, config(cniVersion=version, source=NIC), netns=pod).error(1)
    assert f"cniVersion {version} has no {command}" in error["msg"]


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_item_11_new_enough(plugin: Plugin, command: str) -> None:
    """From 1.1.0 on there are GC and STATUS. (CHECK from 0.4.0 on: item 23.)"""
    assert plugin(command, config(source=NIC)).status == 0
