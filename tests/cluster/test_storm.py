"""Pods that come and go while what they need does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.cluster.conftest import CAPACITY, network, pod

if TYPE_CHECKING:
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
            cluster.kubectl("delete", "pod", names[started - 1], "--wait=false")
            started += 1
        upgraded.result()
    cluster.wait(f"pod/{names[started - 1]}", "condition=Ready")
    cluster.kubectl("delete", "pod", names[started - 1], "--timeout=60s")
    release.left(before)
    assert started > 3  # it was no upgrade of a moment
    events = cluster.get("events")["items"]
    told = [each for each in events if each["involvedObject"]["name"] in names[:started]]
    assert {"Scheduled", "Killing"} <= {each["reason"] for each in told}
    assert [each["message"] for each in told if each["type"] != "Normal"] == []
    cluster.kubectl("delete", "network-attachment-definition", "wire")


def test_thirty_pods_while_agent_kubelet_and_containerd_come_and_go(release: Release) -> None:
    release.wait_resource("dataplane", CAPACITY)
    before = release.traces()
    cluster = release.cluster
    with ThreadPoolExecutor(1) as threads:
        cluster.apply(*(pod(f"storm{number}", "dataplane", of="storm") for number in range(PODS)))
        started = threads.submit(
            cluster.kubectl,
            "wait",
            "pod",
            "-l",
            "of=storm",
            "--for=condition=Ready",
            "--timeout=300s",
            timeout=310,
        )
        _trouble(release)
        started.result()
        records = release.records()
        assert len(records) == PODS
        assert len({record["ifindex"] for record in records}) == PODS
        assert len({record["mac"] for record in records}) == PODS
        gone = threads.submit(
            cluster.kubectl, "delete", "pod", "-l", "of=storm", "--timeout=300s", timeout=310
        )
        _trouble(release)
        gone.result()
    release.left(before)


def _trouble(release: Release) -> None:
    cluster = release.cluster
    release.restart()
    cluster.kubelet.kill()
    cluster.containerd.kill()
    cluster.containerd.start()
    cluster.wait_containerd()
    cluster.kubelet.start()  # last: it ends itself where it finds no runtime
    release.upgrade()
