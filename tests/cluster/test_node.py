"""The cluster itself: what the other tests stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.cluster.conftest import pod
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.kubernetes.cluster import Cluster


def test_a_pod_runs_and_goes(cluster: Cluster) -> None:
    cluster.apply(pod("plain"))
    cluster.wait("pod/plain", "condition=Ready")
    said = cluster.kubectl("exec", "plain", "--", "/bin/busybox", "ip", "-o", "address", "show", "eth0")
    assert "inet 10.88." in said
    cluster.kubectl("delete", "pod", "plain", f"--timeout={LIMIT}s")
    assert cluster.get("pods")["items"] == []


def test_kubelet_and_containerd_are_killed_and_started_again(cluster: Cluster) -> None:
    cluster.apply(pod("stays"))
    cluster.wait("pod/stays", "condition=Ready")
    cluster.kubelet.kill()
    cluster.containerd.kill()
    cluster.containerd.start()
    cluster.kubelet.start()
    cluster.apply(pod("later"))
    cluster.wait("pod/later", "condition=Ready")
    [first] = cluster.get("pods", "--field-selector=metadata.name=stays")["items"]
    assert first["status"]["containerStatuses"][0]["restartCount"] == 0
    cluster.kubectl("delete", "pod", "stays", "later", f"--timeout={LIMIT}s")
