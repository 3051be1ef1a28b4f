"""What is left when the agent is taken from the cluster. Later tests would find none: this file is the last."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.cluster.conftest import CAPACITY, NAMESPACE, PATIENCE, pod

if TYPE_CHECKING:
    from tests.cluster.conftest import Release


def test_uninstall_waits_for_the_last_pod_and_leaves_nothing(release: Release) -> None:
    cluster = release.cluster
    release.wait_resource("dataplane", CAPACITY)
    cluster.apply(pod("last", "dataplane"))
    cluster.wait("pod/last", "condition=Ready")
    with ThreadPoolExecutor(1) as threads:
        uninstalled = threads.submit(release.uninstall)
        cluster.kubectl("-n", NAMESPACE, "wait", "daemonset/vmtap", "--for=delete", "--timeout=180s")
        cluster.kubectl("-n", NAMESPACE, "wait", "job/vmtap-uninstall", "--for=create", "--timeout=180s")
        assert len(release.records()) == 1
        cluster.kubectl("delete", "pod", "last", "--timeout=180s")
        uninstalled.result()
    end = time.monotonic() + PATIENCE
    while (after := release.node()) != release.before and time.monotonic() < end:
        time.sleep(0.2)
    differs = {key: (was, after[key]) for key, was in release.before.items() if after[key] != was}
    assert not differs, f"before and now: {differs}"
