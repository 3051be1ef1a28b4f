"""The agent puts back what others change of a link, takes down what is changed again and again, and stays idle."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from cni.agent import link_deletion
from cni.kernel import tapdev
from cni.kernel.rtnl import IFF_UP, Link, Rtnl, delete_link
from cni.port import filter as filter_
from cni.state.store import Store
from lab.frames import packet_socket
from lab.wire import BRIDGE, NIC
from tests.agent.conftest import Agent
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cni.state.record import Record
    from lab.wire import Lab, Netns

SIOCSIFHWADDR = 0x8924
GATEWAY = "02:00:00:00:00:fe"
VEPA, PRIVATE, BRIDGED = 2, 1, 4


def attach(agent: Agent, pod: Netns, container: str = "c1", **fields: Any) -> Record:
    conf = config(**(fields or {"source": NIC, "mode": "vepa"}))
    agent.shim()("ADD", conf, netns=pod, container=container).ok()
    return next(each for each in Store(agent.run).records() if each.container_id == container)


def link_of(pod: Netns, record: Record) -> Link:
    def look() -> Link | None:
        with Rtnl() as own:
            return own.link(index=record.ifindex)

    found = pod.call(look)
    assert found
    return found


def as_made(pod: Netns, record: Record, mode: int | None = VEPA) -> bool:
    link = link_of(pod, record)
    up = bool(link.flags & IFF_UP)
    same_mac = record.device == "tap" or link.mac == record.mac
    return same_mac and up and link.alias == record.alias and mode in (None, link.mode)


@contextmanager
def device(pod: Netns, record: Record) -> Iterator[int]:
    namespace = os.open(pod.path, os.O_RDONLY)
    try:
        _, major, minor = tapdev.number(namespace, record.ifname)
        fd = tapdev.open_node((major, minor), namespace)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        os.close(namespace)


def set_mac(fd: int, mac: str) -> None:
    """As QEMU's user may, without any capability."""
    fcntl.ioctl(fd, SIOCSIFHWADDR, struct.pack("=16sH6s16x", b"", 1, bytes.fromhex(mac.replace(":", ""))))


