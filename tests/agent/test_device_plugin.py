"""The device plugin of a real agent, as the lab's kubelet sees it: what it offers and answers, and what restarts do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.agent.deviceplugin import v1beta1_pb2 as api
from cni.state import deviceid
from cni.state.claims import Claim as Prepared
from cni.state.claims import ClaimDevice, Claims
from cni.state.store import Store
from lab.kubernetes.kubelet import SOCKET, Claim, Kubelet, PluginError
from lab.wire import BRIDGE_UPLINK, NIC
from tests.agent.conftest import Agent
from tests.agent.test_metrics import parse
from tests.fakeipam import FakeIpam
from tests.runner import config, pod_args

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

NAMESPACE = "macvtap.network.kubevirt.io"
DATA = f"{NAMESPACE}/data"
TWO = f"{NAMESPACE}/two"
METRICS = ("--metrics", "127.0.0.1:0")


def entry(name: str, **fields: object) -> dict[str, object]:
    """Of a policy file."""
    return {"name": name, "source": {"dev": NIC}, **fields}


def put(policy: Path, text: str) -> None:
    """In one step: while a file is written it is empty first, which is a good policy that names nothing."""
    new = policy.with_suffix(".new")
    new.write_text(text)
    new.rename(policy)


@dataclass
class Node:
    """A lab's node with an agent that offers its interfaces, and room for a kubelet."""

    lab: Lab
    folder: Path
    agent: Agent
    kubelet: Kubelet

    def policy(self, *entries: dict[str, object]) -> None:
        """Put another policy in the place of the one that is there."""
        put(self.agent.policy, json.dumps({"interfaces": entries}))

    def start(self, *flags: str, **env: str) -> None:
        """The agent, with more flags."""
        self.agent.flags = ("--device-plugin", "--kubelet", str(self.kubelet.folder), *flags)
        self.agent.env = env
        self.agent.start()

    def registered(self, *resources: str) -> None:
        """Until the agent has taken note of that, which is a moment after the kubelet has."""
        msg = "registered with the kubelet"
        while not {line["resource"] for line in self.agent.log if line["msg"] == msg}.issuperset(resources):
            self.agent.wait_for(msg)

    def sockets(self) -> list[str]:
        """Of the agent, in the kubelet's folder."""
        return sorted(path.name for path in self.kubelet.folder.glob("vmtap-*"))


@pytest.fixture
def node(lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """Not started yet, and without a policy."""
    (tmp_path / "policy").mkdir()
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "policy" / "interfaces.yaml")
    with tempfile.TemporaryDirectory() as short:  # a unix socket's path is short
        made = Node(lab, Path(short), agent, Kubelet(f"{short}/kubelet/device-plugins"))
        yield made
        if agent.process:
            agent.end()
        made.kubelet.stop()
    assert all("level" in line for line in agent.log), "stderr is JSON lines, whatever gRPC has to say"


@pytest.fixture
def running(node: Node) -> Node:
    """With a kubelet, and two resources of one NIC: data of three devices, and two."""
    node.kubelet.start()
    node.policy(entry("data", capacity=3), entry("two"))
    node.start()
    node.kubelet.wait_resource(DATA)
    node.kubelet.wait_resource(TWO)
    return node


def test_each_interface_is_a_resource(running: Node) -> None:
    devices = running.kubelet.devices(DATA)
    assert list(devices) == ["dataMvp0", "dataMvp1", "dataMvp2"]
    assert all(device.healthy and device.nodes == () for device in devices.values())
    assert len(running.kubelet.devices(TWO)) == deviceid.DEFAULT_CAPACITY


def test_allocate_answers_with_what_add_will_make_and_makes_nothing(running: Node) -> None:
    before = running.lab.node.links().keys()
    answer = running.kubelet.allocate(DATA, ["dataMvp1", "dataMvp2"])
    run = running.agent.run
    indexes = [deviceid.ifindex("data", number) for number in (1, 2)]
    assert [(each.container_path, each.host_path, each.permissions) for each in answer.devices] == [
        (f"/dev/tap{index}", f"{run}/dev/tap{index}", "rw") for index in indexes
    ]
    (mount,) = answer.mounts
    assert (mount.host_path, mount.container_path, mount.read_only) == (f"{run}/launcher",) * 2 + (True,)
    assert not answer.cdi_devices
    assert running.lab.node.links().keys() == before
    assert not list((run / "dev").iterdir())
    assert not list((run / "ifindex").iterdir())


