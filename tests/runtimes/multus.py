"""A stand-in for Multus, of which there is no package: what it does between the kubelet and a delegate, and no more.

It asks the kubelet's pod-resources socket which device of the resource the pod has, and runs the delegate with it as
deviceID. As a plugin of a network config:

    {"type": "multus", "podResources": SOCKET, "resourceName": NAME, "delegate": {"type": "vmtap", …}}
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import grpc

from lab.proto import podresources_pb2 as api
from lab.proto import podresources_pb2_grpc as services


def main() -> int:
    config = json.load(sys.stdin)
    delegate = {key: config[key] for key in ("cniVersion", "name")} | config["delegate"]
    if os.environ["CNI_COMMAND"] != "VERSION" and (device := _device(config)):
        delegate["deviceID"] = device
    program = shutil.which(delegate["type"], path=os.environ["CNI_PATH"])
    assert program
    return subprocess.run([program], input=json.dumps(delegate).encode(), check=False).returncode


def _device(config: dict[str, str]) -> str | None:
    """The pod's; the kubelet has none of a pod that it has forgotten."""
    args = dict(word.split("=", 1) for word in os.environ["CNI_ARGS"].split(";"))
    asked = api.GetPodResourcesRequest(pod_name=args["K8S_POD_NAME"], pod_namespace=args["K8S_POD_NAMESPACE"])
    with grpc.insecure_channel(f"unix:{config['podResources']}") as channel:
        try:
            pod = services.PodResourcesListerStub(channel).Get(asked, timeout=30).pod_resources
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return None
            raise
    for container in pod.containers:
        for devices in container.devices:
            if devices.resource_name == config["resourceName"]:
                return str(devices.device_ids[0])
    return None


if __name__ == "__main__":
    sys.exit(main())
