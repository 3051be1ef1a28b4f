"""Pods that ask for a device, up to a virtual machine."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cni.state import deviceid
from lab.assets import guest, images
from lab.runtimes import image
from tests.cluster.conftest import CAPACITY, RESOURCES, pod
from tests.runtimes.test_vm import InPod
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from tests.cluster.conftest import Release

EXAMPLE = Path(__file__).parents[2] / "deploy/examples/vm-pod.yaml"
CLAIMS = Path(__file__).parents[2] / "deploy/examples/dra"
ADDRESS, PEER = "10.77.0.5", "10.77.0.254"


def test_a_pod_gets_its_link_and_its_device(release: Release) -> None:
    release.wait_resource("dataplane", CAPACITY)
    before = release.traces()
    release.cluster.apply(pod("one", "dataplane"))
    release.cluster.wait("pod/one", "condition=Ready")
    [record] = release.records()
    inside = ["exec", "one", "--", "/bin/busybox", "sh", "-euc"]
    script = (
        "busybox cat /sys/class/net/net1/ifindex; busybox stat -c '%u:%g %a' /dev/tap*; busybox ls /dev/tap*"
    )
    index, owner, device = release.cluster.kubectl(*inside, script).splitlines()
    assert (int(index), owner, device) == (record["ifindex"], "107:107 660", f"/dev/tap{index}")
    assert int(index) in {deviceid.ifindex("dataplane", number) for number in range(CAPACITY)}
    release.cluster.kubectl("exec", "one", "--", "/bin/busybox", "sh", "-euc", f"exec 3<>/dev/tap{index}")
    release.cluster.kubectl("delete", "pod", "one", f"--timeout={LIMIT}s")
    release.left(before)


def test_one_more_than_there_are_stays_pending_and_says_why(release: Release) -> None:
    release.wait_resource("narrow", 1)
    cluster = release.cluster
    cluster.apply(pod("first", "narrow"))
    cluster.wait("pod/first", "condition=Ready")
    cluster.apply(pod("second", "narrow"))
    cluster.wait(
        "pod/second", "jsonpath={.status.conditions[?(@.type=='PodScheduled')].reason}=Unschedulable"
    )
    [second] = cluster.get("pods", "--field-selector=metadata.name=second")["items"]
    assert second["status"]["phase"] == "Pending"
    assert f"Insufficient {RESOURCES}/narrow" in json.dumps(second["status"]["conditions"])
    cluster.kubectl("delete", "pod", "first", f"--timeout={LIMIT}s")
    cluster.wait("pod/second", "condition=Ready")
    cluster.kubectl("delete", "pod", "second", f"--timeout={LIMIT}s")


@pytest.fixture(scope="module")
def shared(release: Release) -> Path:
    """A folder of the node with the guest's files in it, and one for the channel to it."""
    path = release.cluster.machine.path("/run/lab")
    for name in ("guest", "channel"):
        (path / name).mkdir()
    shutil.copy(guest.files().kernel, path / "guest/vmlinuz")
    shutil.copy(guest.files().initramfs, path / "guest/initramfs")
    (path / "channel").chmod(0o777)
    return path


@pytest.mark.vm
@pytest.mark.parametrize("route", ["device", "broker", "claim"])
def test_a_vm_boots_in_a_pod_and_talks_to_a_peer(release: Release, shared: Path, route: str) -> None:
    """The example pod in the launcher's image: on the device that its container has got, by the broker, by a claim.

    The last one is a Deployment's, and so has a claim of the template's.
    """
    cluster = release.cluster
    release.install(broker={"enabled": route == "broker"}, dra={"enabled": route == "claim"})
    release.wait_resource(
        "dataplane", CAPACITY
    )  # a kubelet refuses a pod for good whose device nobody offers just now
    before = release.traces()
    document = _vm(CLAIMS / "vm-pod.yaml" if route == "claim" else EXAMPLE)
    if route == "device":
        _on_its_device(document["spec"])
    if route == "claim":
        for file in ("deviceclass", "claimtemplate"):
            cluster.kubectl("apply", "-f", "-", stdin=(CLAIMS / f"{file}.yaml").read_text())
    name = document["metadata"]["name"] = f"vm-{route}"  # the kubelet keeps a pod's logs for a while
    kind, condition = "pod", "Ready"
    if route == "claim":
        kind, condition, document = "deployment", "Available", _deployment(document)
    cluster.apply(document)
    cluster.wait(f"{kind}/{name}", f"condition={condition}")
    [log] = cluster.machine.path("/var/log/pods").glob(f"default_{name}[-_]*/vm/0.log")
    with InPod(shared / "channel/channel.sock", log) as guest:
        guest.ready()
        guest.must(f"ip address add {ADDRESS}/24 dev eth0")
        assert guest.ping(PEER)
        cluster.lab.peer.run([image.BUSYBOX, "ping", "-c", "1", "-W", "20", ADDRESS])
        _unprivileged(release)
    cluster.kubectl("delete", kind, name, "--cascade=foreground", f"--timeout={LIMIT}s")
    release.left(before)
    if route == "claim":
        cluster.kubectl("delete", "deviceclass,resourceclaimtemplate", "vm-nic")
    release.install(broker={"enabled": False}, dra={"enabled": False})


def _on_its_device(spec: dict[str, Any]) -> None:
    """Its container opens the device of its limits by itself, and has nothing of the agent's."""
    [container] = spec["containers"]
    qemu = shlex.join(["qemu-system-x86_64", *container["args"]])
    script = f"""
        exec 3<>/dev/tap*
        read -r mac </sys/class/net/net1/address
        exec {qemu} -netdev tap,id=net0,fd=3 -device virtio-net-pci,netdev=net0,mac=$mac
    """
    container |= {"command": ["bash", "-euc", script], "args": []}
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "vmtap"]
    spec["volumes"] = [each for each in spec["volumes"] if each["name"] != "vmtap"]


def _vm(example: Path) -> dict[str, Any]:
    """The example's pod; its guest, and the channel to it, are in folders of the node, where the test finds them."""
    document: dict[str, Any] = yaml.safe_load(example.read_text())
    spec = document["spec"]
    [container] = spec["containers"]
    container["image"] = images.NAMES["launcher"]
    if "resourceClaims" not in spec:
        container["resources"]["limits"] = {f"{RESOURCES}/dataplane": 1}
    container["volumeMounts"].append({"name": "guest", "mountPath": "/guest", "readOnly": True})
    volumes = [each for each in spec["volumes"] if each["name"] != "channel"]
    for name in ("guest", "channel"):
        volumes.append({"name": name, "hostPath": {"path": f"/run/lab/{name}", "type": "Directory"}})
    spec["volumes"] = volumes
    return document


def _deployment(pod: dict[str, Any]) -> dict[str, Any]:
    """One of the pod, whose name and label it has."""
    metadata, labels = pod["metadata"], pod["metadata"]["labels"]
    template = {"metadata": {"labels": labels}, "spec": pod["spec"]}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


def _unprivileged(release: Release) -> None:
    """QEMU, by the kernel's account."""
    machine = release.cluster.machine
    [qemu] = [pid for pid, command in machine.processes().items() if command.startswith("qemu-system")]
    lines = machine.path(f"/proc/{qemu}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["Uid"].split() == ["107"] * 4
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