def test_by_configuration_a_cdi_name_and_no_mount(node: Node) -> None:
    node.kubelet.start()
    node.policy(entry("data"))
    node.start(
        *("--device-route", "cdi", "--cdi", str(node.folder / "cdi"), "--no-broker-mount"),
        *("--resource-namespace", "vmtap.example.org"),
    )
    node.kubelet.wait_resource("vmtap.example.org/data")
    answer = node.kubelet.allocate("vmtap.example.org/data", ["dataMvp7"])
    assert [each.name for each in answer.cdi_devices] == ["vmtap.dev/tap=dataMvp7"]
    assert not answer.devices
    assert not answer.mounts
    node.agent.shim()("ADD", config(deviceID="dataMvp7"), netns=node.lab.pod(), args=pod_args()).ok()
    (written,) = (node.folder / "cdi").iterdir()
    spec = json.loads(written.read_text())
    assert f"{spec['kind']}={spec['devices'][0]['name']}" == answer.cdi_devices[0].name


def test_a_device_that_a_claim_has_is_not_the_kubelets(node: Node) -> None:
    node.kubelet.start()
    node.policy(entry("data", capacity=3))
    node.start("--dra", "--node=n", KUBERNETES_SERVICE_HOST="127.0.0.1", KUBERNETES_SERVICE_PORT="9")
    node.kubelet.wait_resource(DATA)
    store, claims = Store(node.agent.run), Claims(node.agent.run)
    network = {"cniVersion": "1.1.0", "name": "claim-nic", "type": "vmtap"}
    device = ClaimDevice("nic", "data-0", "n", "", "net1", 0, None, network, "")
    claim = Prepared("u1", "default", "c", "p1", "vm", (device,))
    for number in (2, 7):  # the second one was the claim's before the capacity was lowered
        store.hold(deviceid.ifindex("data", number), claim.attachment(device))
    claims.save(claim)
    node.kubelet.wait_devices(
        DATA, lambda now: [each.healthy for each in now.values()] == [True, False, False]
    )
    claims.remove("u1")
    node.kubelet.wait_devices(DATA, lambda now: all(each.healthy for each in now.values()))
    assert not [line for line in node.agent.log if line["msg"] == "devices are unhealthy"]


@pytest.mark.parametrize(
    ("id", "why"),
    [
        ("dataMvp3", "beyond the capacity"),
        ("twoMvp0", "is not a device of"),
        ("dataMvp01", "is not a device of"),
        ("dataMvp4096", "is not a device of"),
        ("data", "is not a device of"),
        ("", "is not a device of"),
    ],
)
def test_an_id_that_is_none_is_refused_by_name(running: Node, id: str, why: str) -> None:
    with pytest.raises(PluginError) as refused:
        running.kubelet.allocate(DATA, ["dataMvp0", id])
    code, said = refused.value.args
    assert code == "INVALID_ARGUMENT"
    assert why in said
    assert DATA in said


def test_what_is_in_use_is_preferred_last(running: Node) -> None:
    ids = ["dataMvp2", "dataMvp0", "dataMvp1"]
    assert running.kubelet.preferred(DATA, ids, size=2) == ["dataMvp0", "dataMvp1"]
    assert running.kubelet.preferred(DATA, ids, must=["dataMvp2"], size=2) == ["dataMvp2", "dataMvp0"]
    running.kubelet.allocate(DATA, ["dataMvp0"])
    running.agent.shim()("ADD", config(deviceID="dataMvp0"), netns=running.lab.pod(), args=pod_args()).ok()
    assert running.kubelet.preferred(DATA, ids, size=3) == ["dataMvp1", "dataMvp2", "dataMvp0"]


# Whose device it is


