"""The stand-in for Multus (lab/kubernetes/multus.py) as real Multus is installed: a manifest with a DaemonSet.

Its image has the stand-in and the Python packages that it imports. The DaemonSet's init container puts them on its
node, with a network config and a kubeconfig of the pod's own token, which is valid as long as the pod.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cni
from lab.kubernetes import multus
from lab.runtimes import image
from lab.runtimes.containerd import SANDBOX

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE = "localhost/multus-stand-in:lab"
_IMPORTED = ("grpc", "google/protobuf", "typing_extensions.py")
NAME = "kube-multus-ds"
"""That of real Multus's DaemonSet."""
_SPACE = "kube-system"
_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a folder
_HOME = "/opt/multus"

_INSTALL = """
cd /node
until [ -e etc/cni/net.d/10-kindnet.conflist ]; do
    busybox sleep 0.2
done
busybox mkdir -p .{home}
busybox cp -r /multus/. .{home}
busybox cp {token}/ca.crt .{home}/ca.crt
cat >.{home}/kubeconfig <<EOF
{{"clusters": [{{"cluster": {{"server": "https://$KUBERNETES_SERVICE_HOST:443",
   "certificate-authority": "{home}/ca.crt"}}}}],
 "users": [{{"user": {{"token": "$(busybox cat {token}/token)"}}}}]}}
EOF
cat >opt/cni/bin/.multus <<EOF
#!/bin/sh
PYTHONPATH={home} exec /usr/bin/python3 {home}/multus.py
EOF
busybox chmod 755 opt/cni/bin/.multus
busybox mv opt/cni/bin/.multus opt/cni/bin/multus
cat >etc/cni/net.d/.multus <<EOF
{network}
EOF
busybox mv etc/cni/net.d/.multus etc/cni/net.d/20-multus.conflist
"""


def archive(target: Path) -> None:
    """Writes the image."""
    write_tree: dict[str, Path | bytes | str] = {
        "bin/busybox": image.BUSYBOX,
        "bin/sh": "/bin/busybox",
        "bin/cat": "/bin/busybox",
        "multus/multus.py": Path(multus.__file__),
        **{f"multus/{name}": path for name, path in _packages()},
    }
    image.write(target, IMAGE, write_tree, ["/bin/sh"])


def _packages() -> Iterator[tuple[str, Path]]:
    site = Path(sysconfig.get_path("purelib"))
    for name in _IMPORTED:
        top = site / name
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and path.suffix in {".py", ".so"}:
                yield str(path.relative_to(site)), path
    package = Path(cni.__file__).parent
    for path in package.rglob("*.py"):
        yield str(path.relative_to(package.parent)), path


def manifest() -> str:
    """In JSON."""
    network = {
        "cniVersion": "1.0.0",
        "name": "multus",
        "plugins": [
            {
                "type": "multus",
                "kubeconfig": f"{_HOME}/kubeconfig",
                "podResources": "/var/lib/kubelet/pod-resources/kubelet.sock",
                "cache": "/var/lib/cni/multus",
            }
        ],
    }
    script = _INSTALL.format(home=_HOME, token=_TOKEN, network=json.dumps(network))
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
        {"apiGroups": ["k8s.cni.cncf.io"], "resources": ["network-attachment-definitions"], "verbs": ["get"]},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "multus"}
    subject = {"kind": "ServiceAccount", "name": "multus", "namespace": _SPACE}
    pod = {
        "hostNetwork": True,
        "serviceAccountName": "multus",
        "tolerations": [{"operator": "Exists"}],
        "initContainers": [
            {
                "name": "install",
                "image": IMAGE,
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-euc", script],
                "volumeMounts": [{"name": "node", "mountPath": "/node"}],
            }
        ],
        "containers": [{"name": "idle", "image": SANDBOX, "imagePullPolicy": "Never"}],
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "node", "hostPath": {"path": "/"}}],
    }
    labels = {"app": "multus"}
    objects = [
        multus.DEFINITION,
        _object("v1", "ServiceAccount", "multus"),
        {**_object("rbac.authorization.k8s.io/v1", "ClusterRole", "multus"), "rules": rules},
        {
            **_object("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "multus"),
            "roleRef": role,
            "subjects": [subject],
        },
        {
            **_object("apps/v1", "DaemonSet", NAME),
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def _object(version: str, kind: str, name: str) -> dict[str, Any]:
    metadata = {"name": name, **({} if kind.startswith("Cluster") else {"namespace": _SPACE})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}
