"""Everything at once: thirty pods, while all that they need is ended and started again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.cluster.conftest import CAPACITY, pod

if TYPE_CHECKING:
    from tests.cluster.conftest import Release

PODS = 30


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
