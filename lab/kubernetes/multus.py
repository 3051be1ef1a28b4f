"""A stand-in for Multus, which has no Debian package: it attaches the networks in a pod's annotation, and no more.

install() makes it a plugin of a cluster's node, with this network config, and adds the kind
NetworkAttachmentDefinition to the API server:

    {"type": "multus", "kubeconfig": FILE, "podResources": SOCKET, "cache": FOLDER}

For each NetworkAttachmentDefinition that the pod's annotation names, it gets the pod's device of that resource from the
kubelet, and runs the delegate for net1, net2 … with the device as deviceID. It keeps the delegates in the cache folder,
because the pod may be gone at the DEL. Its own result is empty; it writes no network-status.

Without an API server, "networks" replaces "kubeconfig": [{"resource": NAME, "config": {…}}, …].
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from cni.agent.deviceplugin import podresources_pb2 as api
from cni.agent.deviceplugin import podresources_pb2_grpc as services

if TYPE_CHECKING:
    from lab.kubernetes.cluster import Cluster

NETWORKS = "k8s.v1.cni.cncf.io/networks"
RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
DEFINITIONS = "apis/k8s.cni.cncf.io/v1/namespaces"
DEFINITION: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "network-attachment-definitions.k8s.cni.cncf.io"},
    "spec": {
        "group": "k8s.cni.cncf.io",
        "scope": "Namespaced",
        "names": {
            "plural": "network-attachment-definitions",
            "singular": "network-attachment-definition",
            "kind": "NetworkAttachmentDefinition",
            "shortNames": ["net-attach-def"],
        },
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {"type": "object", "properties": {"config": {"type": "string"}}}
                        },
                    }
                },
            }
        ],
    },
}
"""The parts of Multus's definition that are used."""


def script() -> str:
    """The text of the plugin's executable."""
    return f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()}\n"


def install(cluster: Cluster) -> None:
    """Installs it on the cluster's node."""
    cluster.plugin("multus", script())
    cluster.network(
        "20-multus",
        {
            "type": "multus",
            "kubeconfig": cluster.environment()["KUBECONFIG"],
            "podResources": "/var/lib/kubelet/pod-resources/kubelet.sock",
            "cache": "/var/lib/cni/multus",
        },
    )
    cluster.apply(DEFINITION)
    cluster.wait(f"customresourcedefinition/{DEFINITION['metadata']['name']}", "condition=Established")
    cluster.wait_kind("network-attachment-definitions")


def main() -> int:
    config = json.load(sys.stdin)
    command = os.environ["CNI_COMMAND"]
    if command == "VERSION":
        print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}))
        return 0
    if command in {"STATUS", "GC"}:
        return 0
    kept = Path(config["cache"]) / f"{os.environ['CNI_CONTAINERID']}.json"
    try:
        if command == "ADD":
            delegates = _delegates(config)
            if delegates:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(delegates))
        else:
            delegates = json.loads(kept.read_text()) if kept.exists() else []
    except (OSError, grpc.RpcError) as error:
        return _fail(f"the stand-in for Multus: {error}")
    for number, delegate in enumerate(delegates, start=1):
        if failure := _run(delegate, f"net{number}"):
            print(failure)
            return 1
    if command == "DEL":
        kept.unlink(missing_ok=True)
    if command == "ADD":
        print(json.dumps({"cniVersion": config["cniVersion"], "interfaces": [], "ips": []}))
    return 0


def _fail(text: str) -> int:
    print(json.dumps({"cniVersion": "1.0.0", "code": 11, "msg": text}))
    return 1


def _run(delegate: dict[str, Any], ifname: str) -> str:
    """Runs a delegate. Returns its error document, or "" if it succeeds."""
    program = shutil.which(delegate["type"], path=os.environ["CNI_PATH"])
    if program is None:
        return json.dumps({"cniVersion": "1.0.0", "code": 11, "msg": f"no plugin {delegate['type']}"})
    env = {**os.environ, "CNI_IFNAME": ifname}
    done = subprocess.run(
        [program], input=json.dumps(delegate), env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.stdout if done.returncode else ""


def _delegates(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The delegates' configs with the pod's devices, in the order of the networks."""
    args = dict(word.split("=", 1) for word in os.environ["CNI_ARGS"].split(";"))
    namespace, name = args["K8S_POD_NAMESPACE"], args["K8S_POD_NAME"]
    networks = config.get("networks") or _annotated(_Server(Path(config["kubeconfig"])), namespace, name)
    devices = _devices(config["podResources"], namespace, name) if networks else {}
    found = []
    for each in networks:
        delegate = {"cniVersion": config["cniVersion"], "name": config["name"], **each["config"]}
        if devices.get(each["resource"]):
            delegate["deviceID"] = devices[each["resource"]].pop(0)
        found.append(delegate)
    return found


def _annotated(ask: _Server, namespace: str, name: str) -> list[dict[str, Any]]:
    """The definitions that the pod's annotation names, in its order, from the pod's namespace."""
    annotations = ask(f"api/v1/namespaces/{namespace}/pods/{name}")["metadata"].get("annotations", {})
    found = []
    for each in (word.strip() for word in annotations.get(NETWORKS, "").split(",") if word):
        definition = ask(f"{DEFINITIONS}/{namespace}/network-attachment-definitions/{each}")
        resource = definition["metadata"].get("annotations", {}).get(RESOURCE)
        config = {"name": each, **json.loads(definition["spec"]["config"])}
        found.append({"resource": resource, "config": config})
    return found


def _devices(socket: str, namespace: str, name: str) -> dict[str, list[str]]:
    """Resource → ids of the pod's devices."""
    request = api.GetPodResourcesRequest(pod_name=name, pod_namespace=namespace)
    found: dict[str, list[str]] = {}
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        pod = services.PodResourcesListerStub(channel).Get(request, timeout=30).pod_resources
    for container in pod.containers:
        for devices in container.devices:
            found.setdefault(devices.resource_name, []).extend(devices.device_ids)
    return found


class _Server:
    """The API server, by a kubeconfig that the lab has written."""

    def __init__(self, kubeconfig: Path) -> None:
        known = json.loads(kubeconfig.read_text())
        self._url = known["clusters"][0]["cluster"]["server"]
        self._token = known["users"][0]["user"]["token"]
        self._tls = ssl.create_default_context(
            cafile=known["clusters"][0]["cluster"]["certificate-authority"]
        )

    def __call__(self, path: str) -> Any:
        request = urllib.request.Request(  # noqa: S310 - https
            f"{self._url}/{path}", headers={"Authorization": f"Bearer {self._token}"}
        )
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:  # noqa: S310
            return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
