"""doctor: each thing that can be wrong is made wrong, and found, with the step that mends it."""

from __future__ import annotations

import ctypes
import http.server
import json
import socket
import struct
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from fcntl import ioctl
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel.ethtool import SIOCETHTOOL
from lab.kubernetes.kubelet import Kubelet
from tests.agent.conftest import Agent
from tests.agent.test_device_plugin import put
from tests.ctl.conftest import Ctl
from tests.runner import BIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Lab, Netns

POLICY = "interfaces: [{name: data, source: {dev: eth1}, capacity: 2}]\n"


@pytest.fixture
def good(ctl: Ctl) -> Ctl:
    """A node with nothing wrong but what the test machine lacks."""
    ctl.plugin.policy.write_text(POLICY)
    return ctl


def wrong(ctl: Ctl, *words: str | Path) -> dict[str, tuple[str, str, str]]:
    """check → (severity, message, next step) of what is not ok. vhost is left out: it is the test machine's."""
    done = ctl("doctor", "--json", *words, status=None)
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    found = {}
    for each in document["findings"]:
        assert each.keys() == {"check", "severity", "message", "nextStep"}
        assert (each["severity"] == "ok") == (not each["nextStep"]), each
        if each["severity"] != "ok" and each["check"] not in ("vhost", "state"):
            found[each["check"]] = (each["severity"], each["message"], each["nextStep"])
    severities = {each["severity"] for each in document["findings"]}
    assert done.returncode == int("error" in severities)
    assert document["error"] == sum(each["severity"] == "error" for each in document["findings"])
    return found


def state(ctl: Ctl) -> str:
    findings = ctl.json("doctor", status=None)["findings"]
    return " ".join(
        f"{each['message']} → {each['nextStep']}" for each in findings if each["check"] == "state"
    )


def test_nothing_is_wrong(good: Ctl, pod: Netns) -> None:
    good.add(pod, interface="data", mode="bridge")
    assert wrong(good) == {}
    text = good("doctor", status=None).stdout
    assert "makes, opens and shows macvtaps and taps" in text
    assert "data: 1 of 2 attached" in text
    assert "0 errors" in text.splitlines()[-1]


def test_without_a_broker_no_device_is_opened(good: Ctl, lab: Lab, tmp_path: Path) -> None:
    """As in the DaemonSet: the container's device cgroup would refuse it, and CAP_SYS_PTRACE is the broker's."""
    file = tmp_path / "agent.yaml"
    file.write_text(f"brokerMount: false\npolicy: {good.plugin.policy}\nmetrics: ''\nhealth: ''\n")
    less = ["setpriv", "--bounding-set", "-sys_ptrace"]
    argv: list[str | Path] = [*less, BIN / "vmtapd", "--config", file, "--run", good.plugin.state]
    agent = subprocess.Popen(lab.node.argv(argv), stderr=subprocess.PIPE)
    try:
        assert agent.stderr
        assert any(b'"msg": "ready"' in line for line in agent.stderr)
        assert wrong(good, "--config", file) == {}
        text = good("doctor", "--config", file, status=None).stdout
        assert "makes and shows macvtaps and taps" in text
        assert "lacks CAP_SYS_PTRACE" in good("doctor", status=None).stdout
    finally:
        agent.kill()
        agent.communicate()


def test_the_trial_leaves_nothing(good: Ctl, lab: Lab) -> None:
    before = set(lab.node.links())
    good("doctor", status=None)
    assert set(lab.node.links()) == before


def test_a_capability_is_missing(good: Ctl) -> None:
    less = ["setpriv", "--bounding-set", "-sys_admin"]
    done = subprocess.run(
        [*good.argv()[:3], *less, BIN / "vmtapctl", "doctor", "--json"],
        env=good.env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    [kernel] = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "kernel"]
    assert (kernel["severity"], kernel["nextStep"]) == (
        "error",
        "give vmtapctl the capabilities of the host's root",
    )


@pytest.mark.parametrize(
    ("change", "says", "step"),
    [
        ("link delete eth1", "not on this node", "correct source.dev"),
        ("link set eth1 down", "it is down", "ip link set eth1 up"),
        ("link set eth1 master br0", "port of br0", "nomaster"),
        (
            "link add link eth1 name taker type macvlan mode passthru",
            "taker uses it exclusively",
            "ip link delete taker",
        ),
    ],
)
def test_a_source_that_cannot_be_used(good: Ctl, lab: Lab, change: str, says: str, step: str) -> None:
    lab.node.ip(change)
    severity, message, next_step = wrong(good)["source eth1"]
    assert severity == "error"
    assert says in message
    assert step in next_step


