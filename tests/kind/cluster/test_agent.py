"""What a user does with the agent on a kind cluster. Each test installs it and takes it away again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.assets import images
from lab.kind.cluster import NAME
from tests.cluster.conftest import NAMESPACE
from tests.kind.cluster.conftest import ADDRESS, IMAGE, KUSTOMIZE
from tests.kind.conftest import records
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from tests.kind.cluster.conftest import Site


def test_helm_install_upgrade_under_traffic_uninstall(site: Site) -> None:
    site.install()
    site.start_pods()
    site.more_traffic()
    newer = f"{images.VERSION}x"
    site.kind.run(["docker", "tag", IMAGE, f"{IMAGE}x"])
    site.kind.run(["kind", "load", "docker-image", "--name", NAME, f"{IMAGE}x"])
    site.install(image={"tag": newer})
    assert site.more_traffic()["lost"] == 0
    site.end_pods()
    site.uninstall()
    site.left()


def test_kustomize_install_restart_of_agent_and_node_uninstall(site: Site) -> None:
    kubectl = site.kind.kubectl
    kubectl("apply", "-k", str(KUSTOMIZE / "overlays/kind"))
    site.rolled_out()
    site.start_pods()
    site.more_traffic()
    kubectl("-n", NAMESPACE, "rollout", "restart", "daemonset/vmtap")
    site.rolled_out()
    assert site.more_traffic()["lost"] == 0
    _restart_node(site)
    site.end_pods()
    kubectl("delete", "-k", str(KUSTOMIZE / "overlays/kind"), f"--timeout={LIMIT}s")
    kubectl("create", "namespace", NAMESPACE)
    kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged")
    kubectl("apply", "-k", str(KUSTOMIZE / "uninstall"))
    kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/vmtap-uninstall", f"--timeout={LIMIT}s")
    kubectl("delete", "namespace", NAMESPACE, f"--timeout={LIMIT}s")
    site.left()


def _restart_node(site: Site) -> None:
    """The node of the pod that answers: its /run and its links end, its leases and the pods' sandboxes do not.

    The kubelet fails the pod, whose device nobody offers yet. The Deployment's next one gets the address when the
    kubelet removes the old sandbox, within a minute: a DEL without a record frees the lease.
    """
    node = site.workers[1]
    [before] = records(site.kind, node)
    assert site.leases(node) == {ADDRESS: before["container_id"]}
    site.kind.run(["docker", "restart", node])
    site.kind.wait(f"node/{node}", "condition=Ready")
    site.rolled_out()
    site.more_traffic()
    [after] = until(
        lambda: records(site.kind, node), "there is no single attachment", lambda found: len(found) == 1
    )
    assert after["container_id"] != before["container_id"]
    assert site.leases(node) == {ADDRESS: after["container_id"]}
    links = site.kind.on_node(node, "ip -d -o link")
    assert "macvtap" not in links  # the only one is in the pod