def test_only_the_pod_that_was_allocated_a_device_gets_it(running: Node) -> None:
    kubelet, shim, pod = running.kubelet, running.agent.shim(), running.lab.pod()
    kubelet.allocate(DATA, ["dataMvp0"], pod=("ns", "owner"))
    kubelet.allocate(TWO, ["twoMvp1"], pod=("ns", "thief"))
    kubelet.pods.add(("ns", "empty"))
    for name, theirs in (("thief", "twoMvp1"), ("empty", "none")):
        refused = shim("ADD", config(deviceID="dataMvp0"), netns=pod, args=pod_args(name, "ns")).error(7)
        assert f"the kubelet has not allocated it to pod ns/{name}" in refused["msg"]
        assert refused["details"] == f"allocated to the pod: {theirs}"
    shim("ADD", config(deviceID="dataMvp0"), netns=pod, args=pod_args("owner", "other")).error(11)
    assert "K8S_POD_NAME" in shim("ADD", config(deviceID="dataMvp0"), netns=pod).error(4)["msg"]
    assert shim.leftovers() == []
    assert "net1" not in pod.links()
    shim("ADD", config(deviceID="dataMvp0"), netns=pod, args=pod_args("owner", "ns")).ok()
    kubelet.calls.clear()
    shim("ADD", config(interface="data", mode="bridge"), netns=pod, ifname="net2").ok()
    assert kubelet.calls == [], "without a deviceID the kubelet is not called"


def test_a_device_of_another_resource_of_the_same_name_is_another(running: Node) -> None:
    """Two plugins may use one form of device ids."""
    running.kubelet.claims.append(
        Claim(("default", "pod"), "main", "example.org/data", ("dataMvp0",), api.ContainerAllocateResponse())
    )
    shim = running.agent.shim()
    shim("ADD", config(deviceID="dataMvp0"), netns=running.lab.pod(), args=pod_args()).error(7)


@pytest.mark.parametrize(
    ("get", "calls"),
    [("on", ["Get"] * 2), ("disabled", ["Get", "List", "List"]), ("missing", ["List"] * 2)],
)
def test_a_kubelet_without_get_lists_all_pods(running: Node, get: str, calls: list[str]) -> None:
    """The feature gate KubeletPodResourcesGet: there since 1.27, on by default since 1.34."""
    running.kubelet.get = get
    running.kubelet.allocate(DATA, ["dataMvp0", "dataMvp1"])
    shim, pod = running.agent.shim(), running.lab.pod()
    for number in range(2):
        conf = config(deviceID=f"dataMvp{number}")
        shim("ADD", conf, netns=pod, ifname=f"net{number}", args=pod_args()).ok()
    assert running.kubelet.calls == calls
    shim("ADD", config(deviceID="dataMvp2"), netns=pod, ifname="net2", args=pod_args()).error(7)
    unknown = shim("ADD", config(deviceID="dataMvp2"), netns=pod, ifname="net2", args=pod_args("x")).error(11)
    assert "does not know pod default/x" in unknown["msg"]


def test_without_the_kubelets_answer_nothing_is_made_and_the_runtime_tries_again(running: Node) -> None:
    running.kubelet.allocate(DATA, ["dataMvp0"])
    shim, pod, conf = running.agent.shim(), running.lab.pod(), config(deviceID="dataMvp0")
    socket_path = running.kubelet.pod_resources
    running.kubelet.stop()
    socket_path.unlink(missing_ok=True)
    said = shim("ADD", conf, netns=pod, args=pod_args()).error(11)
    assert str(socket_path) in said["msg"]
    with socket.socket(socket.AF_UNIX) as deaf:  # it accepts, and answers nothing
        deaf.bind(str(socket_path))
        deaf.listen()
        said = shim("ADD", conf, netns=pod, args=pod_args()).error(11)
        assert "DEADLINE_EXCEEDED" in said["details"] or "UNAVAILABLE" in said["details"]
    socket_path.unlink()
    assert shim.leftovers() == []
    running.kubelet.start()
    shim("ADD", conf, netns=pod, args=pod_args()).ok()


def test_a_kubelet_that_limits_calls_is_called_again(running: Node) -> None:
    running.kubelet.allocate(DATA, ["dataMvp0"])
    running.kubelet.reject = 3
    shim = running.agent.shim()
    shim("ADD", config(deviceID="dataMvp0"), netns=running.lab.pod(), args=pod_args()).ok()
    assert running.kubelet.calls == ["Get"] * 4