def test_a_source_that_was_renamed(good: Ctl, lab: Lab, pod: Netns) -> None:
    """Known by the attachments on it; under its old name as an altname, it is found."""
    good.add(pod, source="eth1")
    lab.node.ip("link set eth1 down", "link set eth1 name enp1s0", "link set enp1s0 up")
    severity, message, step = wrong(good)["source eth1"]
    assert (severity, message) == ("error", "it is called enp1s0 now")
    assert step.startswith("rename enp1s0, or correct source.dev")
    lab.node.ip("link property add dev enp1s0 altname eth1")
    assert "source eth1" not in wrong(good)


def test_a_source_without_carrier(good: Ctl, lab: Lab) -> None:
    lab.switch.ip("link set node down")
    assert wrong(good)["source eth1"][:2] == ("warning", "it has no carrier: no VM on it reaches anything")


def test_an_offload_is_off(good: Ctl, lab: Lab) -> None:
    lab.node.call(_no_receive_checksums)
    severity, message, step = wrong(good)["source eth1"]
    assert (severity, step) == ("warning", "ethtool -K eth1 rx on")
    assert "rx-checksum" in message


def _no_receive_checksums() -> None:
    """ethtool -K eth1 rx off, without ethtool."""
    value = ctypes.create_string_buffer(struct.pack("=II", 0x15, 0))  # ETHTOOL_SRXCSUM
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        ioctl(asker, SIOCETHTOOL, struct.pack("=16sQ16x", b"eth1", ctypes.addressof(value)))


def test_a_type_that_cannot_be_attached_to(good: Ctl) -> None:
    good.plugin.policy.write_text("interfaces: [{name: fast, source: {dev: eth1}, type: sr-iov}]\n")
    assert "of type sr-iov, and it has no virtual functions" in wrong(good)["source eth1"][1]
    good.plugin.policy.write_text("interfaces: [{name: fast, source: {dev: eth1}, type: vmdq}]\n")
    assert "has no l2-fwd-offload" in wrong(good)["source eth1"][1]


def test_more_than_the_capacity(good: Ctl, lab: Lab) -> None:
    for number in range(3):
        good.add(lab.pod(), container=f"c{number}", interface="data")
    assert "3 attachments, and a capacity of 2" in wrong(good)["source eth1"][1]


def test_ports(good: Ctl, pod: Netns) -> None:
    """Whether the kernel can filter is tried, and attachments that a change of the policy has missed are named."""
    good.add(pod, interface="data")
    port = "{macSpoofCheck: true, trunk: [100], broadcast: 100, rate: {out: 1Gbit, in: 1Gbit}}"
    good.plugin.policy.write_text(POLICY.replace("}]", f", port: {port}}}]"))
    assert wrong(good) == {
        "c1 net1": (
            "warning",
            "its port is wider than that of interface data now: macSpoofCheck, trunk, broadcast, rate.out, rate.in",
            "give the VM a new pod: a changed port is in force for new attachments",
        )
    }
    findings = good.json("doctor", status=None)["findings"]
    (found,) = (each for each in findings if each["check"] == "port")
    assert found["message"] == "the kernel can do what the ports of data need (tested)"
    good.delete(pod)
    good.add(pod, interface="data")
    assert wrong(good) == {}
    port = good.json("show", "c1")["attachments"][0]["port"]
    assert port["rate"] == {"out": 10**9, "in": 10**9}
    assert "macSpoofCheck, trunk 100, broadcast 100/s, rate.out 1 Gbit/s" in " ".join(
        good("show", "c1").stdout.split()
    )


def test_no_policy_and_a_bad_one(ctl: Ctl) -> None:
    assert wrong(ctl)["policy"][0] == "warning"
    settings = ctl.plugin.policy.with_name("agent.yaml")
    settings.write_text("{devicePlugin: true, metrics: ''}")
    assert wrong(ctl, "--config", settings)["policy"][0] == "error"
    ctl.plugin.policy.write_text("interfaces: [{nam: x}]\n")
    severity, message, _ = wrong(ctl)["policy"]
    assert severity == "error"
    assert "interfaces[0]" in message


