"""A real kind cluster: kind, kubeadm and kubectl as a user of docker runs them, on the lab's own docker.

lab/kind/__init__.py says what stands in for what there is no registry for.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lab.assets.cache import CHECKOUT
from lab.assets.kind import BUILD, NODE, PROGRAMS
from lab.assets.programs import CLUSTER, MANIFESTS
from lab.kind import multus
from lab.kind.docker import BASE_IMAGE, HOME, NODE_IMAGE, Docker
from lab.kubernetes.client import Client
from lab.process import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lab.process import Word

NAME = "vmtap"
"""The cluster's name in deploy/kind/cluster.yaml."""
CONFIG = CHECKOUT / "deploy/kind/cluster.yaml"
_MULTUS = f"{HOME}/multus"
_MULTUS_URL = "https://raw.githubusercontent.com/k8snetworkplumbingwg/multus-cni/"

# kind's image of nodes comes from a registry, and so do the Dockerfile's base and Multus's.
_KIND = f"""#!/bin/sh
set -eu
case "$*" in
"create cluster"*)
    {{real}} "$@" --image {NODE_IMAGE}
    for cluster in $({{real}} get clusters -q); do
        {{real}} load image-archive -q {_MULTUS}.tar --name "$cluster"
    done
    ;;
*) exec {{real}} "$@" ;;
esac
"""
_DOCKER = f"""#!/bin/sh
case "$1" in
build) shift && exec {{real}} build --build-arg BASE={BASE_IMAGE} "$@" ;;
*) exec {{real}} "$@" ;;
esac
"""
_KUBECTL = f"""#!/bin/bash
words=()
for word; do
    case $word in
    {_MULTUS_URL}*) words+=({_MULTUS}.json) ;;
    *) words+=("$word") ;;
    esac
done
exec {{real}} "${{{{words[@]}}}}"
"""


class Kind(Client):
    """docker, with kind, kubectl, helm and kustomize; a context manager. There is no cluster yet.

    folder: for logs; internet: whether docker's network, and so the nodes, reach what this machine reaches.
    """

    def __init__(self, folder: Path, *, internet: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            self.docker = stack.enter_context(Docker(folder, [NODE.get(), BUILD.get()], internet=internet))
            programs, cluster = PROGRAMS.get(), CLUSTER.get()
            multus.archive(self.docker.machine.path(f"{_MULTUS}.tar"))
            self.docker.machine.path(f"{_MULTUS}.json").write_text(multus.manifest())
            self.docker.shim("kind", _KIND.format(real=programs / "kind"))
            self.docker.shim("kubectl", _KUBECTL.format(real=cluster / "kubectl"))
            self.docker.shim("docker", _DOCKER.format(real=self.docker.programs / "usr/bin/docker"))
            for name in ("helm", "kustomize"):
                self.docker.shim(name, f'#!/bin/sh\nexec {MANIFESTS.get() / name} "$@"\n')
            self._stack = stack.pop_all()

    def create(self) -> None:
        """Makes the cluster of deploy/kind/cluster.yaml, with the stand-in for Multus; returns when it is ready."""
        self.run(
            ["kind", "create", "cluster", "--config", CONFIG, "--wait", f"{PATIENCE}s"], timeout=2 * PATIENCE
        )
        self.kubectl("wait", "nodes", "--all", "--for=condition=Ready", f"--timeout={PATIENCE}s")
        self.kubectl("apply", "-f", f"{_MULTUS}.json")
        self.wait_kind("network-attachment-definitions")
        self.kubectl(
            "-n", "kube-system", "rollout", "status", f"daemonset/{multus.NAME}", f"--timeout={PATIENCE}s"
        )

    def environment(self) -> dict[str, str]:
        """The environment of commands, run as a user of the docker."""
        return self.docker.environment()

    def run(
        self,
        argv: Sequence[Word],
        *,
        stdin: str = "",
        check: bool = True,
        timeout: float = 2 * PATIENCE,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Runs a command in the checkout as a user of the docker, and returns its output. Raises LabError."""
        return self.docker.run(
            argv, stdin=stdin, check=check, timeout=timeout, cwd=CHECKOUT, env=env or self.environment()
        )

    def nodes(self) -> list[str]:
        """The names of the nodes, and so of their containers."""
        return sorted(self.run(["kind", "get", "nodes", "--name", NAME]).split())

    def workers(self) -> list[str]:
        return [name for name in self.nodes() if "worker" in name]

    def on_node(self, node: str, script: str, *, check: bool = True) -> str:
        """The output of a shell's script on a node."""
        return self.run(["docker", "exec", node, "sh", "-euc", script], check=check)

    def close(self) -> None:
        self._stack.close()