def test_a_forged_link_uses_up_no_device(running: Node) -> None:
    """A pod with NET_ADMIN gives a macvtap a device's index and an alias of vmtap's.

    What the kubelet has allocated is adopted, as the state folder may have been lost.
    """
    lab, kubelet, shim = running.lab, running.kubelet, running.agent.shim()
    forger, index = lab.pod("forger"), [deviceid.ifindex("data", number) for number in range(2)]
    shim("ADD", config(interface="data", mode="bridge"), netns=forger, container="forger").ok()
    kubelet.allocate(DATA, ["dataMvp1"])
    assert running.agent.end() == 0
    for number in range(2):
        name = f"x{number}"
        lab.node.ip(f"link add link {NIC} name {name} index {index[number]} type macvtap mode bridge")
        lab.node.ip(f"link set {name} netns {forger.path}")
        assert forger.links()[name]["ifindex"] == index[number]
        forger.ip(f"link set {name} alias vmtap/wire/c{number}/{name}")
    running.agent.start()
    assert (
        running.agent.said("link without a record left alone: DEL removes it, by its alias")["ifindex"]
        == index[0]
    )
    assert running.agent.said("link without a record adopted")["ifindex"] == index[1]
    kubelet.wait_resource(DATA, times=2)
    assert kubelet.preferred(DATA, ["dataMvp0", "dataMvp1", "dataMvp2"], size=3) == [
        "dataMvp0",
        "dataMvp2",
        "dataMvp1",
    ]
    kubelet.allocate(DATA, ["dataMvp0"], pod=("default", "rightful"))
    args = pod_args("rightful")
    shim("ADD", config(deviceID="dataMvp0"), netns=lab.pod("rightful"), container="r", args=args).ok()
    records = [json.loads(path.read_text()) for path in (running.agent.run / "attachments").glob("c1-*")]
    assert [each["device_id"] for each in records] == ["dataMvp1"]


# Restarts


def test_an_agent_that_restarts_gives_the_same_answers(running: Node) -> None:
    before = running.kubelet.allocate(DATA, ["dataMvp2"])
    (device,) = before.devices
    pod, shim, add = running.lab.pod(), running.agent.shim(), config(deviceID="dataMvp2", mode="bridge")
    shim("ADD", add, netns=pod, args=pod_args()).ok()
    made = os.stat(device.host_path)
    assert stat.S_ISCHR(made.st_mode)
    assert device.container_path == f"/dev/tap{pod.links()['net1']['ifindex']}"
    assert running.agent.end() == 0
    assert not running.sockets()
    gone = running.kubelet.wait_devices(DATA, lambda now: not any(each.healthy for each in now.values()))
    assert len(gone) == 3
    running.agent.start()
    running.kubelet.wait_resource(DATA, times=2)
    assert all(each.healthy for each in running.kubelet.devices(DATA).values())
    with pytest.raises(PluginError, match="is held by pod default/pod still, attachment c1-"):
        running.kubelet.allocate(DATA, ["dataMvp2"])
    assert running.kubelet.preferred(DATA, ["dataMvp2", "dataMvp0"], size=1) == ["dataMvp0"]
    assert os.stat(device.host_path) == made
    taken = shim("ADD", add, netns=running.lab.pod(), container="c2", args=pod_args()).error(11)
    assert "deviceID dataMvp2: pod default/pod, attachment c1-" in taken["msg"]
    shim("DEL", add, netns=pod).ok()
    assert not Path(device.host_path).exists()
    assert running.kubelet.allocate(DATA, ["dataMvp2"]) == before


def test_a_killed_agents_sockets_are_removed(running: Node) -> None:
    killed = running.sockets()
    running.agent.end(signal.SIGKILL)
    assert running.sockets() == killed
    running.agent.start()
    running.kubelet.wait_resource(DATA, times=2)
    running.kubelet.wait_resource(TWO, times=2)
    assert len(running.sockets()) == 2
    assert not set(killed) & set(running.sockets())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_older_of_two_agents_ends_the_newer_registers_again(
    running: Node, tmp_path: Path, number: int
) -> None:
    """As in a rolling update that starts the new one first. The kubelet disconnects the newer one."""
    flags = (*running.agent.flags, *METRICS)
    newer = Agent(running.lab.node, tmp_path / "next", running.agent.policy, flags)
    newer.start()
    try:
        running.kubelet.wait_resource(DATA, times=2)
        running.kubelet.wait_resource(TWO, times=2)
        running.agent.end(number)
        for resource, capacity in ((DATA, 3), (TWO, deviceid.DEFAULT_CAPACITY)):
            devices = running.kubelet.wait_resource(resource, times=3)
            assert len(devices) == capacity
            assert all(device.healthy for device in devices.values())
            assert _registered(newer, resource) == 1
        lost = newer.said("not registered; tried again")
        assert lost["error"] == "the kubelet ended its ListAndWatch stream"
        assert f"{newer.run}/dev/" in running.kubelet.allocate(DATA, ["dataMvp0"]).devices[0].host_path
    finally:
        newer.end()