def test_a_bad_agents_file(good: Ctl, tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text("logLevel: loud\n")
    found = wrong(good, "--config", tmp_path / "agent.yaml")
    assert "logLevel" in found["agent's file"][1]
    assert "the defaults are used" in good("list", "--config", tmp_path / "agent.yaml").stderr


def test_what_is_left_in_the_state_folder(good: Ctl, pod: Netns, lab: Lab) -> None:
    good.add(pod)
    folder = good.plugin.state
    folder.chmod(0o755)
    assert "chmod 0700" in state(good)
    folder.chmod(0o700)
    (folder / "attachments/x.bad").write_text("?")
    (folder / "ifindex/268435456").symlink_to("c9-0")
    (folder / "pending").mkdir()
    (folder / "pending/1").write_text("")
    said = state(good)
    assert "c9-0, which has no record" in said
    assert "pending/1: a DEL" in said
    assert wrong(good)["attachments"][1].endswith("x.bad: it was set aside")


def test_attachments_that_are_not_what_they_were(good: Ctl, lab: Lab) -> None:
    down, gone = lab.pod("down"), lab.pod("gone")
    good.add(down, container="down")
    good.add(gone, container="gone")
    down.ip("link set net1 down")
    gone.ip("link delete net1")
    found = wrong(good)
    assert found["down net1"][0] == "error"
    assert found["down net1"][2].endswith("ip link set net1 up")
    assert found["gone net1"][0] == "warning"


def test_two_hold_one_device(good: Ctl, pod: Netns) -> None:
    good.add(pod)
    with good.vm(pod, "one"), good.vm(pod, "two"):
        assert "each gets a part of the frames" in wrong(good)["c1 net1"][1]


def test_the_agent(lab: Lab, tmp_path: Path) -> None:
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml")
    ctl = Ctl(agent.shim())
    ctl.plugin.policy.write_text(POLICY)
    agent.start()
    settings = tmp_path / "agent.yaml"
    settings.write_text("health: ''\n")
    assert wrong(ctl, "--config", settings) == {}
    with answering({"ok": False, "reasons": {"policy": "it is bad"}}, 503, lab) as port:
        settings.write_text(f"health: '127.0.0.1:{port}'\n")
        assert wrong(ctl, "--config", settings)["agent"][1] == "it is not ready: policy: it is bad"
    assert "cannot be read" in wrong(ctl, "--config", settings)["agent"][1]
    agent.end()
    severity, message, step = wrong(ctl, "--config", settings)["agent"]
    assert severity == "error"
    assert "does not answer" in message
    assert "systemctl start vmtapd.socket" in step


def test_the_device_plugin(lab: Lab, tmp_path: Path) -> None:
    check, settings = "device plugin", tmp_path / "agent.yaml"
    with tempfile.TemporaryDirectory() as folder, Kubelet(f"{folder}/device-plugins") as kubelet:
        flags = ("--device-plugin", "--kubelet", str(kubelet.folder), "--metrics", "127.0.0.1:0")
        agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags)
        ctl = Ctl(agent.shim())
        ctl.plugin.policy.write_text(POLICY)
        agent.start()
        try:
            kubelet.wait_resource("macvtap.network.kubevirt.io/data")
            agent.said("registered with the kubelet")
            settings.write_text(
                f"{{devicePlugin: true, kubelet: {kubelet.folder}, metrics: '127.0.0.1:{agent.port}', health: ''}}"
            )
            assert check not in wrong(ctl, "--config", settings)
            lab.node.ip("link set eth1 down")
            kubelet.wait_devices(
                "macvtap.network.kubevirt.io/data", lambda now: not any(each.healthy for each in now.values())
            )
            assert "2 devices are unhealthy" in wrong(ctl, "--config", settings)[check][1]
            lab.node.ip("link set eth1 up")
            put(ctl.plugin.policy, "interfaces: [{name: q., source: {dev: eth1}}]")
            kubelet.wait_devices("macvtap.network.kubevirt.io/data", lambda now: not now)
            assert "1 of the policy's interfaces" in wrong(ctl, "--config", settings)[check][1]
            put(ctl.plugin.policy, POLICY)
            kubelet.wait_devices("macvtap.network.kubevirt.io/data", bool)
            kubelet.refuse = True
            kubelet.end_stream("macvtap.network.kubevirt.io/data")
            assert "ended its ListAndWatch" in agent.wait_for("not registered; tried again")["error"]
            assert "is not registered" in wrong(ctl, "--config", settings)[check][1]
            kubelet.restart()
            agent.wait_for("not registered; tried again")
            assert "is not registered" in wrong(ctl, "--config", settings)[check][1]
            kubelet.stop()
            severity, message, _ = wrong(ctl, "--config", settings)[check]
            assert severity == "error"
            assert "no kubelet answers" in message
        finally:
            agent.end()
        kubelet.start()
        agent.flags = ("--metrics", f"127.0.0.1:{agent.port}")
        agent.start()
        try:
            assert "without the device plugin" in wrong(ctl, "--config", settings)[check][1]
        finally:
            agent.end()


@contextmanager
def answering(document: dict[str, Any], status: int, lab: Lab) -> Iterator[int]:
    """An agent's health, as a test wants it, in the node's namespace."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: object) -> None: ...

    server = lab.node.call(lambda: http.server.HTTPServer(("127.0.0.1", 0), Answer))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
