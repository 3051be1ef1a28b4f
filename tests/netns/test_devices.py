"""From a link to its fd: the wire behind an fd is the one of its own pod, whatever the kernel calls the device."""

from __future__ import annotations

import errno
import os
import struct
import uuid
from contextlib import ExitStack, suppress
from dataclasses import replace
from fcntl import ioctl
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError
from cni.kernel import mount, netns, tapdev
from cni.spec import DEVICE_BUSY, NO_ATTACHMENT, WRONG_DEVICE
from lab.frames import BROADCAST, Frame, collect, packet_socket, write_tap
from lab.wire import NIC
from tests.netns.conftest import open_queues
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cni.state.record import Record
    from lab.wire import Lab, Netns
    from tests.netns.conftest import Attached
    from tests.runner import Plugin

MAC_B = "02:00:00:00:00:0b"
PEER_MAC = "02:00:00:00:00:fe"
_TRIES = 50
"""Tests beside these take numbers, too, and may keep them for long: each try has a link of its own."""


@pytest.fixture
def network() -> str:
    """A name that makes ifindexes that no other test has: /dev is one for all of them."""
    return f"net-{uuid.uuid4()}"


@pytest.fixture
def devices() -> Iterator[int]:
    """The kernel's own /dev (devtmpfs), whatever is mounted on ours."""
    folder = mount.detached(b"devtmpfs")
    yield folder
    os.close(folder)


def craft(lab: Lab, pod: Netns, *, index: int, mac: str, name: str = "net1") -> None:
    """A macvtap as anybody can make one."""
    lab.node.ip(
        f"link add link {NIC} name {name} address {mac} index {index} netns {pod.path} type macvtap mode bridge"
    )
    pod.ip(f"link set {name} addrgenmode none", f"link set {name} up")


def number(pod: Netns, name: str = "net1") -> int:
    """st_rdev of the link's device."""
    namespace = netns.open_path(str(pod.path))
    try:
        _, major, minor = tapdev.number(namespace, name)
    finally:
        os.close(namespace)
    return os.makedev(major, minor)


def in_pod(record: Record, pod: Netns, mac: str) -> Record:
    """The record that an ADD would have left in that pod."""
    status = pod.path.stat()
    return replace(
        record, container_id="b", netns=str(pod.path), netns_id=(status.st_dev, status.st_ino), mac=mac
    )


def test_two_pods_whose_links_have_one_ifindex(
    lab: Lab, attach: Callable[..., Attached], network: str, devices: int
) -> None:
    a = attach(lab.pod("a"), name=network, source=NIC, mode="bridge", opened=False)
    index = a.record.ifindex
    pod_b = lab.pod("b")
    craft(lab, pod_b, index=index, mac=MAC_B)
    node = f"tap{index}"

    # The trap: one name for two devices.
    assert number(a.pod) != number(pod_b)
    assert os.stat(node, dir_fd=devices).st_rdev == number(a.pod)

    with ExitStack() as stack:
        ports = {}
        for label, pod, record in (("a", a.pod, a.record), ("b", pod_b, in_pod(a.record, pod_b, MAC_B))):
            (ports[label],) = open_queues(pod, record)
            stack.callback(os.close, ports[label])
        peer = stack.enter_context(packet_socket(lab.peer, "eth0"))
        peer.send(Frame(a.record.mac, PEER_MAC, "for a").pack())
        peer.send(Frame(MAC_B, PEER_MAC, "for b").pack())
        peer.send(Frame(BROADCAST, PEER_MAC, "marker").pack())
        got = collect(ports, until="marker")
        assert {label: [frame.token for frame in frames] for label, frames in got.items()} == {
            "a": ["for a"],
            "b": ["for b"],
        }
        write_tap(ports["b"], Frame(BROADCAST, MAC_B, "from b"))
        assert [frame.token for frame in collect({"a": ports["a"]}, until="from b")["a"]] == []

    # The name goes with the first pod, though the second lives.
    a.pod.ip("link del net1")
    with pytest.raises(FileNotFoundError):
        os.stat(node, dir_fd=devices)
    (fd,) = open_queues(pod_b, in_pod(a.record, pod_b, MAC_B))
    os.close(fd)