def test_two_agents_at_once_do_not_take_each_others_place_in_turns(running: Node, tmp_path: Path) -> None:
    newer = Agent(running.lab.node, tmp_path / "next", running.agent.policy, running.agent.flags)
    newer.start()
    try:
        running.kubelet.wait_resource(DATA, times=2)
        running.policy(entry("data", capacity=4))
        running.kubelet.wait_devices(DATA, lambda now: len(now) == 4)
        assert running.kubelet.registrations(DATA) == 2
        assert all(device.healthy for device in running.kubelet.devices(DATA).values())
    finally:
        newer.end()


def test_a_stream_that_ends_at_once_again_and_again_is_opened_ever_less(running: Node) -> None:
    pauses = []
    for times in (2, 3):
        running.kubelet.end_stream(DATA)
        pauses.append(running.agent.wait_for("not registered; tried again")["seconds"])
        running.kubelet.wait_resource(DATA, times=times)
        running.agent.wait_for("registered with the kubelet")
    assert pauses == [1, 2]


def test_a_kubelet_that_opens_no_stream_does_not_have_the_resource(node: Node) -> None:
    """The registration is accepted; the gauge is of the stream."""
    node.kubelet.start()
    node.kubelet.watch = False
    node.policy(entry("data", capacity=3))
    node.start(*METRICS, PYTHONPATH=_hasty(node.folder))
    node.registered(DATA)
    assert _registered(node.agent, DATA) == 0
    assert "opened no ListAndWatch stream" in node.agent.said("not registered; tried again")["error"]
    node.kubelet.watch = True
    node.kubelet.wait_resource(DATA)
    assert _registered(node.agent, DATA) == 1


def _hasty(folder: Path) -> str:
    """A PYTHONPATH with which an agent waits for the stream a fiftieth of the time."""
    (folder / "hasty").mkdir()
    (folder / "hasty" / "sitecustomize.py").write_text(
        "from cni.agent.deviceplugin import served\nserved.STREAM_SECONDS /= 50\n"
    )
    return str(folder / "hasty")


def _registered(agent: Agent, resource: str) -> float:
    return parse(agent.get("/metrics")[2])["vmtap_device_plugin_registered", (("resource", resource),)]


def test_a_new_kubelet_hears_of_everything_again(running: Node) -> None:
    for _ in range(3):
        running.kubelet.restart()
        assert len(running.kubelet.wait_resource(DATA)) == 3
        assert len(running.kubelet.wait_resource(TWO)) == deviceid.DEFAULT_CAPACITY
        assert running.kubelet.allocate(DATA, ["dataMvp0"]).devices
    assert len(running.sockets()) == 2


def test_a_socket_that_was_removed_is_made_again(running: Node) -> None:
    before = running.sockets()
    for name in before:
        (running.kubelet.folder / name).unlink()
    running.kubelet.wait_resource(DATA, times=2)
    running.kubelet.wait_resource(TWO, times=2)
    assert not set(before) & set(running.sockets())
    assert running.kubelet.allocate(DATA, ["dataMvp0"]).devices


def test_without_a_kubelet_the_agent_does_the_rest_and_says_so_once(node: Node) -> None:
    node.policy(entry("data", capacity=3))
    node.start()
    pod = node.lab.pod()
    node.agent.shim()("ADD", config(interface="data", mode="bridge"), netns=pod).ok()
    node.kubelet.start()  # makes the folders above, too
    node.kubelet.wait_resource(DATA)
    assert node.agent.end() == 0
    said = [line for line in node.agent.log if line["msg"].startswith("no kubelet socket yet")]
    assert len(said) == 1
    assert said[0]["socket"] == str(node.kubelet.folder / SOCKET)


def test_a_dead_kubelets_socket_is_tried_in_silence(node: Node) -> None:
    node.kubelet.folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(node.kubelet.folder / SOCKET))
    node.policy(entry("data", capacity=3))
    node.start(*METRICS)
    failed = node.agent.said("not registered; tried again")
    assert "UNAVAILABLE" in failed["error"]
    node.kubelet.start()
    node.kubelet.wait_resource(DATA)
    text = node.agent.get("/metrics")[2]
    assert parse(text)["vmtap_device_plugin_registration_failures_total", (("resource", DATA),)] >= 1


