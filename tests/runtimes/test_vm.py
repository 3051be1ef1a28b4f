"""A virtual machine in a pod's container, without privilege: by the fds of the agent's broker, and by a device node."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cni.state import deviceid
from lab.guest import Conversation
from lab.kubernetes import multus
from lab.kubernetes.kubelet import Kubelet
from lab.proto import cri_pb2 as api
from lab.runtimes import image
from lab.runtimes.containerd import LOGS
from lab.runtimes.cri import Container
from tests.runtimes.conftest import RUN
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.runtimes.containerd import Containerd
    from tests.runtimes.conftest import Node

pytestmark = pytest.mark.vm

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
ADDRESS, PEER = "10.77.0.5", "10.77.0.254"
VOLUMES = "/run/lab/volumes"
"""On the node: emptyDirs, whose place a kubelet chooses."""
DEVICE_PLUGINS = Path("/run/kubelet/device-plugins")
RESOURCE = "macvtap.network.kubevirt.io/dataplane"


class InPod(Conversation):
    """A guest whose channel is a unix socket of its container."""

    def __init__(self, path: Path, log: Path) -> None:
        super().__init__()
        self._log = log
        self._socket = socket.socket(socket.AF_UNIX)

        def listens() -> bool:
            """The socket is there a moment before QEMU listens on it, or may be another QEMU's that was killed."""
            return self._socket.connect_ex(str(path)) == 0

        try:
            until(listens, "QEMU did not start")
        except AssertionError as error:
            self._socket.close()
            raise AssertionError(f"{error}{self._tail()}") from None
        self._listen(self._socket.makefile("w"), self._socket.makefile("r", errors="replace"))

    def close(self) -> None:
        """The channel; the guest ends with its container."""
        with suppress(OSError):  # the guest has ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        with suppress(OSError):  # a line that the guest did not take before it ended
            self._commands.close()
        self._socket.close()

    def _tail(self) -> str:
        return f"; it said: {self._log.read_text()[-1500:]}" if self._log.exists() else ""


