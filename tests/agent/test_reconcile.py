"""The reconciler: whatever is killed or removed when, every attachment in use stays and everything else goes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import netns
from cni.kernel.rtnl import Rtnl
from cni.port import filter as filters
from cni.state.claims import Claims
from cni.state.record import Record, identifier
from cni.state.store import IFINDEX_BASE, Store
from lab.wire import BRIDGE, NIC
from tests.agent.conftest import Agent
from tests.fakeipam import FakeIpam
from tests.runner import config
from tests.unit.state.test_claims import CLAIM, DEVICE
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab, Netns
    from tests.agent.conftest import Shim

WIRE: dict[str, Any] = {"source": NIC, "mode": "bridge"}
PORT: dict[str, Any] = {"source": BRIDGE, "device": "tap", "mode": "pepa"}
IPAM = FakeIpam.config
COME_AND_GO = "lease; echo come > come; read -r line < gate; answer"
"""For ADD: it tells by the FIFO seen/come that it runs, and ends after a line from seen/gate."""
LOCKED = """echo '{"code": 100, "msg": "the leases are locked"}'; exit 1"""
"""For DEL."""


@dataclass
class Node:
    """The agent, and what of it must be as it was in the end."""

    agent: Agent
    lab: Lab
    ipam: FakeIpam
    heard: int = 0
    """How many lines of the agent's log this test has looked at."""

    def hears(self, msg: str) -> dict[str, Any]:
        """The next line with that msg; the agent may have said it before it was ready."""
        while self.heard < len(self.agent.log):
            self.heard += 1
            if self.agent.log[self.heard - 1]["msg"] == msg:
                return self.agent.log[self.heard - 1]
        line = self.agent.wait_for(msg)
        self.heard = len(self.agent.log)
        return line

    def kill(self) -> None:
        self.agent.end(signal.SIGKILL)
        self.heard = len(self.agent.log)

    @property
    def store(self) -> Store:
        return Store(self.agent.run)

    def records(self) -> list[Record]:
        return list(self.store.records())

    def shim(self) -> Shim:
        made = self.agent.shim(wait=0)
        return made.__class__(**{**vars(made), "cni_path": str(self.ipam.folder)})

    def reconciled(self) -> None:
        """The agent has looked at everything once more."""
        self.hears("reconciled")

    def left(self) -> list[str]:
        """What speaks of an attachment: state, pending requests, leases, ports of the bridge."""
        run = self.agent.run
        folders = (run / "attachments", run / "ifindex", run / "dev", run / "pending")
        files = [path for folder in folders for path in folder.glob("*")]
        ports = [name for name in self.lab.node.links() if name.startswith("vth")]
        return [*map(str, files), *self.ipam.leases(), *ports]