def test_the_number_of_a_deleted_link_goes_to_another_pod(
    lab: Lab, plugin: Plugin, attach: Callable[..., Attached], network: str
) -> None:
    for _ in range(_TRIES):
        a = attach(lab.pod("a"), name=network, source=NIC)
        before = number(a.pod)
        plugin("DEL", config(name=network, source=NIC), netns=a.pod).ok()
        pod_b = lab.pod("b")
        if taken_over(lab, pod_b, before):
            break
    else:
        pytest.fail(f"none of {_TRIES} numbers came back")

    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == NO_ATTACHMENT
    with pytest.raises(OSError) as dead:  # and the fd from before is dead, not the other pod's
        ioctl(a.fd, tapdev.TUNGETIFF, bytes(40))
    assert dead.value.errno == errno.ENOLINK
    with packet_socket(lab.peer, "eth0") as peer:
        os.write(a.fd, bytes(10) + Frame(BROADCAST, a.record.mac, "from the dead").pack())
        (fd,) = open_queues(pod_b, replace(in_pod(a.record, pod_b, MAC_B), ifindex=2))
        write_tap(fd, Frame(BROADCAST, MAC_B, "marker"))
        os.close(fd)
        assert collect({"peer": peer}, until="marker") == {"peer": []}


def taken_over(lab: Lab, pod: Netns, device: int) -> bool:
    """Makes net1 in pod; has it that number?"""
    craft(lab, pod, index=2, mac=MAC_B)
    if number(pod) == device:
        return True
    pod.ip("link del net1")
    return False


def test_a_link_replaced_while_it_is_opened(
    lab: Lab, attach: Callable[..., Attached], network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_node = tapdev.open_node
    pod_b = lab.pod("b")

    class MissedError(Exception):
        pass

    def late(device: tuple[int, int], pod_netns: int | None = None) -> int:
        a.pod.ip("link del net1")
        if not taken_over(lab, pod_b, os.makedev(*device)):
            raise MissedError
        return open_node(device, pod_netns)  # another pod's device has the number now

    monkeypatch.setattr(tapdev, "open_node", late)
    for _ in range(_TRIES):
        a = attach(lab.pod("a"), name=network, source=NIC, opened=False)
        before = open_fds()
        with suppress(MissedError), pytest.raises(CniError) as refused:
            open_queues(a.pod, a.record)
        assert open_fds() == before
        if pod_b.links().get("net1"):
            break
    else:
        pytest.fail(f"none of {_TRIES} numbers came back")
    assert refused.value.code == NO_ATTACHMENT


@pytest.mark.parametrize(
    ("other_index", "mac", "code"),
    [(True, None, NO_ATTACHMENT), (False, MAC_B, WRONG_DEVICE)],
    ids=["another ifindex", "another MAC"],
)
def test_a_link_replaced_after_add(
    *,
    lab: Lab,
    attach: Callable[..., Attached],
    network: str,
    other_index: bool,
    mac: str | None,
    code: int,
) -> None:
    a = attach(lab.pod("a"), name=network, source=NIC, opened=False)
    a.pod.ip("link del net1")
    craft(lab, a.pod, index=a.record.ifindex + other_index, mac=mac or a.record.mac)
    before = open_fds()
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == code
    assert open_fds() == before


@pytest.mark.parametrize("source", [None, "br0"])
def test_a_tap_replaced_after_add(
    lab: Lab, attach: Callable[..., Attached], network: str, source: str | None
) -> None:
    where = {"source": source} if source else {}
    a = attach(lab.pod("a"), name=network, device="tap", opened=False, **where)
    a.pod.ip("link del net1")
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == NO_ATTACHMENT
    assert "net1" not in a.pod.links()  # TUNSETIFF would have made one
    a.pod.ip("tuntap add net1 mode tap vnet_hdr")
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == NO_ATTACHMENT


def test_the_link_is_of_another_kind(lab: Lab, attach: Callable[..., Attached], network: str) -> None:
    a = attach(lab.pod("a"), name=network, source=NIC, opened=False)
    a.pod.ip("link del net1", f"link add net1 index {a.record.ifindex} type veth")
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == NO_ATTACHMENT


def test_queues_run_out(lab: Lab, attach: Callable[..., Attached], network: str) -> None:
    a = attach(lab.pod("a"), name=network, source=NIC)
    before = open_fds()
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record, 256)  # and one is open
    assert refused.value.code == DEVICE_BUSY
    assert open_fds() == before


def test_a_tap_has_one_holder(lab: Lab, attach: Callable[..., Attached]) -> None:
    a = attach(lab.pod("a"), device="tap")
    with pytest.raises(CniError) as refused:
        open_queues(a.pod, a.record)
    assert refused.value.code == DEVICE_BUSY


@pytest.mark.parametrize("fields", [{"source": NIC}, {"source": "br0"}, {"device": "tap"}], ids=str)
def test_fds_end_with_exec_and_do_not_block(
    lab: Lab, attach: Callable[..., Attached], fields: dict[str, str]
) -> None:
    fd = attach(lab.pod("a"), **fields).fd
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)
    flags = struct.unpack("16xH22x", ioctl(fd, tapdev.TUNGETIFF, bytes(40)))[0]
    assert flags & (tapdev.IFF_TAP | tapdev.IFF_NO_PI | tapdev.IFF_VNET_HDR) == 0x5002


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))