class Spec:
    """A pod's spec with one container, as a kubelet reads it; a key that this does not know fails the test.

    The networks of the pod's annotation are Multus's to attach: here, the runtime's own second network stands for them.
    """

    def __init__(self, node: Node, document: dict[str, Any]) -> None:
        spec = document["spec"]
        assert spec.keys() == {
            *("automountServiceAccountToken", "securityContext", "containers", "volumes"),
            "affinity",  # the scheduler's
        }
        self.name: str = document["metadata"]["name"]
        [self._container] = spec["containers"]
        self._pod = spec["securityContext"]
        self._volumes = {each["name"]: self._volume(node, each) for each in spec["volumes"]}
        self.image: str = self._container["image"]
        self.limits: dict[str, str] = self._container["resources"].get("limits", {})

    def host_path(self, volume: str) -> str:
        return self._volumes[volume]

    def container(self) -> Container:
        given = self._container
        own = given["securityContext"]
        assert given.keys() == {
            "name", "image", "command", "args", "resources", "securityContext", "volumeMounts",
        }  # fmt: skip
        # A request is a matter of scheduling and of shares, a limit that of the device manager.
        assert given["resources"].keys() - {"requests"} <= {"limits"}
        assert self._pod.keys() == {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"}
        assert own.keys() == {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}
        assert self._pod["runAsNonRoot"] is (self._pod["runAsUser"] != 0)
        return Container(
            image=self.image,
            command=given["command"],
            args=given["args"],
            mounts=[
                api.Mount(
                    container_path=each["mountPath"],
                    host_path=self._volumes[each["name"]],
                    readonly=each.get("readOnly", False),
                )
                for each in given["volumeMounts"]
            ],
            user=self._pod["runAsUser"],
            group=self._pod["runAsGroup"],
            groups=[self._pod["fsGroup"]],
            drop=own["capabilities"]["drop"],
            no_new_privs=not own["allowPrivilegeEscalation"],
            read_only=own["readOnlyRootFilesystem"],
            seccomp=self._pod["seccompProfile"] == {"type": "RuntimeDefault"},
        )

    def _volume(self, node: Node, volume: dict[str, Any]) -> str:
        if "hostPath" in volume:
            path: str = volume["hostPath"]["path"]
            assert node.machine.path(path).is_dir() is (volume["hostPath"]["type"] == "Directory")
            return path
        assert volume["emptyDir"] == {}
        path = f"{VOLUMES}/{volume['name']}"
        folder = node.machine.path(path)
        folder.mkdir(parents=True)
        os.chown(folder, 0, self._pod["fsGroup"])
        folder.chmod(0o2777)
        return path


@pytest.fixture(params=["vm-pod.yaml"])
def spec(request: pytest.FixtureRequest, node: Node) -> Spec:
    """That of an example."""
    return Spec(node, yaml.safe_load((EXAMPLES / request.param).read_text()))


@pytest.fixture
def dataplane(node: Node) -> None:
    """The example's network."""
    node.policy({"name": "dataplane", "source": {"dev": "eth1"}, "type": "ethernet"})
    node.network("20-dataplane", {"type": "vmtap", "interface": "dataplane", "mode": "bridge"})


@pytest.fixture
def containerd(node: Node, spec: Spec, dataplane: None) -> Iterator[Containerd]:
    """With an image of the example's name that was made for the test."""
    with node.containerd() as started:
        archive = node.folder / "machine.tar"
        image.machine(archive, f"docker.io/library/{spec.image}")
        started.load(archive, f"docker.io/library/{spec.image}")
        yield started


@pytest.fixture
def kubelet(node: Node, dataplane: None) -> Iterator[Kubelet]:
    """Which knows the agent's devices; the example's network asks it for one, by a stand-in for Multus."""
    plugin = node.plugins / "multus"
    plugin.write_text(multus.script())
    plugin.chmod(0o755)
    config = {
        "type": "multus",
        "podResources": str(DEVICE_PLUGINS.parent / "pod-resources/kubelet.sock"),
        "cache": str(node.folder / "multus"),
        "networks": [{"resource": RESOURCE, "config": {"type": "vmtap", "mode": "bridge"}}],
    }
    node.network("20-dataplane", config)
    node.agent.end()
    node.agent.flags += ("--device-plugin", "--kubelet", str(DEVICE_PLUGINS))
    with Kubelet(node.machine.path(DEVICE_PLUGINS)) as started:
        node.agent.start()
        yield started
        node.agent.end()


def _processes(containerd: Containerd, container: str) -> list[dict[str, str]]:
    """/proc/PID/status of everything that runs in the container."""
    look = [
        "/bin/busybox",
        "sh",
        "-c",
        "busybox cat /proc/[0-9]*/status 2>/dev/null || :",
    ]  # one may just end
    shown = containerd.cri.exec(container, look).split("Name:\t")[1:]
    return [dict(line.split(":\t", 1) for line in f"Name:\t{each}".splitlines()) for each in shown]


def _has_qemu(containerd: Containerd, container: str) -> bool:
    return any(each["Name"].startswith("qemu-system-") for each in _processes(containerd, container))


def _unprivileged(containerd: Containerd, container: str) -> None:
    """What QEMU and all else in there is, by the kernel's account."""
    assert _has_qemu(containerd, container)
    for each in _processes(containerd, container):
        assert each["Uid"].split() == ["107"] * 4, each
        assert {int(each[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}, each
        assert (each["NoNewPrivs"], each["Seccomp"]) == ("1", "2"), each


def _works(node: Node, spec: Spec, containerd: Containerd, container: str) -> None:
    """The guest, once it has an address, and the peer reach each other; it powers off, and the container ends well."""
    log = node.machine.path(LOGS) / spec.name / "c.log"
    with InPod(node.machine.path(f"{spec.host_path('channel')}/channel.sock"), log) as guest:
        guest.ready()
        guest.must(f"ip address add {ADDRESS}/24 dev eth0")
        assert guest.ping(PEER)
        node.lab.peer.run([image.BUSYBOX, "ping", "-c", "1", "-W", "20", ADDRESS])
        _unprivileged(containerd, container)
        guest.ask("poweroff -f")
        until(lambda: containerd.cri.status(container).state == api.CONTAINER_EXITED, "QEMU still runs")
    assert containerd.cri.status(container).exit_code == 0


@pytest.mark.parametrize("spec", ["vm-pod-device.yaml"], indirect=True)
def test_from_allocate_to_a_guest_that_talks(
    node: Node, kubelet: Kubelet, spec: Spec, containerd: Containerd
) -> None:
    """What a kubelet does with a pod that has the resource in its limits, up to QEMU on the device of its answer."""
    assert spec.limits == {RESOURCE: "1"}
    before = node.traces()
    kubelet.wait_resource(RESOURCE)
    claim = kubelet.admit(RESOURCE, pod=("lab", spec.name))
    assert node.attached() == []
    [device] = claim.response.devices
    [broker] = claim.response.mounts  # brokerMount of the agent's file; this pod does not use it
    assert (broker.host_path, broker.read_only) == (str(RUN / "launcher"), True)

    pod = containerd.cri.run_pod(spec.name)
    [record] = node.records()
    number = deviceid.parse(claim.devices[0])
    assert number
    assert record["ifindex"] == deviceid.ifindex(*number)
    assert device.container_path == f"/dev/tap{record['ifindex']}"

    made = replace(
        spec.container(),
        devices=[
            api.Device(
                container_path=device.container_path,
                host_path=device.host_path,
                permissions=device.permissions,
            )
        ],
    )
    container = containerd.cri.run(pod, made)
    _works(node, spec, containerd, container)
    containerd.cri.remove_pod(pod.id)
    kubelet.release(("lab", spec.name))
    node.left(before)


def test_the_example_pod_boots_over_the_broker(node: Node, spec: Spec, containerd: Containerd) -> None:
    before = node.traces()
    pod = containerd.cri.run_pod(spec.name)
    container = containerd.cri.run(pod, spec.container())
    _works(node, spec, containerd, container)
    # Its container is started again in the same sandbox, as the pod's restartPolicy has it.
    containerd.cri.remove(container)
    again = containerd.cri.run(pod, spec.container())
    until(lambda: _has_qemu(containerd, again), "the launcher did not get the fds again")
    assert len([*node.machine.path(RUN / "holders").iterdir()]) == 1
    containerd.cri.remove_pod(pod.id)
    node.left(before)