def test_the_holder_of_the_fd_takes_the_gateways_mac(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    record = attach(agent, pod)
    with device(pod, record) as fd:
        set_mac(fd, GATEWAY)
        line = agent.wait_for("the link was changed, and is put back")
        assert line["changed"] == {"mac": f"{GATEWAY}, wanted {record.mac}"}
        until(lambda: as_made(pod, record), "the MAC is put back")


def test_a_kernel_without_nf_tables(agent: Agent, lab: Lab, tmp_path: Path) -> None:
    """The agent is given a netlink protocol that no kernel has. What is not a filter is put back."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "from cni.kernel import nft\nnft.NETLINK_NETFILTER = 31\n"
    )
    agent.end()
    agent.env = {"PYTHONPATH": str(tmp_path / "site")}
    agent.start()
    pod = lab.pod()
    record = attach(agent, pod)
    with device(pod, record) as fd:
        set_mac(fd, GATEWAY)
        until(lambda: as_made(pod, record), "the MAC is put back")


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("link set net1 address 02:00:00:00:00:66", {}),
        ("link set net1 type macvtap mode private", {}),
        ("link set net1 type macvtap mode bridge", {}),
        ("link set net1 alias nobodys", {}),
        ("link set net1 alias vmtap/other/c9/net1", {}),
        ("link set net1 down", {}),
        ("link set net1 down\nlink set net1 alias x\nlink set net1 type macvtap mode bridge", {}),
        ("link set net1 alias x", {"source": BRIDGE, "device": "tap"}),
        ("link set net1 down", {"device": "tap"}),
    ],
)
def test_net_admin_in_the_pod_changes_it(
    agent: Agent, lab: Lab, command: str, fields: dict[str, Any]
) -> None:
    pod = lab.pod()
    record = attach(agent, pod, **fields)
    mode = None if fields else VEPA
    pod.ip(*command.splitlines())
    agent.wait_for("the link was changed, and is put back")
    until(lambda: as_made(pod, record, mode), "it is put back")
    agent.shim()("DEL", config(), netns=pod).ok()
    assert "net1" not in pod.links()


def test_what_has_changed_while_the_agent_was_away(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    record = attach(agent, pod)
    agent.end()
    pod.ip(f"link set net1 address {GATEWAY}", "link set net1 type macvtap mode private")
    agent.start()
    until(lambda: as_made(pod, record), "it is put back")


def test_a_link_that_waits_keeps_the_mode_of_its_state(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    record = attach(agent, pod, source=NIC, mode="bridge")
    assert record.handover
    until(lambda: as_made(pod, record, BRIDGED), "it waits no more")  # nobody has sent its MAC
    pod.ip("link set net1 type macvtap mode private")
    until(lambda: as_made(pod, record, BRIDGED), "it is put back")


def test_again_and_again(agent: Agent, lab: Lab) -> None:
    """It is taken down, and costs others nothing: neither their own repair, nor their ADD."""
    pod, other = lab.pod("pod"), lab.pod("other")
    record = attach(agent, pod)
    stop = threading.Event()

    def flood() -> None:
        with device(pod, record) as fd:
            while not stop.is_set():
                with suppress(OSError):  # EBUSY: the other has it
                    set_mac(fd, GATEWAY)
                set_mac(fd, record.mac)

    def dummies() -> None:
        """Root of a user namespace has events of its own, with others' indexes."""
        while not stop.is_set():
            other.ip(f"link add index {record.ifindex} d0 type veth peer name p0", "link del d0")

    threads = [threading.Thread(target=flood), threading.Thread(target=dummies)]
    for thread in threads:
        thread.start()
    try:
        agent.wait_for("the link is changed again and again, and is held down")
        until(lambda: not link_of(pod, record).flags & IFF_UP, "it is down")
        begin = _cpu(agent)
        victim = attach(agent, other, "c2")
        with device(other, victim) as fd:
            set_mac(fd, "02:00:00:00:00:fd")
            until(lambda: as_made(other, victim), "the other is put back meanwhile")
        time.sleep(3)
        assert _cpu(agent) - begin < 1.5
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    agent.end()
    said = [line for line in agent.log if line.get("changed") and line["container"] == "c1"]
    assert len(said) <= 5


def _cpu(agent: Agent) -> float:
    assert agent.process
    with open(f"/proc/{agent.process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_deletion_in_another_namespace_is_not_the_links(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """RTM_DELLINK of a link with the index, which root of a user namespace can have."""
    index, pod, other = 0x10000007, lab.pod("pod"), lab.pod("other")
    pod.ip(f"link add index {index} d0 type veth peer name p0")
    go = threading.Event()

    def slow(*args: Any) -> None:
        assert go.wait(20)
        delete_link(*args)

    monkeypatch.setattr(link_deletion, "delete_link", slow)
    yielded, done = threading.Event(), threading.Event()

    def delete() -> None:
        with Rtnl() as host:
            ids = []
            for each in (pod, other):
                fd = os.open(each.path, os.O_RDONLY)
                ids.append(host.nsid(fd))
                os.close(fd)
            link_deletion.LinkDeleter()(host, index, ids[0], yielded.set)
        done.set()

    thread = threading.Thread(target=lambda: lab.node.call(delete))
    thread.start()
    assert yielded.wait(20), "the next request has to wait for this one's link"
    for _ in range(20):
        other.ip(f"link add index {index} d0 type veth peer name p0", "link del d0")
    assert not done.wait(0.3)
    go.set()
    assert done.wait(20)
    thread.join()
    assert "d0" not in pod.links()


def test_a_deletion_without_an_fd_for_its_thread(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller then deletes the link itself. A limit of the process would meet its other threads, too."""

    def none_left() -> Rtnl:
        raise OSError(errno.EMFILE, "no fd")

    def delete() -> list[str]:
        with Rtnl() as host:
            monkeypatch.setattr(link_deletion, "Rtnl", none_left)
            before = os.listdir("/proc/self/fd")
            link_deletion.LinkDeleter()(host, 0x10000007, None)
            assert os.listdir("/proc/self/fd") == before
        return list(lab.node.links())

    lab.node.ip("link add index 268435463 d0 type veth peer name p0")
    assert "d0" not in lab.node.call(delete)


PORTS = """
interfaces:
- {name: nic, source: {dev: %s}, port: {macSpoofCheck: true}}
- {name: bridged, source: {dev: %s}, port: {macSpoofCheck: true}}
"""


@pytest.mark.parametrize("interface", ["nic", "bridged"])
@pytest.mark.parametrize("command", ["delete table netdev {}", "flush ruleset", "flush table netdev {}"])
def test_filters_that_others_remove_are_put_back(
    agent: Agent, lab: Lab, interface: str, command: str
) -> None:
    """A pod with NET_ADMIN, or a firewall of the node that is loaded again."""
    agent.policy.write_text(PORTS % (NIC, BRIDGE))
    pod = lab.pod()
    record = attach(agent, pod, interface=interface)
    link, place = ("net1", pod) if interface == "nic" else (f"vth{record.ifindex:08x}", lab.node)
    table = filter_.table(link)

    def rules() -> str:
        """Without counters; "" without the table."""
        listed = ["nft", "--stateless", "list", "table", "netdev", table]
        return place.run(listed, check=False).stdout

    made = rules()
    assert "drop" in made
    place.run(["nft", *command.format(table).split()])
    changed = agent.wait_for("the link was changed, and is put back")["changed"]
    assert changed == {"port": "other filters, wanted filters"}
    until(rules, "they are not put back", lambda now: now == made)
    agent.shim()("DEL", config(), netns=pod).ok()
    assert rules() == ""


@pytest.mark.parametrize("impostor", [False, True])
def test_a_link_with_filters_that_is_renamed(agent: Agent, lab: Lab, *, impostor: bool) -> None:
    """Its filters go by its name. While another link has the name, it is down."""
    agent.policy.write_text(PORTS % (NIC, BRIDGE))
    pod = lab.pod()
    record = attach(agent, pod, interface="nic")
    other = ["link add net1 type veth peer name p1"] if impostor else []
    pod.ip("link set net1 name x1", *other)
    changed = agent.wait_for("the link was changed, and is put back")["changed"]
    assert changed == {"port": "renamed to x1, wanted filters"}
    if impostor:
        until(lambda: not link_of(pod, record).flags & IFF_UP, "it is down")
        pod.ip("link del net1")
    until(lambda: link_of(pod, record).name == "net1" and as_made(pod, record, None), "it is put back")
    spoofed = bytes.fromhex("0200000000090200000000ff88b5") + bytes(50)
    with packet_socket(pod, "net1") as raw, suppress(OSError):  # ENOBUFS: it is refused
        raw.send(spoofed)
    rules = pod.run(["nft", "list", "chain", "netdev", filter_.table("net1"), "check-source-mac"]).stdout
    assert "counter packets 1 " in rules


def test_a_limit_that_is_taken_away(agent: Agent, lab: Lab) -> None:
    """The kernel does not report it: it is found when the link is looked at."""
    agent.policy.write_text(
        f"interfaces: [{{name: nic, source: {{dev: {NIC}}}, port: {{rate: {{out: 10Mbit}}}}}}]"
    )
    pod = lab.pod()
    record = attach(agent, pod, interface="nic")

    def shaped() -> bool:
        return "tbf" in pod.run(["tc", "qdisc", "show", "dev", "net1"]).stdout

    for command in ("del dev net1 root", "change dev net1 root tbf rate 1gbit burst 1mb limit 2mb"):
        assert shaped()
        pod.run(["tc", "qdisc", *command.split()])
        pod.ip("link set net1 alias x")
        changed = agent.wait_for("the link was changed, and is put back")["changed"]
        assert changed["port"] == "other filters, wanted filters"
        until(lambda: as_made(pod, record, None) and shaped(), "it is put back")
        assert "rate 10Mbit" in pod.run(["tc", "qdisc", "show", "dev", "net1"]).stdout


def test_a_firewall_of_the_node_that_is_loaded_again_and_again(agent: Agent, lab: Lab) -> None:
    """It costs a tap no more than its filters, each time until they are back."""
    agent.policy.write_text(PORTS % (NIC, BRIDGE))
    pod = lab.pod()
    record = attach(agent, pod, interface="bridged")
    port = f"vth{record.ifindex:08x}"
    for _ in range(5):
        lab.node.run(["nft", "flush", "ruleset"])
        until(
            lambda: filter_.table(port) in lab.node.run(["nft", "list", "tables"]).stdout,
            "the filters are put back",
        )
    assert lab.node.links()[port]["operstate"] == "UP"
    assert link_of(pod, record).flags & IFF_UP
