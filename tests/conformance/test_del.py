"""Checklist items 19 to 21: DEL ends what there is, whatever has become of the rest, and nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import NIC, Netns
from tests.conformance.test_invocation import each_device
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab
    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin


@each_device
def test_item_19_repeatable(
    plugin: Plugin, pod: Netns, host_local: HostLocal, lab: Lab, fields: dict[str, Any]
) -> None:
    """DEL before any ADD, after it, and twice more: success without a word, and nothing is left."""
    conf = config(ipam=host_local.ipam, **fields)
    before = set(lab.node.links())
    for _ in range(2):
        answer = plugin("DEL", conf, netns=pod)
        assert (answer.status, answer.stdout) == (0, b"")
    result = plugin("ADD", conf, netns=pod).ok()
    assert "net1" in pod.links()
    for _ in range(3):
        answer = plugin("DEL", conf | {"prevResult": result}, netns=pod)
        assert (answer.status, answer.stdout) == (0, b"")
        assert list(pod.links()) == ["lo"]
    assert set(lab.node.links()) == before
    assert (host_local.leases(), plugin.leftovers()) == ([], [])


@pytest.mark.parametrize("netns", [None, "", "/run/vmtap-no-such-netns", "/proc/version"])
@each_device
def test_item_19_without_netns(
    plugin: Plugin, pod: Netns, lab: Lab, netns: str | None, fields: dict[str, Any]
) -> None:
    """CNI_NETNS unset, empty, gone or no namespace: the link goes all the same, as the record knows where it is."""
    before = set(lab.node.links())
    plugin("ADD", config(**fields), netns=pod).ok()
    answer = plugin("DEL", config(**fields), env={"CNI_NETNS": netns})
    assert (answer.status, answer.stdout) == (0, b"")
    assert (list(pod.links()), set(lab.node.links()), plugin.leftovers()) == (["lo"], before, [])


@each_device
def test_item_19_netns_is_dead(
    plugin: Plugin, host_local: HostLocal, lab: Lab, fields: dict[str, Any]
) -> None:
    """The namespace itself is no more: success, the lease is free, and the host has no end of it left."""
    conf = config(ipam=host_local.ipam, **fields)
    before = set(lab.node.links())
    # The kernel may end the link a moment after the test: the next one's, on the same NIC, needs another MAC.
    with Netns("doomed") as pod:
        plugin("ADD", conf, netns=pod, container="doomed").ok()
    plugin("DEL", conf, netns=pod, container="doomed").ok()
    assert (set(lab.node.links()), host_local.leases(), plugin.leftovers()) == (before, [], [])


@each_device
def test_item_19_link_is_gone(plugin: Plugin, pod: Netns, lab: Lab, fields: dict[str, Any]) -> None:
    """The link is missing: success."""
    before = set(lab.node.links())
    plugin("ADD", config(**fields), netns=pod).ok()
    pod.ip("link delete net1")
    plugin("DEL", config(**fields), netns=pod).ok()
    assert (list(pod.links()), set(lab.node.links()), plugin.leftovers()) == (["lo"], before, [])


def test_item_19_source_is_gone(plugin: Plugin, pod: Netns, spare: str, lab: Lab) -> None:
    """So is the source device: success."""
    plugin("ADD", config(source=spare), netns=pod).ok()
    lab.node.ip(f"link delete {spare}")
    assert list(pod.links()) == ["lo"]
    plugin("DEL", config(source=spare), netns=pod).ok()
    assert plugin.leftovers() == []


@pytest.mark.parametrize(
    "policy", [None, "interfaces: []\n", "interfaces: {{\n"], ids=["gone", "changed", "broken"]
)
def test_item_19_policy(plugin: Plugin, pod: Netns, policy: str | None) -> None:
    """The policy is gone, allows it no more, or cannot be read: success."""
    plugin.policy.write_text(f"interfaces:\n- {{name: dataplane, source: {{dev: {NIC}}}, type: ethernet}}\n")
    conf = config(interface="dataplane")
    plugin("ADD", conf, netns=pod).ok()
    if policy is None:
        plugin.policy.unlink()
    else:
        plugin.policy.write_text(policy)
    plugin("DEL", conf, netns=pod).ok()
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "flat"},
        {"modee": 1},
        {"source": "eth99"},
        {"prevResult": {"interfaces": 5}},
        {"cniVersion": "0.3.0"},
        {"cniVersion": "9.9.9"},
        {"name": None},
        {"name": "../wire"},
        {"args": "\0"},
    ],
)
def test_item_19_config(plugin: Plugin, pod: Netns, changed: dict[str, Any]) -> None:
    """The config is another, or one that ADD refuses, prevResult, version and name included: success."""
    conf = config(source=NIC)
    plugin("ADD", conf, netns=pod).ok()
    plugin("DEL", conf | changed, netns=pod, args="what=is;this").ok()
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


@pytest.mark.parametrize("stdin", [b"", b"{", b'{"name":"wire","name":"wire"}', b"\xff"])
def test_item_19_undecodable(plugin: Plugin, pod: Netns, stdin: bytes) -> None:
    """The config cannot be decoded: the attachment of the container id and ifname is ended."""
    plugin("ADD", config(source=NIC), netns=pod).ok()
    plugin("DEL", stdin, netns=pod).ok()
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


@each_device
def test_item_19_without_record(plugin: Plugin, pod: Netns, lab: Lab, fields: dict[str, Any]) -> None:
    """The record is lost: the link's alias says that it is ours."""
    before = set(lab.node.links())
    plugin("ADD", config(**fields), netns=pod).ok()
    for path in plugin.leftovers():
        os.unlink(path)
    plugin("DEL", config(**fields), netns=pod).ok()
    assert (list(pod.links()), set(lab.node.links())) == (["lo"], before)


