"""What vmtapctl shows of resource claims, and what doctor finds of them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.agent.dra import registration_pb2 as registry  # sets what gRPC reads
from cni.state import cdi, lock

# isort: split
import grpc

from cni.agent.dra import registration_pb2_grpc as registry_services
from tests.ctl.conftest import Ctl
from tests.ctl.test_doctor import answering
from tests.unit.agent.nri.runtime import Runtime
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from cni.state.claims import Claim
    from lab.wire import Lab
    from tests.agent.claims.conftest import Node

GOOD: dict[str, Any] = {
    "reasons": {},  # of the page /readyz
    "hook": "",
    "kubelet": "/var/lib/kubelet",
    "registered": 1764438000.0,
    "refused": "",
    "published": 1764438001.0,
    "error": "",
    "devices": 64,
    "connected": True,
    "nri": "/var/run/nri/nri.sock",
    "nriError": "",
}


class Doctor:
    """vmtapctl on the node of claims. Findings: of claims alone, as (severity, check, message and next step)."""

    def __init__(self, node: Node) -> None:
        self.ctl = Ctl(node.agent.shim())
        self.node = node
        self._file = node.folder / "agent.yaml"
        self.write()

    def write(self, health: str = "", **fields: object) -> None:
        """The agent's file."""
        settings = {"health": health, "metrics": "", "cdi": str(self.node.folder / "cdi"), **fields}
        groups = self.node.folder / "cgroup"
        groups.mkdir(exist_ok=True)
        self._file.write_text(json.dumps({**settings, "cgroup": str(groups)}))

    def __call__(self) -> list[tuple[str, str, str]]:
        done = self.ctl("doctor", "--json", "--config", self._file, status=None)
        return [
            (each["severity"], each["check"], f"{each['message']} → {each['nextStep']}")
            for each in json.loads(done.stdout)["findings"]
            if each["check"].startswith(("resource claims", "claim "))
        ]

    def one(self) -> tuple[str, str, str]:
        """The finding that is not ok."""
        found = [each for each in self() if each[0] != "ok"]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def doctor(node: Node) -> Doctor:
    return Doctor(node)


def grouped(node: Node, *uids: str) -> None:
    """Let the node have control groups of pods with these UIDs alone."""
    for uid in uids:
        (node.folder / f"cgroup/kubepods/pod{uid}").mkdir(parents=True)


def spec(node: Node, claim: Claim) -> Path:
    return Path(cdi.claim_path(str(node.folder / "cdi"), claim.uid))


def test_an_attachment_shows_its_claim(node: Node, lab: Lab) -> None:
    ctl, pod, claim = Ctl(node.agent.shim()), lab.pod(), node.prepare("vm", "fast")
    node.hook(claim, pod).ok()
    [found] = ctl.json("list")["attachments"]
    request = {"namespace": "vms", "name": "vm-nic", "uid": claim.uid, "request": "fast"}
    assert found["claim"] == request
    for command in (["list"], ["show", "vms/vm-nic"], ["show", "vm-nic"], ["tree"]):
        assert "vms/vm-nic (fast)" in ctl(*command).stdout
    assert "pod vms/vm  claim vms/vm-nic (fast)" in ctl("tree").stdout
    node.claims.remove(claim.uid)
    assert ctl.json("list")["attachments"][0]["claim"] is None
    assert "CLAIM" not in ctl("list").stdout


def test_a_file_that_is_no_claim_is_left_to_doctor(node: Node, doctor: Doctor) -> None:
    claim = node.prepare()
    node.agent.end(signal.SIGKILL)  # it would set the file aside
    path = node.agent.run / f"claims/{claim.uid}.json"
    path.write_text("{")
    doctor.ctl("list")
    assert path.read_text() == "{"
    assert doctor.one()[:2] == ("warning", "resource claims")


def test_nothing_of_claims_where_there_are_none(doctor: Doctor) -> None:
    assert doctor() == []


def test_what_is_in_order(node: Node, lab: Lab, doctor: Doctor) -> None:
    node.hook(node.prepare(), lab.pod()).ok()
    with answering(GOOD | {"hook": str(node.hook_path)}, 200, lab) as port:
        doctor.write(f"127.0.0.1:{port}")
        found = doctor()
    assert {severity for severity, _, _ in found} == {"ok"}
    text = " ".join(message for _, _, message in found)
    for words in ("registered the driver at 20", "64 devices", "nri.sock is connected", "1 prepared"):
        assert words in text


@pytest.mark.parametrize(
    ("state", "severity", "words"),
    [
        ({"registered": 0.0}, "error", "/var/lib/kubelet/plugins_registry: no claim is prepared"),
        ({"registered": 0.0, "refused": "no such API"}, "error", "refuses the driver: no such API"),
        ({"published": 0.0}, "error", "slices are not published, so no claim"),
        ({"published": 0.0, "error": "403: no"}, "error", "of this node: 403: no → see that the API server"),
        ({"error": "it is away"}, "warning", "and cannot be now: it is away"),
        ({"devices": 0}, "warning", "the slices have no device"),
        ({"connected": False}, "warning", "NRI at /var/run/nri/nri.sock is not connected; the hook attaches"),
        (
            {"connected": False, "nriError": "No such file"},
            "warning",
            "not connected: No such file; the hook",
        ),
        ({"hook": "/nowhere/vmtap-hook"}, "error", "vmtapctl install --as vmtap-hook --bin-dir /nowhere"),
        ({"hook": "/etc/passwd"}, "error", "/etc/passwd is not executable"),
    ],
)
def test_the_driver(lab: Lab, doctor: Doctor, state: dict[str, Any], severity: str, words: str) -> None:
    with answering(GOOD | {"hook": str(doctor.node.hook_path)} | state, 200, lab) as port:
        doctor.write(f"127.0.0.1:{port}")
        found = doctor.one()
    assert found[:2] == (severity, "resource claims")
    assert words in found[2]


