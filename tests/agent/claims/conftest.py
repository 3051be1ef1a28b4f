"""Prepared claims on the lab's node: the files that Prepare leaves, the hook as a runtime runs it, and NRI."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.agent.nri import nri_pb2 as api
from cni.state import cdi
from cni.state.claims import Claim, ClaimDevice, Claims
from cni.state.store import Store
from tests.agent.conftest import SHIM, Agent
from tests.runner import pod_args
from tests.unit.agent.nri.runtime import Plugin, Runtime
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cni.state.record import Record
    from lab.wire import Lab, Netns

WIRE = {"source": "eth1", "mode": "bridge", "device": "macvtap", "owner": 0, "group": 0}


@dataclass(frozen=True)
class Hooked:
    """What an execution of the hook left."""

    status: int
    stdout: str
    stderr: str

    def ok(self) -> None:
        """Fails the test if the container would not be started."""
        assert (self.status, self.stdout, self.stderr) == (0, "", "")

    def refused(self, *words: str) -> None:
        """Fails the test unless the container fails, with each of the words in the message."""
        assert self.status != 0
        assert not self.stdout
        assert len(self.stderr.splitlines()) == 1
        for word in words:
            assert word in self.stderr, self.stderr


@dataclass
class Node:
    """An agent with claims, and what a kubelet and a runtime do on its node."""

    lab: Lab
    folder: Path
    agent: Agent

    def __post_init__(self) -> None:
        self.hook_path = self.folder / "bin/vmtap-hook"
        self.hook_path.parent.mkdir()
        self.hook_path.symlink_to(SHIM)
        self.nri = self.folder / "nri.sock"

    def policy(self, **fields: Any) -> None:
        """What may be attached from now on."""
        entry = {"name": "wire", "source": {"dev": "eth1"}, **fields}
        self.agent.policy.write_text(json.dumps({"interfaces": [entry]}))  # JSON is YAML

    @property
    def store(self) -> Store:
        """The agent's state."""
        return Store(self.agent.run)

    @property
    def claims(self) -> Claims:
        """The prepared claims."""
        return Claims(self.agent.run)

    def prepare(self, pod: str = "vm", *requests: str, **fields: Any) -> Claim:
        """What Prepare leaves of a claim for the pod of that name."""
        uid, pod_uid = str(uuid.uuid4()), f"uid-{pod}"
        args = pod_args(pod, "vms", pod_uid)
        devices = tuple(
            ClaimDevice(
                request=request,
                device=f"wire-{number}",
                pool="node",
                share="",
                ifname=f"net{number}",
                ifindex=0,
                mac=None,
                config={"cniVersion": "1.1.0", "name": f"claim-{request}", "type": "vmtap", **WIRE, **fields},
                args=args,
            )
            for number, request in enumerate(requests or ("nic",))
        )
        claim = Claim(uid, "vms", f"{pod}-nic", pod_uid, pod, devices)
        self.store.prepare()
        reserved = [
            replace(each, ifindex=self.store.reserve_ifindex(claim.attachment(each))) for each in devices
        ]
        claim = replace(claim, devices=tuple(reserved))
        self.claims.save(claim)
        cdi.write_claim(str(self.folder / "cdi"), claim, {}, str(self.hook_path), str(self.agent.run))
        return claim

    def given(self, claim: Claim) -> tuple[int, int]:
        """(major, minor) that the next container gets for the claim's first device."""
        document = json.loads(Path(cdi.claim_path(str(self.folder / "cdi"), claim.uid)).read_text())
        [made] = document["devices"][0]["containerEdits"]["deviceNodes"]
        return made["major"], made["minor"]

    def record(self, claim: Claim) -> Record | None:
        """The record of the claim's first device."""
        return self.store.load(claim.attachment(claim.devices[0]))

    def reserved(self, claim: Claim) -> bool:
        """Whether the claim still has each of its interface indexes."""
        return all(self.store.reserved_by(each.ifindex) == claim.attachment(each) for each in claim.devices)

    def device(self, claim: Claim) -> tuple[int, int] | None:
        """(major, minor) of the node's device node for the claim's first device; None without one."""
        path = Path(self.store.node(claim.devices[0].ifindex))
        if not path.exists():
            return None
        number = path.stat().st_rdev
        return os.major(number), os.minor(number)

    def link(self, claim: Claim, pod: Netns) -> tuple[int, int]:
        """(major, minor) of the link of the claim's first device in the pod."""
        device = claim.devices[0]
        path = f"/sys/class/net/{device.ifname}/macvtap/tap{device.ifindex}/dev"
        show = ["unshare", "-m", "sh", "-ec", f"mount -t sysfs none /sys; cat {path}"]
        major, minor = pod.run(show).stdout.split(":")
        return int(major), int(minor)

    def config(self, claim: Claim, *, pod: str = "", **changed: Any) -> dict[str, Any]:
        """The config.json of a container that gets the claim's devices, with the numbers that the nodes have now."""
        devices = []
        for each in claim.devices:
            path = Path(self.store.node(each.ifindex))
            if path.exists():
                number = path.stat().st_rdev
                entry = {"type": "c", "major": os.major(number), "minor": os.minor(number)}
                devices.append({"path": f"/dev/tap{each.ifindex}", **entry})
        return {
            "ociVersion": "1.0.2",
            "annotations": {"io.kubernetes.cri.sandbox-uid": pod or claim.pod_uid},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}],
                "devices": devices,
            },
            **changed,
        }

    def hook(
        self,
        claim: Claim,
        pod: Netns | None,
        config: Mapping[str, Any] | bytes | None = None,
        *,
        prefix: tuple[str, ...] = (),
        **env: str,
    ) -> Hooked:
        """Run the hook as the claim's CDI spec declares it, for a container in the pod, or in the host's namespace."""
        spec = json.loads(Path(cdi.claim_path(str(self.folder / "cdi"), claim.uid)).read_text())
        [declared] = spec["containerEdits"]["hooks"]
        env = dict(each.split("=", 1) for each in declared.get("env", ())) | env
        bundle = self.folder / f"bundle-{uuid.uuid4()}"
        bundle.mkdir()
        text = config if isinstance(config, bytes) else json.dumps(config or self.config(claim)).encode()
        (bundle / "config.json").write_bytes(text)
        with in_pod(pod or self.lab.node) as pid:
            state = {
                "ociVersion": "1.0.2",
                "id": "c1",
                "status": "created",
                "pid": pid,
                "bundle": str(bundle),
            }
            argv = [*prefix, declared["path"], *declared["args"][1:]]
            return self._run(argv, json.dumps(state).encode(), env)

    def start(self, claim: Claim, pod: Netns) -> None:
        """Start a container in a sandbox that was made again, and create it again if the hook requires that.

        As a kubelet does. The container may have been created with the numbers of the former link, and the new one has
        another minor if a test beside this one has taken that.
        """
        first = self.hook(claim, pod)
        if first.status:
            first.refused("create the container again")
            self.hook(claim, pod).ok()

    def shim(self, uid: str, state: bytes) -> Hooked:
        """Run the hook with a container's state on stdin."""
        return self._run([str(self.hook_path), uid], state, {"VMTAP_RUN": str(self.agent.run)})

    def _run(self, argv: list[str], state: bytes, env: Mapping[str, str]) -> Hooked:
        done = subprocess.run(
            argv,
            input=state,
            env={"VMTAP_WAIT": "60", **env},
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        return Hooked(done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def in_pod(pod: Netns) -> Iterator[int]:
    """The pid of a process in the pod."""
    with pod.popen(["sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # nsenter(1) is in the namespace by then
        yield process.pid
        process.communicate(timeout=LIMIT)


def sandbox(pod: Netns, name: str = "vm", *, id: str = "s1", pid: int = 7) -> api.PodSandbox:
    """A pod's sandbox as a runtime reports it."""
    namespace = api.LinuxNamespace(type="network", path=str(pod.path))
    return api.PodSandbox(
        id=id,
        name=name,
        uid=f"uid-{name}",
        namespace="vms",
        pid=pid,
        linux=api.LinuxPodSandbox(namespaces=[namespace]),
    )


def event(kind: str, pod: Netns, name: str = "vm", **fields: Any) -> api.StateChangeEvent:
    """RUN_POD_SANDBOX or STOP_POD_SANDBOX of a pod."""
    return api.StateChangeEvent(event=kind, pod=sandbox(pod, name, **fields))


def run(plugin: Plugin, pod: Netns, name: str = "vm") -> str:
    """The runtime reports a new sandbox; the error that it gets for it."""
    return plugin.call("StateChange", event("RUN_POD_SANDBOX", pod, name)).status.message


def stop(plugin: Plugin, pod: Netns, name: str = "vm") -> str:
    """The runtime reports the sandbox's end; the error that it gets for it."""
    return plugin.call("StateChange", event("STOP_POD_SANDBOX", pod, name)).status.message


@pytest.fixture
def node(lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """With an agent that is started; nothing listens on its NRI socket."""
    # The path of a socket has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kubelet-") as kubelet:
        flags = {
            "nri": tmp_path / "nri.sock",
            "hook": tmp_path / "bin/vmtap-hook",
            "node": "node",
            "kubelet": f"{kubelet}/device-plugins",
            "cdi": tmp_path / "cdi",
        }
        agent = Agent(
            lab.node,
            tmp_path / "run",
            tmp_path / "interfaces.yaml",
            flags=("--dra", *(f"--{name}={value}" for name, value in flags.items())),
            env={"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"},
        )
        made = Node(lab, tmp_path, agent)
        made.policy()
        agent.start()
        yield made
        if agent.process:
            agent.end()


@pytest.fixture
def runtime(node: Node) -> Iterator[Runtime]:
    """Listens on the NRI socket of the agent."""
    with Runtime(node.nri) as made:
        yield made


@pytest.fixture
def plugin(runtime: Runtime) -> Iterator[Plugin]:
    """The agent, connected to the runtime."""
    with runtime.accept() as made:
        made.connected()
        yield made
