"""What a real kind cluster needs: kind, docker, the image of kind's nodes, and the build of our Dockerfile by docker.

Nothing is installed. The last two are docker's data, made by dockerd itself (lab/kind/node.py, lab/kind/build.py).
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

from lab.assets import debian, golang
from lab.assets.cache import CACHE, CHECKOUT, Asset, build
from lab.assets.images import BASE
from lab.assets.programs import CLUSTER, KUBERNETES, KUBERNETES_STAMP, plugins

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIND_MODULE = "sigs.k8s.io/kind@v0.30.0"
COREDNS_VERSION = "v1.12.1"
ETCD_TAG = "3.6.5-0"
"""kubeadm of this Kubernetes wants these of coredns and etcd (cmd/kubeadm/app/constants)."""
_CRICTL = "sigs.k8s.io/cri-tools/cmd/crictl@v1.34.0"
_OF_KUBERNETES = ("kubeadm", "kube-proxy")
_PLUGINS = ("main/ptp", "meta/portmap")
_DEBS = ("docker.io", "slirp4netns")


def _make_programs(folder: Path) -> None:
    """Three minutes on two cores after CLUSTER, with which it shares most packages."""
    for program in (KIND_MODULE, _CRICTL):
        golang.install([program], folder, "-ldflags=-s -w")
    golang.build_replaced(f"k8s.io/kubernetes@{KUBERNETES}", _OF_KUBERNETES, folder, KUBERNETES_STAMP)
    golang.build_replaced(f"github.com/coredns/coredns@{COREDNS_VERSION}", ["."], folder)
    plugins(_PLUGINS, folder / "cni")


def _make_docker(folder: Path) -> None:
    for package in _DEBS:
        debian.unpack(package, folder)


def _make_data(name: str, folder: Path) -> None:
    """In a process of its own: lab.kind imports the assets. Removes older ones first: they are large."""
    for old in CACHE.glob(f"kind-{name}-*"):
        if old not in folder.parents:
            shutil.rmtree(old)
    build([sys.executable, "-m", f"lab.kind.{name}", folder])


def _node_sources() -> Iterator[Path]:
    return (CHECKOUT / "lab/kind" / name for name in ("node.py", "cover.sh", "network.sh"))


def _build_sources() -> Iterator[Path]:
    """What the first layers of the Dockerfile depend on."""
    names = (
        "Dockerfile",
        "requirements.lock",
        "deploy/requirements.lock",
        "lab/kind/node.py",
        "lab/kind/build.py",
    )
    return (CHECKOUT / name for name in names)


PROGRAMS = Asset(
    "kind",
    _make_programs,
    "kind",
    (KIND_MODULE, _CRICTL, KUBERNETES, _OF_KUBERNETES, COREDNS_VERSION, _PLUGINS),
)
"""A folder with kind, crictl, kubeadm, kube-proxy and coredns, and in `cni` reference plugins."""
DOCKER = Asset("docker", _make_docker, "kind", _DEBS)
"""The files of Debian's packages of docker and slirp4netns, below usr."""
_VERSIONS = (PROGRAMS.versions, CLUSTER.versions, BASE.versions)
NODE = Asset("kind-node", partial(_make_data, "node"), "kind", _VERSIONS, _node_sources)
"""docker's data with two images: kind's node, and the base of our Dockerfile."""
BUILD = Asset("kind-build", partial(_make_data, "build"), "kind", _VERSIONS, _build_sources)
"""docker's data with those images and a build cache: the layers of our Dockerfile that our sources do not change."""
