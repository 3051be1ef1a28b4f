"""A stand-in for Multus, of which there is no package: what it does for a pod with an annotation, and no more.

install() makes it a plugin of a cluster's node, with a network config of its own, and tells the API server what a
NetworkAttachmentDefinition is:

    {"type": "multus", "kubeconfig": FILE, "podResources": SOCKET, "cache": FOLDER}

For each NetworkAttachmentDefinition that the pod's annotation names, it asks the kubelet which device of its resource
the pod has, and runs the delegate for net1, net2 … with it as deviceID. What it ran is kept: a DEL comes when the pod
may be forgotten. Its own result is empty; it writes no network-status.

Where there is no API server, "networks" stands in place of "kubeconfig": [{"resource": NAME, "config": {…}}, …].
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

from lab.proto import podresources_pb2 as api
from lab.proto import podresources_pb2_grpc as services

if TYPE_CHECKING:
    from lab.kubernetes.cluster import Cluster

NETWORKS = "k8s.v1.cni.cncf.io/networks"
RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
DEFINITIONS = "apis/k8s.cni.cncf.io/v1/namespaces"
_DEFINITION: dict[str, Any] = {
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
"""The parts of Multus's that count here."""


def script() -> str:
    """The plugin."""
    return f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()}\n"


def install(cluster: Cluster) -> None:
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
    cluster.apply(_DEFINITION)
    cluster.wait(f"customresourcedefinition/{_DEFINITION['metadata']['name']}", "condition=Established")
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
        return _say(f"the stand-in for Multus: {error}")
    for number, delegate in enumerate(delegates, start=1):
        if said := _run(delegate, f"net{number}"):
            print(said)
            return 1
    if command == "DEL":
        kept.unlink(missing_ok=True)
    if command == "ADD":
        print(json.dumps({"cniVersion": config["cniVersion"], "interfaces": [], "ips": []}))
    return 0


def _say(text: str) -> int:
    print(json.dumps({"cniVersion": "1.0.0", "code": 11, "msg": text}))
    return 1


def _run(delegate: dict[str, Any], ifname: str) -> str:
    """What it said if it failed."""
    program = shutil.which(delegate["type"], path=os.environ["CNI_PATH"])
    if program is None:
        return json.dumps({"cniVersion": "1.0.0", "code": 11, "msg": f"no plugin {delegate['type']}"})
    env = {**os.environ, "CNI_IFNAME": ifname}
    done = subprocess.run(
        [program], input=json.dumps(delegate), env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.stdout if done.returncode else ""


def _delegates(config: dict[str, Any]) -> list[dict[str, Any]]:
    """With the pod's devices, in the order of the networks."""
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
    """The definitions in the pod's namespace that its annotation names, in its order."""
    annotations = ask(f"api/v1/namespaces/{namespace}/pods/{name}")["metadata"].get("annotations", {})
    found = []
    for each in (word.strip() for word in annotations.get(NETWORKS, "").split(",") if word):
        definition = ask(f"{DEFINITIONS}/{namespace}/network-attachment-definitions/{each}")
        resource = definition["metadata"].get("annotations", {}).get(RESOURCE)
        config = {"name": each, **json.loads(definition["spec"]["config"])}
        found.append({"resource": resource, "config": config})
    return found


def _devices(socket: str, namespace: str, name: str) -> dict[str, list[str]]:
    """The pod's, by resource."""
    asked = api.GetPodResourcesRequest(pod_name=name, pod_namespace=namespace)
    found: dict[str, list[str]] = {}
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        pod = services.PodResourcesListerStub(channel).Get(asked, timeout=30).pod_resources
    for container in pod.containers:
        for devices in container.devices:
            found.setdefault(devices.resource_name, []).extend(devices.device_ids)
    return found


class _Server:
    """The API server, by the only kind of kubeconfig that the lab writes."""

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
