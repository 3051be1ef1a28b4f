"""Pods that come and go while what they need does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.cluster.conftest import CAPACITY, network, pod
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from lab.kubernetes.cluster import Cluster
    from tests.cluster.conftest import Release

PODS = 30


def test_an_upgrade_fails_no_pods_add_or_del(release: Release) -> None:
    """They wait for the new agent, and no kubelet has to try again: it would say so in an event.

    The pods ask for no device: the kubelet itself has none to allocate while no agent is registered.
    """
    cluster = release.cluster
    cluster.apply(network("wire", interface="dataplane", mode="bridge"))
    before = release.traces()
    names = [f"rolled{number}" for number in range(3 * PODS)]
    with ThreadPoolExecutor(1) as threads:
        cluster.apply(pod(names[0], "wire", device=False))
        cluster.wait(f"pod/{names[0]}", "condition=Ready")
        upgraded = threads.submit(release.upgrade)
        started = 1
        while not upgraded.done() and started < len(names):
            cluster.apply(pod(names[started], "wire", device=False))
            started += 1
            if ready := _ready(cluster):
                cluster.kubectl("delete", "pod", *ready, "--wait=false")
        upgraded.result()
    for name in _staying(cluster):
        cluster.wait(f"pod/{name}", "condition=Ready")
    cluster.kubectl("delete", "pod", "--all", f"--timeout={LIMIT}s")
    release.left(before)
    assert started > 3  # it was no upgrade of a moment
    events = cluster.get("events")["items"]
    told = [each for each in events if each["involvedObject"]["name"] in names[:started]]
    assert {"Scheduled", "Killing"} <= {each["reason"] for each in told}
    assert [each["message"] for each in told if each["type"] != "Normal"] == []
    cluster.kubectl("delete", "network-attachment-definition", "wire")


def _staying(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The pods that nobody has deleted, by name."""
    pods = cluster.get("pods")["items"]
    return {each["metadata"]["name"]: each for each in pods if "deletionTimestamp" not in each["metadata"]}


def _ready(cluster: Cluster) -> list[str]:
    """Those of them that are Ready: of one whose container is just being made a kubelet says, as a warning, that it was
    interrupted, if it is deleted then."""
    return [
        name
        for name, each in _staying(cluster).items()
        if any((c["type"], c["status"]) == ("Ready", "True") for c in each["status"].get("conditions", ()))
    ]


def test_thirty_pods_while_agent_kubelet_and_containerd_come_and_go(release: Release) -> None:
    """Thirty that have a device, thirty that have none, and then all of them: at once each time."""
    cluster = release.cluster
    cluster.apply(network("wire", interface="dataplane", mode="bridge"))
    release.wait_resource("dataplane", CAPACITY)
    before = release.traces()
    cluster.apply(*(pod(f"storm{number}", "dataplane", of="storm") for number in range(PODS)))
    # A kubelet refuses a pod for good if the agent is away just when it is to have its device, and so does one that has
    # just started, if no container of that pod runs. Hence the kubelet is killed in the midst of others only.
    _wait_pods(release, "jsonpath={.status.startTime}")
    release.restart()
    _wait_pods(release, "condition=Ready")
    cluster.apply(*(pod(f"gust{number}", "wire", device=False, of="storm") for number in range(PODS)))
    until(lambda: len(release.records()) > PODS, "none of the pods without a device was attached")
    _trouble(release)
    _wait_pods(release, "condition=Ready")
    # Of a sandbox that came to nothing an attachment may be there for a moment still.
    until(lambda: len(release.records()) <= 2 * PODS, "there are more attachments than pods")
    records = release.records()
    assert len(records) == 2 * PODS
    assert len({record["ifindex"] for record in records}) == 2 * PODS
    assert len({record["mac"] for record in records}) == 2 * PODS
    with ThreadPoolExecutor(1) as threads:
        gone = threads.submit(
            cluster.kubectl, "delete", "pod", "-l", "of=storm", f"--timeout={LIMIT}s", timeout=2 * LIMIT
        )
        release.restart()
        _trouble(release)
        gone.result()
    release.left(before)
    cluster.kubectl("delete", "network-attachment-definition", "wire")


def _wait_pods(release: Release, condition: str) -> None:
    words = ("wait", "pod", "-l", "of=storm", f"--for={condition}", f"--timeout={LIMIT}s")
    release.cluster.kubectl(*words, timeout=2 * LIMIT)


def _trouble(release: Release) -> None:
    """The kubelet and containerd are killed and started again, and a new version of the agent is rolled out."""
    cluster = release.cluster
    cluster.kubelet.kill()
    cluster.containerd.kill()
    cluster.containerd.start()
    cluster.kubelet.start()  # last: it ends itself where it finds no runtime
    release.upgrade()