def test_a_kubelet_that_refuses_is_asked_again(node: Node) -> None:
    node.kubelet.start()
    node.kubelet.refuse = True
    node.policy(entry("data", capacity=3))
    node.start()
    assert "not today" in node.agent.said("not registered; tried again")["error"]
    node.kubelet.refuse = False
    node.kubelet.wait_resource(DATA)


# Changes


def test_interfaces_and_capacities_follow_the_policy(running: Node) -> None:
    running.policy(entry("data", capacity=5), entry("new", capacity=1))
    running.kubelet.wait_devices(DATA, lambda now: len(now) == 5)
    running.kubelet.wait_resource(f"{NAMESPACE}/new")
    assert running.kubelet.wait_devices(TWO, lambda now: not now) == {}
    assert running.kubelet.registrations(DATA) == 1, "told by the stream"
    running.policy(entry("data", capacity=2))
    running.kubelet.wait_devices(DATA, lambda now: len(now) == 2)
    running.kubelet.wait_devices(f"{NAMESPACE}/new", lambda now: not now)
    with pytest.raises(PluginError, match="capacity"):
        running.kubelet.allocate(DATA, ["dataMvp2"])
    running.policy(entry("data", capacity=deviceid.MOST))
    running.kubelet.wait_devices(DATA, lambda now: len(now) == deviceid.MOST)


def test_a_bad_policy_changes_nothing(running: Node) -> None:
    put(running.agent.policy, "interfaces: 7")
    running.agent.wait_for("the policy file is refused; the last good one stays")
    assert running.kubelet.allocate(DATA, ["dataMvp0"]).devices
    assert len(running.kubelet.devices(DATA)) == 3


def test_a_config_map_is_followed_through_its_symlinks(node: Node) -> None:
    folder = node.agent.policy.parent

    def put(version: str, *entries: dict[str, object]) -> None:
        """As the kubelet does: a new folder, and one symlink replaced."""
        (folder / version).mkdir()
        (folder / version / "interfaces.yaml").write_text(json.dumps({"interfaces": entries}))
        (folder / "..data_tmp").symlink_to(version)
        os.rename(folder / "..data_tmp", folder / "..data")

    node.kubelet.start()
    put("..1", entry("data", capacity=3))
    node.agent.policy.symlink_to("..data/interfaces.yaml")
    node.start()
    node.kubelet.wait_resource(DATA)
    put("..2", entry("two", capacity=4))
    assert len(node.kubelet.wait_resource(TWO)) == 4
    node.kubelet.wait_devices(DATA, lambda now: not now)


def test_a_policy_that_comes_later_is_noticed(node: Node) -> None:
    node.kubelet.start()
    node.agent.policy.parent.rmdir()
    node.start()
    node.agent.policy.parent.mkdir()
    node.policy(entry("data", capacity=3))
    node.kubelet.wait_resource(DATA)


def test_health_follows_the_source(running: Node) -> None:
    def all_are(healthy: bool) -> None:
        for resource in (DATA, TWO):
            running.kubelet.wait_devices(
                resource, lambda now: bool(now) and all(each.healthy is healthy for each in now.values())
            )

    node, switch = running.lab.node, running.lab.switch
    switch.ip("link set node down")
    all_are(False)
    assert running.agent.wait_for("devices are unhealthy")["why"] == "it has no carrier"
    switch.ip("link set node up")
    all_are(True)
    node.ip(f"link set {NIC} down")
    all_are(False)
    node.ip(f"link set {NIC} up")
    all_are(True)
    node.ip(f"link set {NIC} down", f"link set {NIC} name away0")
    all_are(False)
    node.ip(f"link set away0 name {NIC}", f"link set {NIC} up")
    all_are(True)
    node.ip(f"link delete {NIC}")
    all_are(False)
    switch.plug("node", node, NIC, 1500)
    all_are(True)
    assert running.kubelet.registrations(DATA) == 1


def test_a_bridges_port_that_goes_is_no_end_of_the_link(running: Node) -> None:
    """The bridge tells of it with RTM_DELLINK."""
    running.policy(entry("data", source={"dev": BRIDGE_UPLINK}))
    running.kubelet.wait_devices(DATA, lambda now: len(now) == deviceid.DEFAULT_CAPACITY)
    running.lab.node.ip(f"link set {BRIDGE_UPLINK} nomaster", "link add stays type ifb")
    running.policy(entry("data", source={"dev": BRIDGE_UPLINK}, capacity=4))
    devices = running.kubelet.wait_devices(DATA, lambda now: len(now) == 4)
    assert all(device.healthy for device in devices.values())


