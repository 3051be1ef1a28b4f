"""One kind cluster for all tests of this folder, and what its nodes look like without the agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.assets import images
from lab.kind.cluster import NAME
from tests.cluster.conftest import CHART, NAMESPACE, RESOURCES, network
from tests.kind.conftest import lab
from tests.waiting import LIMIT, until, until_as_before

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.kind.cluster import Kind

KUSTOMIZE = Path(__file__).parents[3] / "deploy/kustomize"
IMAGE = images.NAMES["agent"]
NETWORK = "dataplane"
"""The policy's interface, in the overlay kind and in INTERFACE."""
CAPACITY = 16
INTERFACE = {"name": NETWORK, "source": {"dev": "eth0"}, "modes": ["bridge"], "capacity": CAPACITY}
ADDRESS = "10.99.0.5"
"""The only one that host-local has for the network, on each node."""
_PEER = Path(__file__).with_name("peer.py")
_FOLDERS = (
    "/opt/cni/bin",
    "/etc/cni/net.d",
    "/etc/vmtap",
    "/run/vmtap",
    "/var/run/cdi",
    "/run/netns",
    "/var/lib/cni",
    "/var/lib/kubelet/plugins",
    "/var/lib/kubelet/plugins_registry",
)
_LOOK = f"""
for folder in {" ".join(_FOLDERS)}; do
    if [ -e $folder ]; then find $folder ! -type d ! -name lock ! -name 'last_reserved*'; fi
done
ls -d /run/vmtap /etc/vmtap /var/lib/kubelet/device-plugins/vmtap* 2>/dev/null || true
ip -o link | cut -d: -f2 | cut -d@ -f1 | grep -v veth
ps -eo args | grep -v grep | grep vmtap || true
"""


class Site:
    """The agent in the cluster: its nodes, pods and traffic."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.nodes = kind.nodes()
        self.workers = kind.workers()
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        """What the agent, its pods and its install may leave: on each node, and in the API server."""
        kinds = (
            "clusterroles,clusterrolebindings,priorityclasses,customresourcedefinitions,namespaces,resourceslices,"
            "validatingadmissionpolicies,validatingadmissionpolicybindings"
        )
        seen: dict[str, Any] = {
            node: sorted(self.kind.on_node(node, _LOOK).split("\n")) for node in self.nodes
        }
        return {**seen, "objects": self.kind.kubectl("get", kinds, "-o", "name").split()}

    def left(self) -> None:
        """Fails the test if anything is not as before the install, after giving it a moment."""
        until_as_before(self.look, self.before)

    def install(self, **values: Any) -> None:
        """By helm, or change what is installed; returns when the agents offer devices."""
        values = {"interfaces": [INTERFACE], "image": {"tag": images.VERSION}, **values}
        words = ["vmtap", str(CHART), "--namespace", NAMESPACE, "--create-namespace", "--values", "-"]
        patience = ["--wait", f"--timeout={LIMIT}s"]
        self.kind.run(["helm", "upgrade", "--install", *words, *patience], stdin=json.dumps(values))
        self.rolled_out(values["interfaces"][0]["capacity"])

    def uninstall(self) -> None:
        """By helm, with the namespace."""
        self.kind.run(["helm", "uninstall", "vmtap", "--namespace", NAMESPACE, "--wait"])
        self.kind.kubectl("delete", "namespace", NAMESPACE, f"--timeout={LIMIT}s")

    def rolled_out(self, capacity: int = CAPACITY) -> None:
        self.kind.kubectl("-n", NAMESPACE, "rollout", "status", "daemonset/vmtap", f"--timeout={LIMIT}s")
        for node in self.workers:
            path = f"{RESOURCES}/{NETWORK}".replace(".", r"\.")
            self.kind.wait(f"node/{node}", f"jsonpath={{.status.allocatable.{path}}}={capacity}")

    def start_pods(self) -> None:
        """A pod on each of two workers, that exchange frames from now on, and have an address of host-local."""
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": "10.99.0.0/24", "rangeStart": ADDRESS, "rangeEnd": ADDRESS}]],
        }
        self.kind.apply(
            network(NETWORK, mode="bridge", ipam=ipam),
            _peer("ask", self.workers[0]),
            _peer("answer", self.workers[1]),
        )
        for name in ("ask", "answer"):
            self.kind.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={LIMIT}s")

    def end_pods(self) -> None:
        self.kind.kubectl(
            "delete", "deployment", "ask", "answer", "--cascade=foreground", f"--timeout={LIMIT}s"
        )
        self.kind.kubectl("delete", "pod", "--all", f"--timeout={LIMIT}s")
        self.kind.kubectl("delete", "network-attachment-definition", NETWORK)

    def traffic(self, of: str) -> dict[str, Any]:
        """What the pod, or the only one of a Deployment, has printed last."""
        lines = self.kind.kubectl("logs", of, "--tail=1", check=False).split("\n")
        return json.loads(lines[0]) if lines[0].startswith("{") else {"sent": 0, "answered": 0, "lost": 0}

    def more_traffic(self, of: str = "deployment/ask") -> dict[str, Any]:
        """The next report in which further frames were answered."""
        before = self.traffic(of)["answered"]
        return until(
            lambda: self.traffic(of), "no more frames are answered", lambda now: now["answered"] > before + 50
        )

    def leases(self, node: str) -> dict[str, str]:
        """host-local's leases of the network: address → the sandbox that has it."""
        script = f"cd /var/lib/cni/networks/{NETWORK} && for file in [0-9]*; do echo $file $(head -n 1 $file); done"
        return dict(line.split() for line in self.kind.on_node(node, script).split("\n") if line)


def peer(role: str, **resources: Any) -> dict[str, Any]:
    """The spec of a pod that runs peer.py on its only device. resources: of the container."""
    container = {
        "name": "c",
        "image": IMAGE,
        "command": ["/opt/vmtap/bin/python", "-c", _PEER.read_text(), role],
        "resources": resources,
        "securityContext": {"runAsUser": 107, "runAsGroup": 107},
    }
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
    }


def _peer(role: str, node: str) -> dict[str, Any]:
    """A Deployment: a kubelet that starts with its node fails pods whose device nobody offers yet, for good."""
    labels = {"app": role}
    pod = peer(role, limits={f"{RESOURCES}/{NETWORK}": 1})
    pod["nodeSelector"] = {"kubernetes.io/hostname": node}
    metadata = {"labels": labels, "annotations": {"k8s.v1.cni.cncf.io/networks": NETWORK}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": role},
        "spec": {
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": metadata, "spec": pod},
        },
    }


@pytest.fixture(scope="package")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """The cluster of deploy/kind/cluster.yaml, with our image, built by docker and loaded by kind."""
    with lab(tmp_path_factory.mktemp("kind")) as kind:
        kind.run(["docker", "build", "-t", IMAGE, "."])
        kind.create()
        kind.run(["kind", "load", "docker-image", "--name", NAME, IMAGE])
        yield kind


@pytest.fixture(scope="package")
def site(kind: Kind) -> Site:
    return Site(kind)
