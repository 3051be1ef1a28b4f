"""Asks the kubelet which devices it has allocated to which pod (the pod-resources API v1, on a unix socket).

The kubelet records an allocation when it admits a pod, before it has the pod's sandbox made: at an ADD its answer is
final. Get returns one pod; it exists since Kubernetes 1.27 and is on by default since 1.34. List returns all pods.
Sources: k8s.io/kubernetes, pkg/kubelet/apis/podresources/server_v1.go, pkg/kubelet/apis/grpc/ratelimit.go.
"""

from __future__ import annotations

import os
import time

import grpc

from cni.agent.deviceplugin import podresources_pb2 as api
from cni.agent.deviceplugin import podresources_pb2_grpc as services
from cni.agent.deviceplugin.registration import CHANNEL_OPTIONS
from cni.errors import CniError, reason
from cni.spec import INVALID_ENVIRONMENT, INVALID_NETWORK_CONFIG, TRY_AGAIN_LATER
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

    from cni.agent.settings import Settings

_SECONDS = 5.0
"""How long the kubelet may take to answer."""
_PAUSE_SECONDS = 0.03
"""Until a call is repeated that the kubelet's rate limit (100 calls a second, 10 at once) has rejected."""
_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 16 << 20),  # as the kubelet's own client (podresources/client.go)
)
_NOT_BY_GET = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.NOT_FOUND)
"""Codes of Get: a kubelet without it; one that has it off, or does not know the pod; the latter in some versions."""


class Allocations:
    """The kubelet's allocations of this node. Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        beside = os.path.dirname(settings.kubelet.rstrip("/"))
        self._path = f"{settings.pod_resources or f'{beside}/pod-resources'}/kubelet.sock"
        self._resources = settings.resource_namespace
        self._stub = services.PodResourcesListerStub(
            grpc.insecure_channel(f"unix:{self._path}", options=_OPTIONS)
        )
        self._has_get = True

    def confirm(self, device_id: str, arguments: Mapping[str, str]) -> None:
        """Return if the kubelet has allocated the device to the pod that CNI_ARGS names.

        device_id: of the form of deviceid.py. arguments: CNI_ARGS. Raises CniError 4 if they name no pod, 7 if the pod
        does not have the device, 11 if the kubelet does not answer or does not know the pod.
        """
        namespace, name = arguments.get("K8S_POD_NAMESPACE"), arguments.get("K8S_POD_NAME")
        if not namespace or not name:
            raise CniError(
                INVALID_ENVIRONMENT,
                f"deviceID {device_id}: CNI_ARGS has no K8S_POD_NAMESPACE and K8S_POD_NAME, and with a device plugin "
                "only the pod that was allocated a device may have it; leave deviceID out",
            )
        try:
            pods = self._pod(namespace, name)
        except (grpc.RpcError, OSError) as error:
            raise self._unanswered(f"deviceID {device_id}", error) from None
        if not pods:
            raise CniError(
                TRY_AGAIN_LATER,
                f"deviceID {device_id}: the kubelet does not know pod {namespace}/{name}; try again",
            )
        theirs = [id for _, _, id in self._devices(pods)]
        if device_id not in theirs:
            raise CniError(
                INVALID_NETWORK_CONFIG,
                f"deviceID {device_id} is refused: the kubelet has not allocated it to pod {namespace}/{name}; take it "
                "out of the network config, and let a container of the pod request the resource",
                f"allocated to the pod: {', '.join(theirs) or 'none'}",
            )

    def indexes(self) -> dict[int, str]:
        """Interface index → id of each device that is allocated. Raises CniError 11."""
        try:
            return {deviceid.index_of(id): id for _, _, id in self._devices(self._list(_deadline()))}
        except (grpc.RpcError, OSError) as error:
            raise self._unanswered("the allocated devices", error) from None

    def _devices(self, pods: Iterable[api.PodResources]) -> Iterator[tuple[str, str, str]]:
        """(namespace, name of the pod, id) of each device of this node's resources that the pods have."""
        for pod in pods:
            for container in pod.containers:
                for devices in container.devices:
                    for id in devices.device_ids:
                        parsed = deviceid.parse(id)
                        if parsed and devices.resource_name == f"{self._resources}/{parsed[0]}":
                            yield pod.namespace, pod.name, id

    def _pod(self, namespace: str, name: str) -> list[api.PodResources]:
        """The pod, or pods, if an earlier one of that name has not ended. Raises RpcError, OSError."""
        until = _deadline()
        if self._has_get:
            request = api.GetPodResourcesRequest(pod_namespace=namespace, pod_name=name)
            try:
                return [self._call(self._stub.Get, request, until).pod_resources]
            except grpc.RpcError as error:
                if error.code() not in _NOT_BY_GET:
                    raise
                off = error.code() is grpc.StatusCode.UNIMPLEMENTED or "disabled" in (error.details() or "")
                self._has_get = not off
        return [pod for pod in self._list(until) if (pod.namespace, pod.name) == (namespace, name)]

    def _list(self, until: float) -> list[api.PodResources]:
        return list(self._call(self._stub.List, api.ListPodResourcesRequest(), until).pod_resources)

    def _call(self, method: Callable[..., Any], request: object, until: float) -> Any:
        """Call the method, repeatedly if the rate limit rejects it. Raises RpcError, OSError."""
        os.stat(self._path)  # gRPC would wait until the deadline for a socket that is not mounted
        while True:
            try:
                return method(request, timeout=max(0.0, until - time.monotonic()), wait_for_ready=True)
            except grpc.RpcError as error:
                late = time.monotonic() + _PAUSE_SECONDS > until
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or late:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _unanswered(self, what: str, error: grpc.RpcError | OSError) -> CniError:
        why = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else reason(error)
        return CniError(
            TRY_AGAIN_LATER,
            f"{what}: the kubelet cannot be asked who has it; try again, and if this stays, let the agent have the "
            f"kubelet's pod-resources socket at {self._path}",
            why,
        )


def _deadline() -> float:
    return time.monotonic() + _SECONDS