# What is offered at all


def test_what_cannot_be_offered_says_why(node: Node) -> None:
    node.kubelet.start()
    one, other = _clash()
    node.policy(entry("odd."), entry(one), entry(other))
    node.start(*METRICS)
    node.kubelet.wait_resource(f"{NAMESPACE}/{one}")
    left = [line for line in _log(node) if line["msg"] == "interface is not offered to the kubelet"]
    assert [line["interface"] for line in left] == ["odd.", other]
    assert one in left[-1]["why"]
    assert left[-1]["next"] == "give it another name"
    found = parse(node.agent.get("/metrics")[2])
    assert found["vmtap_device_plugin_not_offered", ()] == 2
    node.policy(entry(other))
    node.kubelet.wait_resource(f"{NAMESPACE}/{other}")


def test_the_other_types_are_offered_too(node: Node) -> None:
    """Here by a NIC that has no virtual functions; tests/hw has one that has."""
    node.kubelet.start()
    node.policy(
        entry("queues", type="vmdq", capacity=3),
        entry("vf", type="sr-iov"),
        entry("made", type="sr-iov", vfs=2),
    )
    node.start()
    assert all(each.healthy for each in node.kubelet.wait_resource(f"{NAMESPACE}/queues").values())
    assert node.kubelet.wait_resource(f"{NAMESPACE}/vf") == {}
    assert not any(each.healthy for each in node.kubelet.wait_resource(f"{NAMESPACE}/made").values())
    assert node.agent.said("devices are unhealthy")["why"] == f"{NIC} can have 0 VFs, and vfs says 2"


def _log(node: Node) -> list[dict[str, Any]]:
    """The lines up to a registration, which comes after all that is said of the policy."""
    node.agent.said("registered with the kubelet")
    return node.agent.log


def _clash() -> tuple[str, str]:
    """Two names whose devices have the same interface indexes."""
    seen: dict[int, str] = {}
    for number in range(1 << 17):
        name = f"n{number}"
        other = seen.setdefault(deviceid.ifindex(name, 0), name)
        if other != name:
            return other, name
    raise AssertionError


CONF = [
    {"name": "data", "lowerDevice": NIC, "mode": "vepa", "capacity": 3},
    {"name": "two", "lowerDevice": NIC},
]


def test_the_old_plugins_variable_is_understood(node: Node) -> None:
    node.kubelet.start()
    node.policy(entry("two", capacity=7))
    node.start(DP_MACVTAP_CONF=json.dumps(CONF))
    assert len(node.kubelet.wait_resource(DATA)) == 3
    assert len(node.kubelet.wait_resource(TWO)) == 7, "the file goes first"
    shim, pod = node.agent.shim(), node.lab.pod()
    shim("ADD", config(interface="data", mode="bridge"), netns=pod).error(7)
    node.kubelet.allocate(DATA, ["dataMvp1"])
    shim("ADD", config(deviceID="dataMvp1"), netns=pod, args=pod_args()).ok()
    assert pod.links()["net1"]["linkinfo"]["info_data"]["mode"] == "vepa"
    node.policy()
    node.kubelet.wait_devices(TWO, lambda now: len(now) == deviceid.DEFAULT_CAPACITY)
    shim("ADD", config(source=BRIDGE_UPLINK), netns=pod, ifname="net2").error(7)


def test_a_bad_entry_of_the_variable_is_left_out(node: Node) -> None:
    node.kubelet.start()
    node.start(DP_MACVTAP_CONF=json.dumps([{"name": "old", "master": NIC}, CONF[1]]))
    why = node.agent.said("an entry of DP_MACVTAP_CONF is left out")["error"]
    assert why == f'[0].master: is called lowerDevice; give lowerDevice: "{NIC}"'
    node.kubelet.wait_resource(TWO)


@pytest.mark.parametrize("conf", ["[", "{}"])
def test_a_variable_that_is_not_understood_keeps_the_agent_from_starting(node: Node, conf: str) -> None:
    with pytest.raises(AssertionError, match="DP_MACVTAP_CONF"):
        node.start(DP_MACVTAP_CONF=conf)
    assert node.agent.end() == 1


