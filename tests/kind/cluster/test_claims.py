"""Resource claims on two workers. The tests follow each other: the last one uninstalls the agent.

tests/cluster/test_claims.py has what one node shows.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from cni.config.claim import DRIVER
from lab.kubernetes.client import KUBECTL_PAUSE
from lab.process import LabError, wait_for
from tests.cluster.conftest import NAMESPACE
from tests.cluster.test_claims import device_class, template
from tests.kind.cluster.conftest import INTERFACE, NETWORK, peer
from tests.kind.conftest import records
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from tests.kind.cluster.conftest import Site

NARROW = "narrow"
"""An interface with one device a node."""
_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a file


class Claims:
    """The agents of the workers with dra, and the pods with claims."""

    def __init__(self, site: Site) -> None:
        self.site, self.kind = site, site.kind

    def registered(self) -> None:
        """Waits until each worker's kubelet has the driver: it tries a pod without it again after a minute only."""
        for node in self.site.workers:
            logs = ("-n", NAMESPACE, "logs", self.agent(node), "-c", "agent")
            wait_for(
                lambda logs=logs: "the driver is registered" in self.kind.kubectl(*logs, check=False),  # type: ignore[misc]
                lambda node=node: f"no driver is registered on {node}",  # type: ignore[misc]
                pause=KUBECTL_PAUSE,
            )

    def agent(self, node: str) -> str:
        """The name of the agent's pod on a node."""
        [found] = self.pods(
            "app.kubernetes.io/name=vmtap", NAMESPACE, f"--field-selector=spec.nodeName={node}"
        )
        return str(found["metadata"]["name"])

    def pods(self, label: str, namespace: str = "default", *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.kind.get("-n", namespace, "pods", "-l", label, *words)["items"]
        return found

    def nodes(self, label: str) -> dict[str, str]:
        """Node → the name of the pod with the label that is on it."""
        return {each["spec"]["nodeName"]: each["metadata"]["name"] for each in self.pods(label)}

    def node(self, pod: str) -> str:
        return str(self.kind.get("pod", pod)["spec"]["nodeName"])

    def ready(self, app: str, number: int = 1) -> None:
        """Waits until that many pods with the label are ready, and there are no others.

        A kubelet may know of a pod before the API server's Node authorizer does, and be refused the claim. It tries
        again after a minute or two, or when the pod changes.
        """

        def look() -> bool:
            found = self.pods(f"app={app}")
            if len([each for each in found if _is_ready(each)]) == len(found) == number:
                return True
            changed = f"looked={time.monotonic_ns()}"
            self.kind.kubectl("annotate", "pods", "-l", f"app={app}", "--overwrite", changed, check=False)
            return False

        wait_for(look, lambda: f"{app} is not ready\n{self.kind.story()}", pause=1)

    def mac(self, pod: str) -> str:
        """By the status of the pod's claim, which is reported when the pod is attached."""
        [name] = [
            each["resourceClaimName"] for each in self.kind.get("pod", pod)["status"]["resourceClaimStatuses"]
        ]
        path = "{.status.devices[0].networkData.hardwareAddress}"
        self.kind.wait(f"resourceclaim/{name}", f"jsonpath={path}")
        [device] = self.kind.get("resourceclaim", name)["status"]["devices"]
        assert device["pool"] == self.node(pod)
        return str(device["networkData"]["hardwareAddress"])

    def files(self, node: str) -> list[str]:
        """What claims have on a node."""
        folders = "/run/vmtap/claims /run/vmtap/attachments /run/vmtap/metadata /run/cdi"
        return self.kind.on_node(node, f"find {folders} ! -type d").split()

    def rolled_out(self) -> None:
        """The Deployment of test_pods_of_a_deployment_reach_each_other, whose pods then exchange frames."""
        self.ready("vms", 2)
        for pod in self.nodes("app=vms").values():
            self.site.more_traffic(f"pod/{pod}")


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


@pytest.fixture(scope="module")
def claims(site: Site) -> Claims:
    """The control plane has no agent: the only tolerations are a DaemonSet's."""
    interfaces = [{**INTERFACE, "capacity": 2}, {**INTERFACE, "name": NARROW, "capacity": 1}]
    site.install(interfaces=interfaces, dra={"enabled": True}, agent={"tolerations": []})
    made = Claims(site)
    made.registered()
    made.kind.apply(
        *(device_class(name, f'mine.interface == "{name}"') for name in (NETWORK, NARROW)),
        *(template(name, name, {"ifname": "net1", "mode": "bridge"}) for name in (NETWORK, NARROW)),
    )
    return made


def claiming(interface: str, *command: str) -> dict[str, Any]:
    """The spec of a pod with a claim. Without a command it is a peer."""
    spec = peer("ask", claims=[{"name": "net"}])
    spec["resourceClaims"] = [{"name": "net", "resourceClaimTemplateName": interface}]
    if command:
        spec["containers"][0]["command"] = command
    return spec


def pod(name: str, interface: str) -> dict[str, Any]:
    spec = claiming(interface, "sleep", "infinity")
    metadata = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def workload(kind: str, name: str, replicas: int, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A Deployment, for example, whose pods have the label app=NAME."""
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": spec}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template, **more},
    }


def test_each_worker_has_a_pool_of_its_own(claims: Claims) -> None:
    found = {each["spec"]["nodeName"]: each for each in claims.kind.get("resourceslices")["items"]}
    assert sorted(found) == claims.site.workers
    for node, each in found.items():
        pool, [owner] = each["spec"]["pool"], each["metadata"]["ownerReferences"]
        assert (each["spec"]["driver"], pool["name"], pool["resourceSliceCount"]) == (DRIVER, node, 1)
        assert (owner["kind"], owner["name"]) == ("Node", node)
        names = [device["name"] for device in each["spec"]["devices"]]
        assert names == [f"{NETWORK}-0", f"{NETWORK}-1", f"{NARROW}-0"]


def test_pods_of_a_deployment_reach_each_other(claims: Claims) -> None:
    spec = claiming(NETWORK)
    term = {"labelSelector": {"matchLabels": {"app": "vms"}}, "topologyKey": "kubernetes.io/hostname"}
    spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    claims.kind.apply(workload("Deployment", "vms", 2, spec))
    claims.rolled_out()
    found = claims.nodes("app=vms")
    assert sorted(found) == claims.site.workers
    assert len({claims.mac(pod) for pod in found.values()}) == 2


def test_a_full_node_gets_no_more_pods(claims: Claims) -> None:
    """Each node has one device: the second pod is on the other one, the third waits for any of them."""
    for name in ("first", "second"):
        claims.kind.apply(pod(name, NARROW))
        claims.ready(name)
    nodes = {name: claims.node(name) for name in ("first", "second")}
    assert sorted(nodes.values()) == claims.site.workers
    claims.kind.apply(pod("third", NARROW))
    claims.kind.wait(
        "pod/third", "jsonpath={.status.conditions[?(@.type=='PodScheduled')].reason}=Unschedulable"
    )
    [condition] = [
        each
        for each in claims.kind.get("pod", "third")["status"]["conditions"]
        if each["type"] == "PodScheduled"
    ]
    assert "2 cannot allocate all claims" in condition["message"]
    claims.kind.kubectl("delete", "pod", "second", f"--timeout={LIMIT}s")
    claims.ready("third")
    assert claims.node("third") == nodes["second"]
    claims.kind.kubectl("delete", "pod", "first", "third", f"--timeout={LIMIT}s")


def test_an_agent_does_not_write_the_slices_of_another_node(claims: Claims) -> None:
    """With the token that the agent of a node has."""
    kubectl = claims.kind.kubectl
    own, other = claims.site.workers
    slices = {each["spec"]["nodeName"]: each for each in claims.kind.get("resourceslices")["items"]}
    token = kubectl("-n", NAMESPACE, "exec", claims.agent(own), "-c", "agent", "--", "cat", _TOKEN)
    server = kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    login = ["--kubeconfig=/dev/null", f"--server={server}", "--insecure-skip-tls-verify", f"--token={token}"]

    def write(verb: str, node: str) -> str:
        document = slices[node]
        if verb == "create":
            document = {**document, "metadata": {"name": "one-more"}}
        words = (verb, "-f", "-", "--dry-run=server", *(["--validate=false"] if verb != "delete" else []))
        return kubectl(*login, *words, stdin=json.dumps(document))

    for verb in ("create", "replace", "delete"):
        assert "server dry run" in write(verb, own)
        with pytest.raises(
            LabError, match="an agent of vmtap writes the ResourceSlices of its own node only"
        ):
            write(verb, other)


def test_a_drained_node(claims: Claims) -> None:
    """A StatefulSet's pod moves to the other node with its MAC, by its name. The Deployment's waits for the first."""
    kubectl = claims.kind.kubectl
    claims.kind.apply(
        workload("StatefulSet", "vm", 1, claiming(NETWORK, "sleep", "infinity"), serviceName="vm")
    )
    claims.ready("vm")
    first, mac = claims.node("vm-0"), claims.mac("vm-0")
    kubectl("drain", first, "--ignore-daemonsets", f"--timeout={LIMIT}s")
    claims.ready("vm")
    assert claims.node("vm-0") != first
    assert claims.mac("vm-0") == mac
    assert claims.files(first) == []
    kubectl("uncordon", first)
    claims.rolled_out()
    kubectl("delete", "statefulset", "vm", "--cascade=foreground", f"--timeout={LIMIT}s")


def test_a_node_that_starts_again(claims: Claims) -> None:
    """Its /run ends. A pod with a claim has its NIC again, and its MAC, when the kubelet tries it again.

    That takes a minute, since the kubelet starts before the driver; a change of the pod makes it try at once.
    """
    node = claims.site.workers[1]
    stays, again = (claims.nodes("app=vms")[each] for each in claims.site.workers)
    mac, agent = claims.mac(again), claims.agent(node)
    claims.kind.run(["docker", "restart", node])
    count = "jsonpath={.status.containerStatuses[0].restartCount}"
    claims.kind.wait(f"pod/{agent}", f"{count}=1", "-n", NAMESPACE)
    claims.registered()
    claims.kind.kubectl("annotate", "pod", again, "test=again")
    claims.kind.wait(f"pod/{again}", f"{count}=1")
    claims.ready("vms", 2)
    claims.site.more_traffic(f"pod/{stays}")
    assert [each["mac"] for each in records(claims.kind, node)] == [mac]


def test_uninstall(claims: Claims) -> None:
    """The kubelet removes the slices half a minute after the driver has ended."""
    kubectl = claims.kind.kubectl
    kubectl("delete", "deployment", "vms", "--cascade=foreground", f"--timeout={LIMIT}s")
    kubectl("delete", "deviceclasses,resourceclaimtemplates", "--all")
    claims.site.uninstall()
    kubectl("wait", "resourceslices", "--all", "--for=delete", f"--timeout={LIMIT}s")
    claims.site.left()
