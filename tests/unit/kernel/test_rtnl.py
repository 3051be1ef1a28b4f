"""rtnl.py: layouts against the real kernel, with pyroute2 as the second opinion."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute

from cni.kernel import netns, rtnl
from cni.kernel.rtnl import IFLA_IFALIAS, RTM_SETLINK, Rtnl, attr, link_message, mac_bytes, text, u32

if TYPE_CHECKING:
    from lab.wire import Lab


@given(st.integers(1, 0x3FFF), st.binary(max_size=300))
def test_an_attribute_is_padded_and_read_back(kind: int, payload: bytes) -> None:
    packed = attr(kind, payload)
    assert len(packed) % 4 == 0
    assert struct.unpack_from("=HH", packed) == (4 + len(payload), kind)
    assert rtnl.attributes(packed + attr(1, b"next")) == {kind: payload} | {1: b"next"}


def test_a_mac_is_six_bytes() -> None:
    assert mac_bytes("02:00:5e:00:53:0a") == bytes([2, 0, 0x5E, 0, 0x53, 10])


def test_a_link_reads_as_pyroute2_reads_it(lab: Lab) -> None:
    fd = netns.open_path(str(lab.node.path))
    with netns.entered(fd), Rtnl() as ours, IPRoute() as theirs:
        (index,) = theirs.link_lookup(ifname="eth1")
        (other,) = theirs.get_links(index)
        link = ours.link(name="eth1")
        assert link is not None
        assert (link.index, link.mac, link.mtu, link.kind, link.flags) == (
            index,
            other.get_attr("IFLA_ADDRESS"),
            other.get_attr("IFLA_MTU"),
            "veth",
            other["flags"],
        )
        assert ours.link(index=index) == link
        assert {each.name for each in ours.links()} == {"lo", "eth1", "eth2", "br0"}
    os.close(fd)


def test_no_link_is_none(lab: Lab) -> None:
    with lab.node.call(Rtnl) as socket:
        assert socket.link(name="nosuch") is None
        assert socket.link(index=0x7FFFFFF0) is None


def test_a_refusal_carries_errno_and_the_kernels_sentence(lab: Lab) -> None:
    with lab.node.call(Rtnl) as socket:
        link = socket.link(name="eth1")
        assert link is not None
        with pytest.raises(OSError, match="less than device minimum") as refused:
            socket.do(link_message(RTM_SETLINK, u32(rtnl.IFLA_MTU, 1), index=link.index))
    assert refused.value.errno == errno.EINVAL


def test_one_send_of_many_messages_has_an_outcome_each(lab: Lab) -> None:
    with lab.node.call(Rtnl) as socket:
        link = socket.link(name="eth1")
        assert link is not None
        first, second, third = socket.talk(
            link_message(RTM_SETLINK, text(IFLA_IFALIAS, "one"), index=link.index),
            link_message(RTM_SETLINK, text(IFLA_IFALIAS, "none"), index=0x7FFFFFF0),
            link_message(rtnl.RTM_GETLINK, index=link.index, nlm=0),
        )
        assert first is None
        assert isinstance(second, OSError)
        assert second.errno == errno.ENODEV
        assert isinstance(third, rtnl.Link)
        assert third.alias == "one"


def test_another_namespace_has_one_id(lab: Lab) -> None:
    pod = lab.pod()
    with lab.node.call(Rtnl) as socket, pod.path.open("rb") as namespace:
        nsid = socket.nsid(namespace.fileno())
        assert nsid >= 0
        assert socket.nsid(namespace.fileno()) == nsid
        inside = socket.link(name="lo", nsid=nsid)
        assert inside is not None
        assert inside.index == 1


def test_ids_and_links_of_another_namespace(lab: Lab) -> None:
    pod = lab.pod()
    pod.ip("link add d0 type bridge")
    node, other = netns.open_path(str(lab.node.path)), netns.open_path(str(pod.path))
    try:
        with netns.entered(node), Rtnl() as host:
            assert host.known_nsid(other) is None  # to ask gives none
            given = host.nsid(other)
            assert host.known_nsid(other) == given
            assert given in host.nsids()
            assert {link.name for link in host.links(nsid=given)} == {"lo", "d0"}
            with pytest.raises(OSError) as refused:
                host.links(nsid=max(host.nsids()) + 1)
            assert refused.value.errno == errno.EINVAL
    finally:
        os.close(node)
        os.close(other)
