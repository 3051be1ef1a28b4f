"""No pod reaches another pod's macvtap by a device node of its own, under a real kubelet and containerd."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cni.state.minors import Minors
from lab.kubernetes.cluster import PLUGINS
from tests.cluster.conftest import CAPACITY, RESOURCES, RUN, network, pod
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.kubernetes.cluster import Cluster
    from tests.cluster.conftest import Release

NODE = "busybox stat -c '0x%t 0x%T' /dev/tap*"
LINK = "busybox cat /sys/class/net/net1/macvtap/tap*/dev"


def inside(cluster: Cluster, name: str, script: str) -> str:
    """The output of a script in the pod."""
    return cluster.kubectl("exec", name, "--", "/bin/busybox", "sh", "-euc", script).strip()


def node_of(cluster: Cluster, name: str) -> str:
    """major:minor of the device node that the pod's container has."""
    major, minor = (int(word, 16) for word in inside(cluster, name, NODE).split())
    return f"{major}:{minor}"


def record_of(release: Release, name: str) -> dict[str, Any]:
    [record] = [each for each in release.records() if f"K8S_POD_NAME={name};" in f"{each['args']};"]
    return record


def delete_own_link(release: Release, name: str) -> None:
    inside(release.cluster, name, "busybox ip link delete net1")


def end(release: Release, name: str) -> None:
    """DEL, as no runtime calls it while the container runs."""
    record = record_of(release, name)
    variables = {
        "CNI_COMMAND": "DEL",
        "CNI_CONTAINERID": record["container_id"],
        "CNI_NETNS": record["netns"],
        "CNI_IFNAME": record["ifname"],
        "CNI_ARGS": record["args"],
        "CNI_PATH": PLUGINS,
    }
    config = {"cniVersion": "1.0.0", "name": record["network"], "type": "vmtap", "mode": "bridge"}
    words = ["env", *(f"{key}={value}" for key, value in variables.items()), f"{PLUGINS}/vmtap"]
    release.cluster.run(words, stdin=json.dumps(config))


@pytest.fixture
def attacker(release: Release) -> Iterator[str]:
    """A pod that has a device, and may change the links of its namespace."""
    release.wait_resource("dataplane", CAPACITY)
    before = release.traces()
    document = pod("attacker", "dataplane")
    [container] = document["spec"]["containers"]
    container["securityContext"] = {"capabilities": {"add": ["NET_ADMIN"]}}
    release.cluster.apply(document)
    release.cluster.wait("pod/attacker", "condition=Ready")
    yield "attacker"
    release.cluster.kubectl("delete", "pod", "--all", f"--timeout={LIMIT}s")
    release.left(before)
    entries = Minors(str(release.cluster.machine.path(RUN)))
    until(lambda: entries.all() == {}, "the minors of pods that have ended are still kept")


@pytest.mark.parametrize("gone", [delete_own_link, end])
def test_a_minor_goes_to_no_other_pod_while_a_container_has_its_node(
    release: Release, attacker: str, gone: Callable[[Release, str], None]
) -> None:
    cluster = release.cluster
    number = node_of(cluster, attacker)
    assert inside(cluster, attacker, LINK) == number
    gone(release, attacker)
    assert inside(cluster, attacker, "busybox ls /sys/class/net").split() == ["eth0", "lo"]
    assert node_of(cluster, attacker) == number
    cluster.apply(network("wire", interface="dataplane", mode="bridge"))
    cluster.apply(pod("victim", "dataplane"), pod("other", "wire", device=False))
    for name in ("victim", "other"):
        cluster.wait(f"pod/{name}", "condition=Ready")
        assert inside(cluster, name, LINK) != number
    assert node_of(cluster, "victim") == inside(cluster, "victim", LINK)
    cluster.kubectl("delete", "network-attachment-definition", "wire")


def test_a_device_id_in_a_network_config_takes_no_device(release: Release, attacker: str) -> None:
    """Neither one that the kubelet has allocated to another pod, nor one that it will allocate to the next."""
    cluster = release.cluster
    held = record_of(release, attacker)["device_id"]
    free = next(f"dataplaneMvp{number}" for number in range(CAPACITY) if f"dataplaneMvp{number}" != held)
    for name, id in (("held", held), ("free", free)):
        stolen = network(name, mode="bridge", deviceID=id)
        stolen["metadata"]["annotations"] = {}
        cluster.apply(stolen, pod(name, name, device=False))
        refusal = f"the kubelet has not allocated it to pod default/{name}"
        until(
            lambda name=name, refusal=refusal: refusal in _events(cluster, name),  # type: ignore[misc]
            f"{name} was not refused",
        )
    assert [each["device_id"] for each in release.records()] == [held]
    cluster.apply(pod("next", "dataplane"))
    cluster.wait("pod/next", "condition=Ready")
    assert record_of(release, "next")["device_id"] == free
    cluster.kubectl("delete", "network-attachment-definition", "held", "free")


def test_a_container_restarts_in_its_pod_with_its_device(release: Release, attacker: str) -> None:
    """The kubelet does not call Allocate for it, which would refuse a device that an attachment holds."""
    cluster = release.cluster
    number = node_of(cluster, attacker)
    kill = ["/bin/busybox", "sh", "-euc", "kill -TERM 1"]
    cluster.kubectl("exec", attacker, "--", *kill, check=False)  # it may end with the container, by SIGKILL
    cluster.wait(f"pod/{attacker}", "jsonpath={.status.containerStatuses[0].restartCount}=1")
    cluster.wait(f"pod/{attacker}", "condition=Ready")
    assert node_of(cluster, attacker) == inside(cluster, attacker, LINK) == number
    assert RESOURCES


def _events(cluster: Cluster, name: str) -> str:
    events = cluster.get("events", f"--field-selector=involvedObject.name={name}")["items"]
    return "\n".join(each["message"] for each in events)