def test_item_20_delegate_without_netns(plugin: Plugin, pod: Netns, host_local: HostLocal) -> None:
    """Without a netns the link goes and the delegate's DEL runs, with and without our record of the ADD."""
    conf = config(source=NIC, ipam=host_local.ipam)
    plugin("ADD", conf, netns=pod).ok()
    plugin("DEL", conf, env={"CNI_NETNS": ""}).ok()
    assert (list(pod.links()), host_local.leases(), plugin.leftovers()) == (["lo"], [], [])
    plugin("ADD", conf, netns=pod).ok()
    for path in plugin.leftovers():
        os.unlink(path)
    plugin("DEL", conf, env={"CNI_NETNS": ""}).ok()
    assert host_local.leases() == []


@each_device
def test_item_20_delegate_fails(
    plugin: Plugin, pod: Netns, lab: Lab, fake: FakeIpam, fields: dict[str, Any]
) -> None:
    """The delegate's error is reported after our own clean-up; DEL again asks it again, until it is well."""
    conf = config(ipam=fake.config, **fields)
    before = set(lab.node.links())
    fake.write(DEL="""echo '{"code": 113, "msg": "the database is away", "details": "for now"}'; exit 1""")
    plugin("ADD", conf, netns=pod).ok()
    for _ in range(2):
        error = plugin("DEL", conf, env={"CNI_NETNS": ""}).error(113)
        assert "the database is away" in error["msg"]
        assert "for now" in error["details"]
        assert (list(pod.links()), set(lab.node.links())) == (["lo"], before)
    fake.write()
    plugin("DEL", conf, env={"CNI_NETNS": ""}).ok()
    assert fake.log() == ["ADD c1 net1", *["DEL c1 net1"] * 3]
    assert plugin.leftovers() == []


def test_item_21_never_ours(plugin: Plugin, pod: Netns) -> None:
    """A link of that name that we did not make stays."""
    pod.ip("link add net1 type bridge")
    plugin("DEL", config(source=NIC), netns=pod).ok()
    assert list(pod.links()) == ["lo", "net1"]


@each_device
def test_item_21_replaced(plugin: Plugin, pod: Netns, lab: Lab, fields: dict[str, Any]) -> None:
    """Ours was replaced by another of its name: that one stays, and what was ours on the host goes."""
    before = set(lab.node.links())
    plugin("ADD", config(**fields), netns=pod).ok()
    pod.ip("link delete net1", "link add net1 type bridge")
    plugin("DEL", config(**fields), netns=pod).ok()
    assert pod.links()["net1"]["linkinfo"]["info_kind"] == "bridge"
    assert (set(lab.node.links()), plugin.leftovers()) == (before, [])


@pytest.mark.parametrize(
    ("network", "container", "ifname"),
    [("other", "c1", "net1"), ("wire", "c2", "net1"), ("wire", "c1", "net2")],
)
def test_item_21_other_attachment(
    plugin: Plugin, pod: Netns, network: str, container: str, ifname: str
) -> None:
    """An attachment of another network, container or interface stays, with its record."""
    plugin("ADD", config(source=NIC), netns=pod).ok()
    kept = plugin.leftovers()
    plugin("DEL", config(source=NIC, name=network), netns=pod, container=container, ifname=ifname).ok()
    assert list(pod.links()) == ["lo", "net1"]
    assert plugin.leftovers() == kept


def test_item_21_ifindex_used_again(plugin: Plugin, pods: Callable[[], Netns]) -> None:
    """A foreign link that has our link's index and name, in our pod, stays."""
    pod = pods()
    plugin("ADD", config(source=NIC), netns=pod).ok()
    index = pod.links()["net1"]["ifindex"]
    pod.ip("link delete net1", f"link add net1 index {index} type bridge", "link set net1 alias mine")
    plugin("DEL", config(source=NIC), netns=pod).ok()
    assert pod.links()["net1"]["ifindex"] == index
    assert plugin.leftovers() == []
