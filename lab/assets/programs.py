"""Programs and files of Go modules: CNI's client and reference plugins, the benchmark's peers, Kubernetes, schemas."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

from lab.assets import golang
from lab.assets.cache import CHECKOUT, Asset, build

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLUGINS_VERSION = "v1.9.1"
_CNITOOL = "github.com/containernetworking/cni/cnitool@v1.3.0"
_CLIENT_PLUGINS = ("ipam/dhcp", "ipam/host-local", "ipam/static", "meta/tuning", "meta/bandwidth")
_BENCH_PLUGINS = ("main/macvlan", "main/tap")
_CLUSTER_PLUGINS = ("main/loopback", "main/bridge", "ipam/host-local")

_MANIFEST_TOOLS = ("helm.sh/helm/v3/cmd/helm@v3.19.0", "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1")
_HELM = "helm.sh/helm/v3/pkg/chartutil.k8sVersion"
_FOR_1_34 = f"-ldflags=-X={_HELM}Major=1 -X={_HELM}Minor=34"
"""The version of Kubernetes that a release build of helm assumes where it has no cluster to query."""
_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.79.2"
_OPENSHIFT = "github.com/openshift/api@v0.0.0-20241216151652-de9de05a8e43"
_SCC = "0000_03_config-operator_01_securitycontextconstraints-Default.crd.yaml"
_MANIFEST_SCHEMAS = (
    ("k8s.io/kubernetes@v1.34.4", "api/openapi-spec/swagger.json"),
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"),
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"),
    (_OPENSHIFT, f"security/v1/zz_generated.crd-manifests/{_SCC}"),
)
"""Each a module, and a file in it."""

KUBERNETES = "v1.34.4"
_CLUSTER = {
    f"k8s.io/kubernetes@{KUBERNETES}": (
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kubectl",
    ),
    "github.com/containerd/containerd/v2@v2.1.9": ("containerd", "containerd-shim-runc-v2", "ctr"),
    "go.etcd.io/etcd/server/v3@v3.6.8": (".",),
}
"""Module → its programs, each in its folder below cmd; "." is the module's own. runc is Debian's."""
KUBERNETES_STAMP = f"-X=k8s.io/component-base/version.gitVersion={KUBERNETES}"
"""A release build of Kubernetes has its version written in, and helm queries a cluster for it."""

_SHIM = CHECKOUT / "cni/shim/vmtap.c"
_MEASURING = tuple(CHECKOUT / f"lab/bench/{name}.c" for name in ("spawn", "moment", "frames"))


def plugins(names: Sequence[str], folder: Path) -> None:
    """Reference plugins, each by its folder in their module."""
    module = "github.com/containernetworking/plugins/plugins"
    golang.install([f"{module}/{name}@{PLUGINS_VERSION}" for name in names], folder)


def _make_clients(folder: Path) -> None:
    golang.install([_CNITOOL], folder)
    plugins(_CLIENT_PLUGINS, folder)


def _make_bench(folder: Path) -> None:
    """The peers with Go; our shim and the programs that measure with musl's C library, static and small."""
    plugins(_BENCH_PLUGINS, folder)
    from hatch_build import FLAGS  # noqa: PLC0415 - it needs hatchling, which nothing else here does

    for source in (_SHIM, *_MEASURING):
        build(["musl-gcc", *FLAGS, "-o", folder / source.stem, source])


def _make_kubevirt(version: str, folder: Path) -> None:
    """The files that the module of KubeVirt's types is tested with."""
    shutil.copytree(golang.files(f"kubevirt.io/api@{version}") / "apitesting/testdata/HEAD", folder)


def _make_manifests(folder: Path) -> None:
    for package in _MANIFEST_TOOLS:
        golang.install([package], folder, _FOR_1_34)
    for module, path in _MANIFEST_SCHEMAS:
        shutil.copy(golang.files(module) / path, folder)


def _make_cluster(folder: Path) -> None:
    """Ten minutes on two cores, 6 GB of cache. A line on stderr says what is being built: lab/setup logs it."""
    plugins(_CLUSTER_PLUGINS, folder / "cni")
    for number, (module, programs) in enumerate(_CLUSTER.items(), start=1):
        print(f"lab.assets: {number} of {len(_CLUSTER)}, {module}: {' '.join(programs)}", file=sys.stderr)
        flags = KUBERNETES_STAMP if module.startswith("k8s.io/kubernetes@") else ""
        golang.build_replaced(module, programs, folder, flags)
    (folder / "server").rename(folder / "etcd")


CLIENTS = Asset("clients", _make_clients, "demo", (_CNITOOL, PLUGINS_VERSION, _CLIENT_PLUGINS))
"""A folder with cnitool and the reference plugins."""
BENCH = Asset(
    "bench",
    _make_bench,
    "bench",
    (PLUGINS_VERSION, _BENCH_PLUGINS),
    lambda: (_SHIM, *_MEASURING, CHECKOUT / "hatch_build.py"),
)
"""A folder with the benchmark's programs: vmtap (the shim), macvlan, tap, spawn, moment, frames."""
KUBEVIRT = {
    version: Asset(f"kubevirt-{version}", partial(_make_kubevirt, version), "test")
    for version in ("v1.5.0", "v1.9.0")
}
"""By version, a folder with one object of each kind, in JSON, in which every field is set.

The versions are the oldest in docs/kubevirt.md and the newest when this was written.
"""
MANIFESTS = Asset("manifests", _make_manifests, "cluster", (_MANIFEST_TOOLS, _FOR_1_34, _MANIFEST_SCHEMAS))
"""A folder with helm, kustomize, and the files of _MANIFEST_SCHEMAS."""
CLUSTER = Asset("cluster", _make_cluster, "cluster", (_CLUSTER, _CLUSTER_PLUGINS, PLUGINS_VERSION))
"""A folder with the programs of _CLUSTER, and in `cni` the reference plugins."""
