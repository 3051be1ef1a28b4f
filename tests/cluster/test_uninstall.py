"""What is left when the agent is taken from the cluster. Later tests would find none: this file is the last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.cluster.conftest import CAPACITY, NAMESPACE, pod
from tests.waiting import LIMIT, until_as_before

if TYPE_CHECKING:
    from tests.cluster.conftest import Release


def test_uninstall_waits_for_the_last_pod_and_leaves_nothing(release: Release) -> None:
    cluster = release.cluster
    release.wait_resource("dataplane", CAPACITY)
    cluster.apply(pod("last", "dataplane"))
    cluster.wait("pod/last", "condition=Ready")
    with ThreadPoolExecutor(1) as threads:
        uninstalled = threads.submit(release.uninstall)
        cluster.kubectl("-n", NAMESPACE, "wait", "daemonset/vmtap", "--for=delete", f"--timeout={LIMIT}s")
        cluster.kubectl("-n", NAMESPACE, "wait", "job/vmtap-uninstall", "--for=create", f"--timeout={LIMIT}s")
        assert len(release.records()) == 1
        cluster.kubectl("delete", "pod", "last", f"--timeout={LIMIT}s")
        uninstalled.result()
    until_as_before(release.node, release.before)