AS_GOOD_AS_A_BOND = """
from cni.agent.deviceplugin import devices
devices._STACKED_KINDS += ("ifb",)
"""
"""The lab's kernel has neither bonds nor VLANs: in these agents an ifb stands in for one."""


def test_an_empty_variable_offers_every_suitable_link(node: Node, tmp_path: Path) -> None:
    """A veth is none, nor are a bridge and its port. tests/unit has NICs, bonds and VLANs."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(AS_GOOD_AS_A_BOND)
    node.kubelet.start()
    node.policy(entry("mine", source={"dev": "bond0"}, capacity=2, modes=["vepa"]))
    node.lab.node.ip("link add bond0 up type ifb", "link add bond1 up type ifb")
    node.start(*METRICS, DP_MACVTAP_CONF="[]", PYTHONPATH=str(tmp_path / "fake"))
    found = f"{NAMESPACE}/bond1"
    assert len(node.kubelet.wait_resource(found)) == deviceid.DEFAULT_CAPACITY
    node.kubelet.wait_resource(f"{NAMESPACE}/mine")
    node.lab.node.ip("link add bond2 up type ifb")
    node.kubelet.wait_resource(f"{NAMESPACE}/bond2")
    offered = {
        dict(labels)["resource"].removeprefix(f"{NAMESPACE}/")
        for name, labels in parse(node.agent.get("/metrics")[2])
        if name == "vmtap_device_plugin_registered"
    }
    assert offered == {"mine", "bond1", "bond2"}, "bond0 is the policy's, under another name"
    pod = node.lab.pod()
    node.kubelet.allocate(found, ["bond1Mvp0"])
    node.agent.shim()("ADD", config(deviceID="bond1Mvp0"), netns=pod, args=pod_args()).ok()
    node.agent.shim()("ADD", config(deviceID="bond0Mvp0"), netns=pod, ifname="net2").error(7)
    node.lab.node.ip("link delete bond1")
    node.kubelet.wait_devices(found, lambda now: not now)


# The rest of the agent


def test_the_agent_without_it_has_no_grpc(lab: Lab, tmp_path: Path) -> None:
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml").start()
    try:
        assert agent.process
        assert "grpc" not in Path(f"/proc/{agent.process.pid}/maps").read_text()
    finally:
        agent.end()


def test_delegates_run_beside_it(running: Node, tmp_path: Path) -> None:
    ipam = FakeIpam(tmp_path / "bin")
    answer = (
        """[ $CNI_COMMAND = DEL ] || echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.5/24"}]}'"""
    )
    ipam.script(
        f"cd {ipam.seen}; ls -l /proc/$$/fd >> fds; env >> env; {answer}"
    )  # nothing on the agent's stderr
    shim, env = running.agent.shim(), {"CNI_PATH": str(ipam.folder)}
    conf = config(interface="data", mode="bridge", ipam=ipam.config)
    for _ in range(3):
        pod = running.lab.pod()
        running.kubelet.restart()  # so that gRPC has something to do
        assert shim("ADD", conf, netns=pod, env=env).ok()["ips"][0]["address"] == "10.1.0.5/24"
        shim("DEL", conf, netns=pod, env=env).ok()
        running.kubelet.wait_resource(DATA)
    assert "GRPC" not in (ipam.seen / "env").read_text()
    assert not re.search("socket:|anon_inode:", (ipam.seen / "fds").read_text())


def test_what_it_counts(node: Node) -> None:
    node.kubelet.start()
    node.policy(entry("data", capacity=3), entry("two", source={"dev": "none0"}, capacity=2))
    node.start(*METRICS)
    node.registered(DATA, TWO)
    node.kubelet.wait_resource(DATA)
    node.kubelet.allocate(DATA, ["dataMvp0", "dataMvp1"])
    node.agent.wait_for("allocated")

    def count(metric: str, **labels: str) -> float:
        found = parse(node.agent.get("/metrics")[2])
        return found[f"vmtap_device_plugin_{metric}", tuple(sorted(labels.items()))]

    assert count("devices", resource=DATA, health="Healthy") == 3
    assert count("devices", resource=DATA, health="Unhealthy") == 0
    assert count("devices", resource=TWO, health="Unhealthy") == 2
    assert count("allocations_total", resource=DATA) == 2
    assert count("registrations_total", resource=DATA) == 1
    assert count("registered", resource=DATA) == 1