def test_an_agent_without_the_driver(node: Node, lab: Lab, doctor: Doctor) -> None:
    with answering({"reasons": {}}, 404, lab) as port:
        doctor.write(f"127.0.0.1:{port}")
        assert doctor() == []
        doctor.write(f"127.0.0.1:{port}", dra=True)
        assert "runs without dra, which its file requests" in doctor.one()[2]
        doctor.write(f"127.0.0.1:{port}")
        node.prepare()
        assert "1 claims are prepared" in doctor.one()[2]


def test_files_without_each_other(node: Node, doctor: Doctor) -> None:
    claim, path = node.prepare(), f"{node.agent.run}/lock"
    written = spec(node, claim).read_bytes()
    spec(node, claim).unlink()
    severity, check, text = doctor.one()
    assert (severity, check) == ("error", "claim vms/vm-nic")
    assert f"{spec(node, claim)} is missing: no container of pod vms/vm can be created" in text
    with lock.held(path, f"claim/{claim.uid}"):
        assert [each for each in doctor() if each[0] != "ok"] == []
    spec(node, claim).write_bytes(written)
    node.claims.remove(claim.uid)
    assert doctor.one() == (
        "warning",
        "resource claims",
        f"{spec(node, claim)} is of a claim that is not prepared → remove it",
    )
    with lock.held(path, f"claim/{claim.uid}"):
        assert doctor() == []


def test_the_hook_that_a_claims_spec_names(node: Node, doctor: Doctor) -> None:
    node.prepare()
    assert [each[0] for each in doctor()] == ["ok"]
    node.hook_path.unlink()
    assert f"the hook {node.hook_path} cannot be executed" in doctor.one()[2]


def test_a_claim_whose_pod_has_gone(node: Node, doctor: Doctor) -> None:
    claim = node.prepare()
    uid = "11111111-2222-3333-4444-555555555555"
    assert [each[0] for each in doctor()] == ["ok"]  # no pod's group is seen: who knows
    grouped(node, uid)
    severity, check, text = doctor.one()
    assert (severity, check) == ("warning", "claim vms/vm-nic")
    assert "pod vms/vm (uid-vm) has gone" in text
    assert f"remove {spec(node, claim)} and {node.agent.run}/claims/{claim.uid}.json" in text
    grouped(node, "uid-vm")
    assert [each[0] for each in doctor()] == ["ok"]


def test_a_claim_that_is_not_attached_for_long(node: Node, lab: Lab, doctor: Doctor) -> None:
    claim = node.prepare("vm", "data", "backup")
    assert [each[0] for each in doctor()] == ["ok"]
    assert "is reserved for" not in doctor.ctl("doctor", status=None).stdout  # its indexes are the claim's
    path = node.agent.run / f"claims/{claim.uid}.json"
    os.utime(path, (0, time.time() - 700))
    severity, check, text = doctor.one()
    assert (severity, check) == ("warning", "claim vms/vm-nic")
    assert "data, backup is not attached → kubectl -n vms describe pod vm" in text
    node.hook(claim, lab.pod()).ok()
    assert [each[0] for each in doctor()] == ["ok"]


def test_an_agents_own_page(node: Node, doctor: Doctor) -> None:
    """The kubelet registers the driver, the runtime accepts the plugin, and there is no API server."""
    node.agent.end(signal.SIGKILL)
    node.agent.flags += ("--health", "127.0.0.1:0")
    node.agent.start()
    port = next(line["port"] for line in node.agent.log if line["msg"] == "health")
    doctor.write(f"127.0.0.1:{port}")
    flags = dict(each.split("=", 1) for each in node.agent.flags if "=" in each)
    sockets = Path(flags["--kubelet"]).parent / "plugins_registry"

    def text() -> str:
        return " ".join(f"{severity}: {message}" for severity, _, message in doctor())

    with Runtime(node.nri) as runtime, runtime.accept() as plugin:
        plugin.connected()
        until(
            text,
            "the state is not shown",
            lambda now: all(
                words in now
                for words in (
                    "error: the kubelet has not registered the driver",
                    "error: the slices are not published, so no claim gets a device of this node: the API server at",
                    "ok: the runtime's NRI at",
                )
            ),
        )
        [path] = sockets.glob("*-reg.sock")
        options = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost"))
        with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
            stub = registry_services.RegistrationStub(channel)
            stub.NotifyRegistrationStatus(registry.RegistrationStatus(error="no"), timeout=LIMIT)
            until(lambda: "the kubelet refuses the driver: no" in text(), "the refusal is not shown")
            stub.NotifyRegistrationStatus(registry.RegistrationStatus(plugin_registered=True), timeout=LIMIT)
            until(lambda: "ok: the kubelet registered the driver at 20" in text(), "it is not shown")