@pytest.fixture
def node(lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """A node whose agent looks at intervals only when a test says so: what heals here is told by an event."""
    agent = Agent(
        lab.node,
        tmp_path / "run",
        tmp_path / "interfaces.yaml",
        flags=("--log-level", "debug", "--reconcile-seconds", "86400", "--metrics", "127.0.0.1:0"),
    )
    agent.start()
    made = Node(agent, lab, FakeIpam(tmp_path / "ipam"))
    made.reconciled()
    yield made
    if agent.process:
        agent.end()


def _often(node: Node) -> None:
    """Start the agent again, looking every second."""
    node.kill()
    node.agent.flags = (*node.agent.flags, "--reconcile-seconds", "1")
    node.agent.start()


@pytest.mark.parametrize("fields", [WIRE, PORT, {"device": "tap"}], ids=["macvtap", "port", "plain tap"])
def test_a_namespace_that_goes_takes_its_attachments_along(node: Node, fields: dict[str, Any]) -> None:
    pod, other = node.lab.pod(), node.lab.pod()
    conf = config(**fields, ipam=IPAM)
    node.shim()("ADD", conf, netns=pod, container="c1").ok()
    node.shim()("ADD", conf, netns=other, container="c2").ok()
    pod.close()
    assert node.hears("attachment ended")["container"] == "c1"
    assert [record.container_id for record in node.records()] == ["c2"]
    assert node.ipam.leases() == {"c2-net1"}
    node.shim()("DEL", conf, netns=other, container="c2").ok()
    assert node.left() == []


def test_a_reference_delegate_is_told(node: Node, reference_plugins: Path, tmp_path: Path) -> None:
    pod = node.lab.pod()
    ranges = [[{"subnet": "10.1.0.0/30"}]]  # one address to give
    conf = config(**WIRE, ipam={"type": "host-local", "dataDir": str(tmp_path / "data"), "ranges": ranges})
    shim = node.shim()
    shim = shim.__class__(**{**vars(shim), "cni_path": str(reference_plugins)})
    first = shim("ADD", conf, netns=pod, container="c1").ok()
    shim("ADD", conf, netns=node.lab.pod(), container="c2").error(999)  # host-local's own
    pod.close()
    node.hears("attachment ended")
    second = shim("ADD", conf, netns=node.lab.pod(), container="c2").ok()
    assert second["ips"][0]["address"] == first["ips"][0]["address"]


def test_a_namespace_that_went_while_the_agent_was_away(node: Node) -> None:
    conf = config(**WIRE, ipam=IPAM)
    gone, stays = node.lab.pod(), node.lab.pod()
    node.shim()("ADD", conf, netns=gone, container="gone").ok()
    node.shim()("ADD", conf, netns=stays, container="stays").ok()
    node.kill()
    gone.close()
    node.agent.start()
    assert node.hears("attachment ended")["why"] == "its namespace is gone"
    assert [record.container_id for record in node.records()] == ["stays"]
    assert node.ipam.log() == ["ADD gone net1", "ADD stays net1", "DEL gone net1"]


def test_an_id_that_is_used_again_misleads_nobody(node: Node) -> None:
    old, new = node.lab.pod(), node.lab.pod()
    node.shim()("ADD", config(**WIRE), netns=old, container="old").ok()
    (record,) = node.records()
    node.kill()
    old.close()

    def give() -> int:
        """An id for the new namespace, once the old one's is free."""
        fd = netns.open_path(str(new.path))
        try:
            with Rtnl() as host:
                until(host.nsids, "the old namespace's id stays", lambda nsids: record.nsid not in nsids)
                return host.nsid(fd)
        finally:
            os.close(fd)

    assert node.lab.node.call(give) == record.nsid
    node.agent.start()
    node.shim()("ADD", config(**WIRE), netns=new, container="new").ok()
    node.hears("attachment ended")
    assert [record.container_id for record in node.records()] == ["new"]
    assert "net1" in new.links()


def test_a_link_that_is_lost_is_for_the_runtime_to_end(node: Node) -> None:
    conf = config(**WIRE, ipam=IPAM)
    pod = node.lab.pod()
    node.shim()("ADD", conf, netns=pod).ok()
    pod.ip("link delete net1")
    node.kill()
    node.agent.start()
    node.reconciled()
    assert len(node.records()) == 1
    assert "vmtap_reconcile_lost 1" in node.agent.get("/metrics")[2].splitlines()
    node.shim()("DEL", conf, netns=pod).ok()
    assert node.left() == []


def test_an_add_in_flight_is_left_alone(node: Node) -> None:
    _often(node)
    os.mkfifo(node.ipam.seen / "gate")
    os.mkfifo(node.ipam.seen / "come")
    node.ipam.write(ADD=COME_AND_GO)
    pod, conf = node.lab.pod(), config(**WIRE, ipam=IPAM)
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(node.shim(), "ADD", conf, netns=pod)
        assert (node.ipam.seen / "come").read_text() == "come\n"
        for _ in range(2):  # the first may have begun before the ADD did
            node.reconciled()
        (node.ipam.seen / "gate").write_text("go\n")
        adding.result(LIMIT).ok()
    node.reconciled()
    node.reconciled()
    assert "net1" in pod.links()
    assert node.ipam.log() == ["ADD c1 net1"]


def test_an_add_that_was_killed_with_the_agent_is_ended(node: Node) -> None:
    os.mkfifo(node.ipam.seen / "gate")
    os.mkfifo(node.ipam.seen / "come")
    node.ipam.write(ADD=COME_AND_GO)
    pod, conf = node.lab.pod(), config(**WIRE, ipam=IPAM)
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(node.shim(), "ADD", conf, netns=pod)
        assert (node.ipam.seen / "come").read_text() == "come\n"
        assert node.agent.process
        node.agent.process.kill()
        adding.result(LIMIT).error(11)
    node.kill()
    node.ipam.write()
    node.agent.start()
    assert node.hears("attachment ended")["why"] == "its ADD was killed"
    assert node.left() == []
    assert "net1" not in pod.links()
    node.shim()("ADD", conf, netns=pod).ok()


def test_a_delegate_that_fails_is_asked_again(node: Node) -> None:
    _often(node)
    pod = node.lab.pod()
    node.shim()("ADD", config(**WIRE, ipam=IPAM), netns=pod).ok()
    node.ipam.write(DEL=LOCKED)
    pod.close()
    assert "the leases are locked" in node.hears("reconciling failed; it is tried again")["error"]
    assert len(node.records()) == 1
    node.ipam.write()
    node.hears("attachment ended")
    assert node.left() == []


class TestWithoutARecord:
    """The state folder was lost, or a file of it."""

    def _lose(self, node: Node, how: Callable[[Path], None]) -> None:
        node.kill()
        how(node.agent.run)
        node.agent.start()

    @pytest.mark.parametrize("named", [True, False])
    def test_a_macvtap_is_adopted(self, node: Node, *, named: bool) -> None:
        pod = node.lab.pod()
        if named:
            policy = {"interfaces": [{"name": "dataplane", "source": {"dev": NIC}, "type": "ethernet"}]}
            node.agent.policy.write_text(json.dumps(policy))
            conf = config(interface="dataplane", mode="pepa", owner=107)
        else:
            conf = config(**WIRE)
        node.shim()("ADD", conf, netns=pod).ok()
        (before,) = node.records()
        minors = node.store.minors.all()
        assert bool(minors) == named

        def wipe(run: Path) -> None:
            shutil.rmtree(run / "attachments")
            shutil.rmtree(run / "ifindex")

        self._lose(node, wipe)
        node.hears("link without a record adopted")
        assert node.store.minors.all() == minors
        (after,) = node.records()
        assert after == before
        assert node.store.sealed(after.id)
        node.shim()("DEL", conf, netns=pod).ok()
        assert node.left() == []

    def test_a_torn_record_is_made_again(self, node: Node) -> None:
        pod = node.lab.pod()
        node.shim()("ADD", config(**WIRE), netns=pod).ok()
        (before,) = node.records()
        file = node.agent.run / "attachments" / f"{before.id}.json"

        def tear(_: Path) -> None:
            file.unlink()
            file.write_text('{"network": "wi')

        self._lose(node, tear)
        node.hears("reconciled")
        node.agent.end()  # which of the first two runs sees what is open: the record is set aside in one of them
        node.agent.start()
        node.hears("reconciled")
        node.agent.end()
        assert node.records() == [before]
        assert file.with_suffix(".bad").exists()

    @pytest.mark.parametrize("fields", [PORT, {"device": "tap"}], ids=["port", "plain tap"])
    def test_a_tap_is_left_to_del(self, node: Node, fields: dict[str, Any]) -> None:
        pod = node.lab.pod()
        node.shim()("ADD", config(**fields), netns=pod).ok()
        self._lose(node, lambda run: shutil.rmtree(run / "attachments"))
        node.hears("link without a record left alone: DEL removes it, by its alias")
        node.agent.end()
        node.agent.start()
        node.reconciled()
        assert "net1" in pod.links()
        assert [name for name in node.left() if "vth" in name or "ifindex" in name]
        node.shim()("DEL", config(**fields), netns=pod).ok()
        assert node.left() == []
        assert "net1" not in pod.links()

    def test_an_alias_alone_is_no_proof(self, node: Node) -> None:
        """Whoever is root in a pod may write one."""
        pod = node.lab.pod()
        node.shim()("ADD", config(**WIRE), netns=pod).ok()
        index = IFINDEX_BASE + 5
        node.lab.node.ip(
            f"link add link {NIC} name forged index {index} netns {pod.path} type macvtap mode bridge"
        )
        pod.ip("link set forged alias vmtap/wire/c9/net1")
        node.agent.end()
        node.agent.start()
        line = node.hears("link without a record left alone: DEL removes it, by its alias")
        assert line["ifindex"] == index
        assert [record.container_id for record in node.records()] == ["c1"]
        assert {"net1", "forged"} <= pod.links().keys()
        assert "vmtap_reconcile_unrecorded 1" in node.agent.get("/metrics")[2].splitlines()

    def test_a_link_of_another_node_is_none_of_ours(self, node: Node) -> None:
        """Nodes of kind are containers of one machine, and have ids for each other's namespaces."""
        pod, other = node.lab.pod(), node.lab.pod("other")
        node.lab.node.ip(f"link add known type veth peer name known netns {pod.path}")
        other.ip(
            "link add eth0 type veth peer name eth1",
            f"link add link eth0 name net1 index {IFINDEX_BASE + 5} netns {pod.path} type macvtap mode bridge",
        )
        pod.ip("link set net1 alias vmtap/wire/c9/net1")
        node.agent.end()
        node.agent.start()
        node.reconciled()
        node.agent.end()
        assert not [line for line in node.agent.log if line["msg"].startswith("link without a record")]


def test_leftovers_of_kills_are_removed_and_nothing_else(node: Node) -> None:
    pod = node.lab.pod()
    node.shim()("ADD", config(**WIRE, owner=107), netns=pod, container="c1").ok()
    node.shim()("ADD", config(**PORT), netns=pod, container="c2", ifname="net2").ok()
    used = node.left()
    node.kill()
    run, id = node.agent.run, identifier("wire", "killed", "net1")
    number = node.store.reserve_ifindex(id)
    (run / "attachments" / f"{id}.new").write_text("{")
    (run / "dev/tap77").touch()
    (run / "dev" / f"tap{number}.new").touch()
    orphan = IFINDEX_BASE + 9
    node.lab.node.ip(
        f"link add vth{orphan:08x} type veth peer name vtp{orphan:08x} netns {pod.path}",
        f"link set vth{orphan:08x} alias vmtap/wire/killed/net9",
        "link add vth0000000a type veth peer name foreign",
    )
    node.agent.start()
    for _ in range(3):
        node.hears("leftover removed")
    node.agent.end()
    assert sorted(node.left()) == sorted([*used, "vth0000000a"])
    assert {"net1", "net2"} <= pod.links().keys()
    assert f"vtp{orphan:08x}" not in pod.links()


def test_the_index_of_a_prepared_claim_stays_reserved(node: Node) -> None:
    device = replace(DEVICE, ifindex=0)
    claim = replace(CLAIM, devices=(device,))
    number = node.store.reserve_ifindex(claim.attachment(device))
    stale = node.store.reserve_ifindex(identifier("claim-nic", "unprepared", "net1"))
    Claims(node.agent.run).save(claim)
    node.kill()
    node.agent.start()
    assert node.hears("leftover removed")["kind"] == "state"
    node.agent.end()
    assert dict(node.store.reserved()) == {number: claim.attachment(device)}
    assert stale != number
    node.store.forget_id(claim.attachment(device), number)
    Claims(node.agent.run).remove(claim.uid)


PORTS = f"""
interfaces:
- {{name: nic, source: {{dev: {NIC}}}, port: {{macSpoofCheck: true}}}}
- {{name: bridged, source: {{dev: {BRIDGE}}}, port: {{macSpoofCheck: true}}}}
"""


def tables(place: Netns) -> str:
    return place.run(["nft", "list", "tables"]).stdout


@pytest.mark.parametrize("interface", ["nic", "bridged"])
def test_filters_without_state(node: Node, interface: str) -> None:
    """They stay in force when the state folder is lost, and end with the link."""
    node.agent.policy.write_text(PORTS)
    pod, conf = node.lab.pod(), config(interface=interface)
    node.shim()("ADD", conf, netns=pod).ok()
    (record,) = node.records()
    place = node.lab.node if interface == "bridged" else pod
    table = filters.table("net1" if interface == "nic" else f"vth{record.ifindex:08x}")
    rules = place.run(["nft", "list", "table", "netdev", table]).stdout
    node.kill()
    shutil.rmtree(node.agent.run / "attachments")
    node.agent.start()
    node.reconciled()
    assert place.run(["nft", "list", "table", "netdev", table]).stdout == rules
    node.shim()("DEL", conf, netns=pod).ok()
    assert table not in tables(place)
    assert "net1" not in pod.links()
    assert record.port


def test_filters_of_ports_that_are_gone(node: Node) -> None:
    """A pod that ended while its state was lost took its port along, and not the port's filters in the host."""
    node.agent.policy.write_text(PORTS)
    kept, pod, conf = node.lab.pod(), node.lab.pod(), config(interface="bridged")
    node.shim()("ADD", conf, netns=kept, container="c1").ok()
    node.shim()("ADD", conf, netns=pod, container="c2").ok()
    (one,) = (each for each in node.records() if each.container_id == "c1")
    node.kill()
    (two,) = (each for each in node.records() if each.container_id == "c2")
    (node.agent.run / "attachments" / f"{two.id}.json").unlink()
    node.lab.node.run(["nft", "add", "table", "netdev", "foreign"])
    pod.close()
    until(lambda: f"vth{two.ifindex:08x}" not in node.lab.node.links(), "the port is gone")
    assert f"vth{two.ifindex:08x}" in tables(node.lab.node)
    node.agent.start()
    until(lambda: f"vth{two.ifindex:08x}" not in tables(node.lab.node), "its filters are removed")
    assert f"vth{one.ifindex:08x}" in tables(node.lab.node)
    assert "foreign" in tables(node.lab.node)


class TestPending:
    """What the shim leaves while the agent is away."""

    @pytest.mark.parametrize("stdin", [None, b"{", b" " * (2 << 20)], ids=["", "undecodable", "too large"])
    def test_a_del_is_carried_out_at_the_start(self, node: Node, stdin: bytes | None) -> None:
        pod, conf = node.lab.pod(), config(**WIRE, ipam=IPAM)
        node.shim()("ADD", conf, netns=pod).ok()
        node.kill()
        assert node.shim()("DEL", conf if stdin is None else stdin, netns=pod).stdout == b""
        assert "net1" in pod.links()
        node.agent.start()
        node.hears("pending DEL carried out")  # before it is ready, unless the machine is slow
        assert node.left() == []
        assert "net1" not in pod.links()
        assert "vmtap_reconcile_pending 0" in node.agent.get("/metrics")[2].splitlines()

    @pytest.mark.parametrize("stdin", [None, b"{"], ids=["", "undecodable"])
    def test_an_add_that_follows_is_not_undone(self, node: Node, stdin: bytes | None) -> None:
        """A container that is restarted has the id that it had."""
        pod, conf = node.lab.pod(), config(**WIRE)
        shim = node.shim()
        shim("ADD", conf, netns=pod).ok()
        node.kill()
        shim("DEL", conf if stdin is None else stdin, netns=pod).ok()
        (request,) = (node.agent.run / "pending").iterdir()
        kept = request.read_bytes()
        written = request.stat().st_mtime_ns
        node.agent.start()
        node.hears("pending DEL carried out")
        shim("ADD", conf, netns=pod).ok()
        node.agent.end()
        request.write_bytes(kept)
        os.utime(request, ns=(written, written))
        node.agent.start()
        node.hears("pending DEL dropped: the attachment was added again after it")
        assert "net1" in pod.links()
        assert not request.exists()

    @pytest.mark.parametrize("what", ["junk", "add", "cut", "link"])
    def test_what_is_no_del_is_set_aside(self, node: Node, what: str) -> None:
        pod, conf = node.lab.pod(), config(**WIRE)
        node.agent.end()
        node.shim()("DEL", conf, netns=pod).ok()
        (request,) = (node.agent.run / "pending").iterdir()
        good = request.read_bytes()
        request.unlink()
        if what == "link":
            request.symlink_to("/etc/passwd")
        else:
            bad = {"junk": b"junk", "add": good.replace(b"=DEL\0", b"=ADD\0"), "cut": good[:-1]}
            request.write_bytes(bad[what])
        node.agent.start()
        assert node.hears("reconciling failed; it is tried again")["what"].startswith("pending request")
        assert [path.name for path in (node.agent.run / "pending").iterdir()] == [f"{request.name}.bad"]
        assert "net1" not in pod.links()

    def test_one_that_fails_is_tried_again(self, node: Node) -> None:
        pod, conf = node.lab.pod(), config(**WIRE, ipam=IPAM)
        node.shim()("ADD", conf, netns=pod).ok()
        node.ipam.write(DEL=LOCKED)
        node.agent.end()
        node.shim()("DEL", conf, netns=pod).ok()
        node.agent.flags = (*node.agent.flags, "--reconcile-seconds", "1")
        node.agent.start()
        assert len(list((node.agent.run / "pending").iterdir())) == 1
        node.ipam.write()
        node.hears("pending DEL carried out")
        assert node.left() == []


def test_kills_at_any_moment(node: Node) -> None:
    """Ten kills, each in the middle of ADDs and DELs: what was answered stays, what was not is gone after its DEL."""
    chance = random.Random(4)  # noqa: S311 - no secret
    pods = [node.lab.pod() for _ in range(4)]
    wanted: dict[str, dict[str, Any]] = {}
    unanswered = 0
    for turn in range(10):
        shim = node.shim()
        failed: list[str] = []
        conf = config(**(PORT if turn % 3 == 2 else WIRE), ipam=IPAM)

        def add(
            name: str, conf: dict[str, Any] = conf, shim: Shim = shim, failed: list[str] = failed
        ) -> None:
            answer = shim("ADD", conf, netns=pods[hash(name) % 4], container=name, ifname=name)
            if answer.status == 0:
                wanted[name] = conf
            else:
                answer.error(11)
                failed.append(name)

        def delete(name: str, shim: Shim = shim) -> None:
            shim("DEL", wanted.pop(name), netns=pods[hash(name) % 4], container=name, ifname=name).ok()

        killer = threading.Timer(chance.uniform(0, 0.25), node.agent.process.kill)  # type: ignore[union-attr]
        with ThreadPoolExecutor(8) as pool:
            killer.start()
            jobs = [pool.submit(delete, name) for name in list(wanted)[:4]]
            jobs += [pool.submit(add, f"t{turn}n{number}") for number in range(8)]
            for job in jobs:
                job.result(LIMIT)
        killer.join()
        node.kill()
        node.agent.start()
        node.reconciled()
        unanswered += len(failed)
        for name in failed:  # a runtime's DEL follows a failed ADD
            node.shim()("DEL", conf, netns=pods[hash(name) % 4], container=name, ifname=name).ok()
        until(
            lambda: {record.container_id for record in node.records()} == wanted.keys(),
            f"turn {turn}: there is not what was answered",
        )
        node.agent.end()
        assert {record.container_id for record in node.records()} == wanted.keys(), f"turn {turn}"
        links = {name for pod in pods for name in pod.links() if name.startswith("t")}
        assert links == wanted.keys(), f"turn {turn}"
        leases = {lease.split("-")[0] for lease in node.ipam.leases()}
        assert leases == wanted.keys(), f"turn {turn}"
        node.agent.start()
        node.reconciled()
    assert unanswered, "no kill came in the middle of an ADD"
    for pod in pods:
        pod.close()
    for _ in range(len(wanted)):
        node.hears("attachment ended")
    assert node.left() == []
