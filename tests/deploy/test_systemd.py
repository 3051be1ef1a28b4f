"""The systemd units: systemd accepts them, the agent needs what they give it and no more, and it may be restarted.

systemd itself does not run on a test machine; what it does for a service is done here: a bounding set (setpriv), a
socket as fd 3, a place to say READY=1.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent import inpod
from tests.agent.conftest import SHIM, Shim
from tests.runner import BIN, config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns

UNITS = Path(__file__).parents[2] / "deploy/systemd"
SERVICE = (UNITS / "vmtapd.service").read_text()
CAPABILITIES = re.findall(r"CAP_(\w+)", " ".join(re.findall(r"^CapabilityBoundingSet=(.*)$", SERVICE, re.M)))
WORST = 45
"""systemd-analyze security's exposure in tenths; it was 43 when the units were written."""
STAND_IN = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""What systemd does between fork and exec (sd_listen_fds(3))."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with the path of a vmtapd that is there."""
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/vmtap/bin/vmtapd", str(BIN / "vmtapd"))
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def test_systemd_understands_every_line(units: Path) -> None:
    done = _analyze("verify", "--man=no", units / "vmtapd.service", units / "vmtapd.socket")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_exposure(units: Path) -> None:
    done = _analyze("security", "--offline=yes", f"--threshold={WORST}", units / "vmtapd.service")
    assert done.returncode == 0, done.stdout


def test_no_directive_brings_the_device_cgroup_back() -> None:
    """It would refuse the devices that the agent opens; each of these has it for a side effect."""
    assert not re.findall(r"^(PrivateDevices|DeviceAllow|DevicePolicy|ProtectClock)=", SERVICE, re.M)


def use(host: Host, clients: Path, *, broker: bool = True) -> list[str]:
    """Ask for everything that the agent does for a runtime, and for a launcher; what was refused."""
    plugin = replace(host.plugin, cni_path=str(clients))
    leases = {"type": "host-local", "dataDir": str(host.run / "leases"), "subnet": "10.77.0.0/24"}
    configs = [
        config(source="eth1", mode="vepa", owner=1000, group=1000, queues=2, ipam=leases),
        config(source="br0", mode="pepa", device="tap", owner=1000),
        config(device="tap", addressing="link", ipam=leases),
        config(source="eth1", mode="bridge"),
    ]
    refused = []
    for number, conf in enumerate(configs):
        pod = host.lab.pod()
        key: dict[str, Any] = {"netns": pod, "container": f"c{number}"}
        added = plugin("ADD", conf, **key)
        answers = [added]
        if added.status == 0:
            if pod.links()["net1"]["linkinfo"]["info_data"].get("mode", "vepa") != "vepa":
                refused.append("the agent does not wait for the guest")
            refused += launch(host, pod) if broker else []
            answers.append(plugin("CHECK", {**conf, "prevResult": added.document}, **key))
        answers.append(plugin("DEL", conf, **key))
        refused += [answer.stderr for answer in answers if answer.status]
    return refused


def launch(host: Host, pod: Netns) -> list[str]:
    """Ask the broker, as an unprivileged launcher in that pod; what was refused."""
    code = (
        "import sys; from cni.launcher import broker_client; "
        "broker_client.ask(sys.argv[1], ifnames=[], queues=None, shared=False, open=True)"
    )
    program = [sys.executable, "-c", code, f"{inpod.MOUNTED}/broker.sock"]
    done = subprocess.run(
        inpod.argv(pod.path, host.run / "launcher", program),
        env={**os.environ, "PYTHONPATH": str(inpod.ROOT)},
        cwd=inpod.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    return [done.stderr] if done.returncode else []


def test_the_bounding_set_is_enough(host: Host, reference_plugins: Path) -> None:
    with host.agent(CAPABILITIES):
        assert use(host, reference_plugins) == []
        assert host.plugin.leftovers() == []


@pytest.mark.parametrize("needless", CAPABILITIES)
def test_each_capability_is_needed(host: Host, reference_plugins: Path, needless: str) -> None:
    with host.agent([name for name in CAPABILITIES if name != needless]):
        assert use(host, reference_plugins) != []


def test_a_restart_loses_no_request(host: Host) -> None:
    """systemd's socket stays open: who asks while no agent runs is answered by the next one."""
    pod = host.lab.pod()
    conf = config(source="eth1", mode="bridge")
    with host.agent(CAPABILITIES) as first:
        host.plugin("ADD", conf, netns=pod).ok()
        first.send_signal(signal.SIGTERM)
        host.hear(first, b"STOPPING=1")
        assert first.wait(LIMIT) == 0
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.connect(host.socket.getsockname())  # refused, if the agent had shut it down
    asked = subprocess.Popen(
        host.plugin.argv(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**host.plugin.environment("DEL", pod), "CNI_COMMAND": "DEL"},
    )
    assert asked.stdin
    asked.stdin.write(json.dumps(conf).encode())
    asked.stdin.close()
    with host.agent(CAPABILITIES):
        assert asked.wait(LIMIT) == 0
        assert asked.stdout
        asked.stdout.close()
        assert host.plugin.leftovers() == []
        assert not list((host.run / "pending").glob("*"))


class Host:
    """A node with the agent on it, as systemd would run it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.run = folder / "run"
        (self.run / "agent").mkdir(parents=True, mode=0o700)
        self.run.chmod(0o700)
        self.policy = folder / "interfaces.yaml"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(str(self.run / "agent/cni.sock"))
        self.socket.listen()
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))
        self.plugin = Shim(
            node=lab.node,
            state=self.run,
            policy=self.policy,
            executable=str(SHIM),
            env={"VMTAP_RUN": str(self.run)},
        )

    @contextmanager
    def agent(self, capabilities: list[str]) -> Iterator[subprocess.Popen[str]]:
        """It has said READY=1; killed at the end, if it has not ended by then."""
        bounds = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
        agent: list[str | os.PathLike[str]] = [
            sys.executable,
            "-m",
            "cni.agent",
            "--run",
            self.run,
            "--policy",
            self.policy,
            "--metrics",
            "",
            "--health",
            "",
        ]
        argv = self.lab.node.argv(["setpriv", "--bounding-set", bounds, "--no-new-privs", *agent])
        number = self.socket.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", STAND_IN, str(number), *argv],
            pass_fds=[number],
            env={**os.environ, "NOTIFY_SOCKET": self.notified.getsockname()},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self.hear(process, b"READY=1")
            yield process
        finally:
            process.kill()
            process.communicate()

    def hear(self, process: subprocess.Popen[str], word: bytes) -> None:
        """The agent says that next; fails the test if it ends instead."""
        ended = os.pidfd_open(process.pid)
        try:
            ready, _, _ = select.select([self.notified.fileno(), ended], [], [], 60)
        finally:
            os.close(ended)
        if self.notified.fileno() not in ready:
            process.kill()
            pytest.fail(f"the agent did not say {word!r}: {process.communicate()[1]}")
        assert self.notified.recv(100) == word

    def close(self) -> None:
        self.socket.close()
        self.notified.close()


@pytest.fixture
def host(lab: Lab, tmp_path: Path) -> Iterator[Host]:
    made = Host(lab, tmp_path)
    yield made
    made.close()


def _analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.fail("systemd-analyze is missing: lab/setup test installs it")
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=LIMIT
    )
