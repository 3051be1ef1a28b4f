"""iproute.py: a tap that joins a bridge, and addresses on a link, seen by iproute2."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError
from cni.kernel import bridge_port, iproute, netns, tap
from cni.kernel.rtnl import Rtnl
from cni.spec import KERNEL_REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns

TAP = 0x10000007


@pytest.fixture
def pod(lab: Lab) -> Iterator[tuple[Netns, int]]:
    """A pod with a tap in it, and an fd of the pod."""
    made = lab.pod()
    fd = netns.open_path(str(made.path))
    tap.create(fd, ifname="net1", ifindex=TAP, queues=1, owner=None, group=None)
    yield made, fd
    os.close(fd)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_tap_becomes_a_port(lab: Lab, pod: tuple[Netns, int], isolated: bool) -> None:
    made, fd = pod
    bridge = lab.node.links()["br0"]
    node = netns.open_path(str(lab.node.path))
    try:
        with netns.entered(node):
            seen: list[bool] = []
            iproute.join_bridge(
                fd,
                tap=TAP,
                mtu=1400,
                bridge=bridge["ifindex"],
                isolated=isolated,
                alias="vmtap/x",
                sums=True,
                before_up=lambda: seen.append("UP" in lab.node.links()["vth10000007"]["flags"]),
            )
            assert seen == [False]
            with Rtnl() as host:
                assert bridge_port.state(host, TAP) == (bridge["ifindex"], isolated)
                assert bridge_port.state(host, TAP + 1) == (None, False)
                lab.node.ip("link set vth10000007 nomaster")
                assert bridge_port.state(host, TAP) == (None, False)
                lab.node.ip("link set vth10000007 master br0")
    finally:
        os.close(node)
    lab.node.wait_until_up("vth10000007")  # the kernel notes the carrier a moment later
    port = lab.node.links()["vth10000007"]
    assert (port["master"], port["ifalias"], port["mtu"]) == ("br0", "vmtap/x", 1400)
    assert lab.node.links()["br0"]["address"] == bridge["address"]
    filters = json.loads(made.run(["tc", "-j", "filter", "show", "dev", "net1", "ingress"]).stdout)
    (action,) = [action for each in filters for action in each.get("options", {}).get("actions", [])]
    assert (action["mirred_action"], action["direction"], action["to_dev"]) == (
        "redirect",
        "egress",
        "vtp10000007",
    )
    inside = made.run(["sysctl", "-n", "net.ipv6.conf.vtp10000007.disable_ipv6"]).stdout
    assert inside == "1\n"


def test_addresses_and_routes(pod: tuple[Netns, int]) -> None:
    made, fd = pod
    made.ip("link set net1 up")
    iproute.put_addresses(
        fd,
        TAP,
        ["10.1.0.5/24", "fd00::5/64"],
        [
            {"dst": "0.0.0.0/0"},
            {"dst": "10.9.0.0/16", "gw": "10.1.0.9", "priority": 7, "mtu": 1300},
            {"dst": "fd01::/64"},
        ],
        {4: "10.1.0.1", 6: "fd00::1"},
    )
    assert iproute.addresses(fd, TAP) == {"10.1.0.5/24", "fd00::5/64"}
    routes = {
        route["dst"]: route
        for family in ("-4", "-6")
        for route in json.loads(made.run(["ip", "-j", "-d", family, "route"]).stdout)
    }
    assert routes["default"]["gateway"] == "10.1.0.1"
    assert (routes["10.9.0.0/16"]["gateway"], routes["10.9.0.0/16"]["metric"]) == ("10.1.0.9", 7)
    assert routes["10.9.0.0/16"]["metrics"] == [{"mtu": 1300}]
    assert routes["fd01::/64"]["gateway"] == "fd00::1"


DEFAULT = {"dst": "0.0.0.0/0", "gw": "10.1.0.1"}


@pytest.mark.parametrize(
    ("addresses", "routes", "said"),
    [
        (["10.1.0.5/24", "10.1.0.5/24"], [], "address 10.1.0.5/24 .* it is in the result of ipam twice"),
        (["fd00::5/64", "fd00::5/128"], [], "address fd00::5/128 .* twice"),
        (["10.1.0.5/24"], [DEFAULT, DEFAULT], "route 0.0.0.0/0 by gateway 10.1.0.1 .* twice"),
        (
            ["10.1.0.5/24"],
            [{"dst": "0.0.0.0/0", "gw": "10.2.0.1"}],
            "10.2.0.1 is in no network of the addresses 10.1.0.5/24",
        ),
        (["fd00::5/64"], [{"dst": "::/0", "gw": "fd09::1"}], "fd09::1 is in no network of .* fd00::5/64"),
        (["10.1.0.5/24"], [{"dst": "10.1.0.7/24"}], "route 10.1.0.7/24 .* the kernel refused it"),
    ],
    ids=["address", "IPv6 address", "route", "gateway", "IPv6 gateway", "host bits"],
)
def test_a_refusal_names_the_address_or_route(
    pod: tuple[Netns, int], addresses: list[str], routes: list[dict[str, str]], said: str
) -> None:
    made, fd = pod
    made.ip("link set net1 up")
    with pytest.raises(CniError, match=said) as refused:
        iproute.put_addresses(fd, TAP, addresses, routes, {})
    assert refused.value.code == KERNEL_REFUSED
    assert refused.value.details


def test_a_route_of_another_link_stays_first(pod: tuple[Netns, int]) -> None:
    """As a pod's second network has it: the first one's default route goes on."""
    made, fd = pod
    made.ip(
        "link add eth0 up type veth peer name other",
        "link set other up",
        "link set net1 up",
        "address add 10.7.0.5/24 dev eth0",
        "route add default via 10.7.0.1",
    )
    iproute.put_addresses(fd, TAP, ["10.1.0.5/24"], [DEFAULT], {})
    routes = json.loads(made.run(["ip", "-j", "route", "show", "default"]).stdout)
    assert [route["gateway"] for route in routes] == ["10.7.0.1", "10.1.0.1"]
