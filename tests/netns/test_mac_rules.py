"""What the policy says of MACs, at a real ADD; and the gateway's, which the node knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from cni.kernel import gateways
from cni.kernel.rtnl import Rtnl
from lab.wire import NIC
from tests.runner import config

if TYPE_CHECKING:
    from lab.wire import Lab
    from tests.runner import Plugin

GATEWAY, OTHER, SIXTH = "02:00:00:00:aa:01", "02:00:00:00:aa:02", "02:00:00:00:aa:06"
ENTRY = f"interfaces: [{{name: lan, source: {{dev: {NIC}}}%s}}]\n"


def put(plugin: Plugin, text: str) -> None:
    plugin.policy.write_text(text)
    plugin.policy.chmod(0o644)


@pytest.fixture
def routed(lab: Lab) -> Lab:
    """A node whose NIC has a gateway of each family in the neighbour table."""
    lab.node.run(["sh", "-c", f"echo 0 >/proc/sys/net/ipv6/conf/{NIC}/disable_ipv6"])
    lab.node.ip(
        f"address add 10.99.0.2/24 dev {NIC}",
        "route add default via 10.99.0.1",
        f"neighbour add 10.99.0.1 lladdr {GATEWAY} dev {NIC}",
        f"address add fd99::2/64 dev {NIC} nodad",
        f"route add ::/0 via fd99::1 dev {NIC}",
        f"neighbour add fd99::1 lladdr {SIXTH} dev {NIC}",
    )
    return lab


@pytest.mark.parametrize(
    ("policy", "fields", "why"),
    [
        (ENTRY % ", mac: {deny: ['02:00:00:00:aa']}", {"mac": OTHER}, "the policy denies it"),
        (ENTRY % ", mac: {allow: ['52:54:00']}", {"mac": OTHER}, "permits only 52:54:00:00:00:00-52:54"),
        (ENTRY % ", mac: {allow: ['52:54:00']}", {}, "permits only"),
        (ENTRY % ", mac: {derivedOnly: true}", {"mac": OTHER}, "derived MACs only"),
        (ENTRY % "" + "mac: {derivedOnly: true}", {"mac": OTHER}, "derived MACs only"),
        (ENTRY % ", mac: {}" + "mac: {derivedOnly: true}", {"mac": OTHER}, None),
        (ENTRY % ", mac: {derivedOnly: true}", {}, None),
        (ENTRY % ", mac: {deny: ['02:00:00:00:aa:01']}", {"mac": OTHER}, None),
        (ENTRY % ", mac: {}", {"mac": GATEWAY}, f"it is the gateway's on {NIC}"),
        (ENTRY % ", mac: {}", {"mac": SIXTH}, f"it is the gateway's on {NIC}"),
        (ENTRY % ", mac: {gateway: false}", {"mac": GATEWAY}, None),
        (ENTRY % "", {"mac": GATEWAY}, None),
    ],
)
def test_which_macs_are_refused(
    routed: Lab, plugin: Plugin, policy: str, fields: dict[str, Any], why: str | None
) -> None:
    put(plugin, policy)
    answer = plugin("ADD", config(interface="lan", **fields), netns=routed.pod())
    if why is None:
        answer.ok()
    else:
        error = answer.error(spec.INVALID_NETWORK_CONFIG)
        assert error["msg"].startswith("mac: ") and why in error["msg"]
        assert plugin.leftovers() == []


def test_the_policys_own_rules_count_for_what_it_does_not_list(routed: Lab, plugin: Plugin) -> None:
    put(plugin, "{allowUnlisted: true, mac: {deny: ['02:00']}}")
    pod = routed.pod()
    plugin("ADD", config(source=NIC, mac=OTHER), netns=pod).error(7)
    plugin("ADD", config(source=NIC, mac="52:54:00:00:00:01"), netns=pod).ok()
    plugin("ADD", config(device="tap", mac=OTHER), netns=pod, ifname="net2").ok()


def test_which_gateways_a_node_knows(routed: Lab) -> None:
    def look() -> frozenset[str]:
        with Rtnl() as host:
            link = host.link(name=NIC)
            assert link
            return gateways.macs(host, link.index)

    assert routed.node.call(look) == {GATEWAY, SIXTH}
    routed.node.ip(f"neighbour del 10.99.0.1 dev {NIC}")
    assert routed.node.call(look) == {SIXTH}
    routed.node.ip(f"route replace 0.0.0.0/0 via inet6 fd99::1 dev {NIC}", "route del ::/0")
    assert routed.node.call(look) == {SIXTH}
    routed.node.ip("route del 0.0.0.0/0")
    assert routed.node.call(look) == set()
