"""One cluster for all tests of this folder, with the agent in it and a stand-in for Multus."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.assets import images
from lab.kubernetes import multus
from lab.kubernetes.cluster import NETCONF, NODE, PLUGINS, Cluster
from lab.process import LabError
from lab.wire import NIC, Lab
from tests.waiting import LIMIT, until_as_before

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).parents[2] / "deploy/helm/vmtap"
NAMESPACE = "vmtap-system"
RUN = Path("/run/vmtap")
RESOURCES = "macvtap.network.kubevirt.io"
CAPACITY = 40
"""Of the interface dataplane; narrow has 1."""
_NETWORKS = {"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition"}


class Release:
    """The agent in the cluster, by its chart."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.values: dict[str, Any] = {
            "interfaces": [
                {"name": "dataplane", "source": {"dev": NIC}, "capacity": CAPACITY},
                {"name": "narrow", "source": {"dev": NIC}, "capacity": 1},
            ],
            "image": {"tag": images.VERSION},
        }
        self.before: dict[str, Any] = {}
        """node(), as it was without the agent."""

    def install(self, **values: Any) -> None:
        """Or change what is installed; returns when the agent is ready."""
        self.values |= values
        chart = ["vmtap", str(CHART), "--namespace", NAMESPACE, "--create-namespace", "--values", "-"]
        patience = ["--wait", f"--timeout={LIMIT}s"]
        try:
            self.cluster.run(
                ["helm", "upgrade", "--install", *chart, *patience], stdin=json.dumps(self.values)
            )
            self.wait()  # helm is content with none, where one may be unavailable
        except LabError as error:
            raise LabError(f"{error}\n{self.cluster.story()}") from error

    def wait(self) -> None:
        """Until what was installed last is what runs."""
        self.kubectl("rollout", "status", "daemonset/vmtap", f"--timeout={LIMIT}s")

    def upgrade(self) -> None:
        """To another version: the same image by another name."""
        repository, _, now = images.NAMES["agent"].rpartition(":")
        tag = f"{self.values['image']['tag']}x"
        self.cluster.run(["ctr", "images", "tag", f"{repository}:{now}", f"{repository}:{tag}"])
        self.cluster.cri.wait_image(f"{repository}:{tag}")
        self.install(image={"tag": tag})

    def restart(self) -> None:
        self.kubectl("rollout", "restart", "daemonset/vmtap")
        self.wait()

    def uninstall(self) -> None:
        """By helm, which leaves the namespace."""
        try:
            self.cluster.run(["helm", "uninstall", "vmtap", "--namespace", NAMESPACE, "--wait"])
        except LabError as error:
            said = self.kubectl("logs", "-l", "job-name=vmtap-uninstall", check=False)
            raise LabError(f"{error}\n{self.cluster.story()}\nThe job said: {said}") from error
        self.cluster.kubectl("delete", "namespace", NAMESPACE, f"--timeout={LIMIT}s")

    def kubectl(self, *words: str, check: bool = True) -> str:
        return self.cluster.kubectl("-n", NAMESPACE, *words, check=check)

    def daemonset(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.get("-n", NAMESPACE, "daemonset", "vmtap")
        return found

    def wait_resource(self, name: str, number: int, kind: str = "allocatable") -> None:
        """Until the node has so many."""
        path = f"{RESOURCES}/{name}".replace(".", r"\.")
        self.cluster.wait(f"node/{NODE}", f"jsonpath={{.status.{kind}.{path}}}={number}")

    def records(self) -> list[dict[str, Any]]:
        """What is attached."""
        found = []
        for path in self._in(RUN / "attachments", "*.json"):
            with suppress(FileNotFoundError):  # it ended just now
                found.append(json.loads(path.read_text()))
        return found

    def traces(self) -> dict[str, Any]:
        """What a pod may leave on the node; the running agent's own is not among it."""
        folders = ("attachments", "ifindex", "dev", "holders", "pending")
        files = [path for name in folders for path in self._in(RUN / name)]
        files += (p for p in self._in("/var/lib/cni", "**/*") if not p.is_dir() and not _stays(p))
        links = self.cluster.lab.node.links()
        return {
            "files": sorted(str(path) for path in [*files, *self._in("/var/run/cdi")]),
            "links": sorted(name for name in links if not name.startswith("veth")),
            "veths and namespaces": (
                sum(name.startswith("veth") for name in links),
                len(self._in("/run/netns")),
            ),
            "promiscuity": links[NIC]["promiscuity"],
        }

    def node(self) -> dict[str, Any]:
        """What the agent itself may leave: on the node, and of objects that belong to no namespace."""
        folders = (PLUGINS, NETCONF, "/run/vmtap", "/etc/vmtap", "/var/run/cdi")
        kinds = "clusterroles,clusterrolebindings,priorityclasses,customresourcedefinitions,namespaces"
        return {
            **self.traces(),
            "files": sorted(str(path) for folder in folders for path in self._in(folder)),
            "folder": self.cluster.machine.path(RUN).exists(),
            "sockets": sorted(
                path.name
                for folder in ("device-plugins", "plugins", "plugins_registry")
                for path in self._in(f"/var/lib/kubelet/{folder}", "vmtap*")
            ),
            "processes": sorted(p for p in self.cluster.machine.processes().values() if "vmtap" in p),
            "objects": self.cluster.kubectl("get", kinds, "-o", "name").split(),
        }

    def left(self, before: dict[str, Any]) -> None:
        """Fails the test if anything of the traces is not as it was before, after giving it a moment."""
        until_as_before(self.traces, before)

    def _in(self, folder: str | Path, pattern: str = "*") -> list[Path]:
        return [*self.cluster.machine.path(folder).glob(pattern)]


def _stays(path: Path) -> bool:
    """host-local's lock and its note of the last address, and what libcni keeps of pods that run."""
    return "lock" in path.name or "last_reserved" in path.name


def network(name: str, **config: Any) -> dict[str, Any]:
    """A NetworkAttachmentDefinition of the interface's name."""
    text = json.dumps({"cniVersion": "1.0.0", "name": name, "type": "vmtap", **config})
    metadata = {
        "name": name,
        "namespace": "default",
        "annotations": {"k8s.v1.cni.cncf.io/resourceName": f"{RESOURCES}/{name}"},
    }
    return {**_NETWORKS, "metadata": metadata, "spec": {"config": text}}


def pod(name: str, interface: str | None = None, *, device: bool = True, **labels: str) -> dict[str, Any]:
    """Which does nothing, and ends at once when it is told to.

    interface: the network that it wants, and the one that it wants a device of, unless device is false.
    """
    wanted = {f"{RESOURCES}/{interface}": 1} if interface and device else {}
    annotations = {"k8s.v1.cni.cncf.io/networks": interface} if interface else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {
            "automountServiceAccountToken": False,
            "dnsPolicy": "Default",  # there is no cluster DNS, and the kubelet would warn of that
            "terminationGracePeriodSeconds": 5,
            "containers": [
                {
                    "name": "c",
                    "image": "lab.invalid/busybox:1",
                    "command": [
                        "/bin/busybox",
                        "sh",
                        "-c",
                        "trap exit TERM; while :; do busybox sleep 1000 & wait; done",
                    ],
                    "resources": {"limits": wanted},
                }
            ],
        },
    }


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with Lab() as lab, Cluster(lab, folder) as started:
        multus.install(started)
        started.apply(network("dataplane", mode="bridge"), network("narrow", mode="bridge"))
        yield started


@pytest.fixture(scope="session")
def release(cluster: Cluster) -> Release:
    """Installed from the images of the Dockerfile."""
    for name, archive in images.archives().items():
        cluster.load(archive, name)
    made = Release(cluster)
    made.before = made.node()
    made.install()
    return made
