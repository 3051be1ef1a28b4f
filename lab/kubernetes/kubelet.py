"""A stand-in for a kubelet's device manager: registration, ListAndWatch, Allocate, and the pod-resources API.

It does what the real one does: at its start it deletes every socket in its folder before it makes its own; it calls a
plugin back on the socket that the plugin registered. It runs no pods: the caller does.

Several plugins of one resource are treated as by Kubernetes 1.34.4 (pkg/kubelet/cm/devicemanager: plugin/v1beta1's
handler.go and client.go, manager.go, endpoint.go):

- A later registration gets the calls of Allocate. The stream of an earlier one stays open, and the last list counts,
  whoever sends it (registerClient, PluginConnected, PluginListAndWatchReceiver).
- When any stream of the resource ends, the client is disconnected that the resource has by its name, which is the one
  that registered last; all devices become unhealthy, and Allocate is refused (runClient, PluginDisconnected,
  isStopped) until the next registration.

Kubernetes after the merge of kubernetes/kubernetes#135437 distinguishes plugins by their sockets.

The pod-resources API answers as in k8s.io/kubernetes 1.34 (pkg/kubelet/apis/podresources/server_v1.go): errors of Get
have the code UNKNOWN, which Go's gRPC makes of a plain error; a pod is known from its admission on, with or without
devices; and one limit of 100 calls a second, 10 at once, holds for all methods (pkg/kubelet/apis/grpc/ratelimit.go).
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cni.agent.deviceplugin import v1beta1_pb2 as api  # sets gRPC's log level, so it comes first

# isort: split
import grpc

from cni.agent.deviceplugin import podresources_pb2 as pods
from cni.agent.deviceplugin import podresources_pb2_grpc as pods_services
from cni.agent.deviceplugin import v1beta1_pb2_grpc as services
from lab.process import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = Path("/var/lib/kubelet/device-plugins")
"""The folder of a real kubelet."""
SOCKET = "kubelet.sock"
_CALLS_PER_SECOND = 100.0
_BURST = 10.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True)
class Device:
    healthy: bool
    nodes: tuple[int, ...] = ()
    """NUMA nodes."""


class PluginError(Exception):
    """A plugin returned an error: the name of gRPC's code, and the message."""


@dataclass
class _Plugin:
    """A registration."""

    endpoint: str
    options: api.DevicePluginOptions
    channel: grpc.Channel
    listed: bool = False
    """Whether the plugin has sent a list."""
    stopped: bool = False
    """Whether no call is to be made (endpointImpl.stopTime)."""
    stream: grpc.Call | None = None
    thread: threading.Thread | None = None

    @property
    def stub(self) -> services.DevicePluginStub:
        return services.DevicePluginStub(self.channel)


@dataclass(frozen=True)
class Claim:
    """The devices of a container."""

    pod: tuple[str, str]
    """Namespace and name."""
    container: str
    resource: str
    devices: tuple[str, ...]
    response: api.ContainerAllocateResponse = field(compare=False)


class Kubelet:
    """One node's device manager, running inside its with block.

    folder: of the plugins' sockets, whose paths must fit into the 107 bytes of a unix socket's address. The
    pod-resources socket is at pod_resources, beside the folder, as with a real kubelet.
    """

    def __init__(self, folder: str | os.PathLike[str] = FOLDER) -> None:
        self.folder = Path(folder)
        self.pod_resources = self.folder.parent / "pod-resources" / SOCKET
        self.claims: list[Claim] = []
        self.refuse = False
        """Whether every registration is refused."""
        self.watch = True
        """Whether plugins are called at all after they have registered."""
        self.refused: list[str] = []
        """Why registrations were refused."""
        self.get = "on"
        """The method Get: "on"; "disabled", by its feature gate; "missing", as before Kubernetes 1.27."""
        self.reject = 0
        """How many calls of the pod-resources API the limit rejects next, whenever they come."""
        self.calls: list[str] = []
        """The methods of the pod-resources API that were called, those that the limit rejected included."""
        self.pods: set[tuple[str, str]] = set()
        """Namespace and name of pods that have no device."""
        self._clients: dict[str, _Plugin] = {}
        """Resource → the plugin that registered last, until it is disconnected."""
        self._plugins: dict[str, _Plugin] = {}
        """Resource → the plugin that registered last, also when it is stopped."""
        self._running: list[_Plugin] = []
        """All plugins whose streams are read."""
        self._lists: dict[str, dict[str, Device]] = {}
        self._counts: dict[str, int] = {}
        self._changed = threading.Condition()
        self._servers: list[tuple[grpc.Server, ThreadPoolExecutor]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Deletes the folder's sockets and serves. Claims are kept, as in a real kubelet's checkpoint."""
        for folder in (self.folder, self.pod_resources.parent):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                with suppress(FileNotFoundError):  # a plugin that ends removes its own
                    if stat.S_ISSOCK(path.lstat().st_mode):
                        path.unlink()
        lister, listing = _server(self.pod_resources)
        pods_services.add_PodResourcesListerServicer_to_server(_PodResources(self), lister)
        registration, registering = _server(self.folder / SOCKET)
        services.add_RegistrationServicer_to_server(_Registration(self), registration)
        self._servers = [(lister, listing), (registration, registering)]
        for server, _ in self._servers:
            server.start()

    def stop(self) -> None:
        """Ends as a kubelet does: removes its own sockets, keeps those of the plugins, and forgets the plugins."""
        for server, threads in self._servers:
            server.stop(None).wait(PATIENCE)
            threads.shutdown()  # a registration in progress must not reach the next kubelet
        self._servers = []
        with self._changed:
            running, self._running = self._running, []
            self._clients, self._plugins, self._lists, self._counts = {}, {}, {}, {}
        for plugin in running:
            _hang_up(plugin)

    def end_stream(self, resource: str) -> None:
        """Ends the stream of the plugin that registered last."""
        if stream := self._plugin(resource).stream:
            stream.cancel()

    def restart(self) -> None:
        """Starts a new kubelet: it deletes every socket in the folder, and all plugins must register again."""
        self.stop()
        self.start()

    # Registrations

    def wait_resource(self, resource: str, *, times: int = 1) -> dict[str, Device]:
        """Waits until a resource was registered that often since start() and has sent a list. Returns its devices."""

        def listed() -> bool:
            plugin = self._plugins.get(resource)
            return bool(plugin and plugin.listed and not plugin.stopped and self._counts[resource] >= times)

        with self._changed:
            if not self._changed.wait_for(listed, PATIENCE):
                raise AssertionError(
                    f"{resource} was not registered: {self._counts}, refused: {self.refused}"
                )
            return self._devices(resource)

    def wait_devices(self, resource: str, wanted: Callable[[dict[str, Device]], bool]) -> dict[str, Device]:
        """Waits until wanted(devices of the resource) is true, and returns the devices."""
        with self._changed:
            if not self._changed.wait_for(lambda: wanted(self._devices(resource)), PATIENCE):
                raise AssertionError(
                    f"the devices of {resource} are not as wanted: {self._devices(resource)}"
                )
            return self._devices(resource)

    def devices(self, resource: str) -> dict[str, Device]:
        """Id → device, from the last list. All are unhealthy if a stream has ended since."""
        with self._changed:
            return self._devices(resource)

    def registrations(self, resource: str) -> int:
        """How many times the resource was registered since start()."""
        with self._changed:
            return self._counts.get(resource, 0)

    def _devices(self, resource: str) -> dict[str, Device]:
        return dict(self._lists.get(resource, {}))

    # Devices of pods

    def allocate(
        self,
        resource: str,
        ids: Sequence[str],
        *,
        pod: tuple[str, str] = ("default", "pod"),
        container: str = "main",
    ) -> api.ContainerAllocateResponse:
        """Calls the plugin's Allocate for these devices and records the claim. Raises PluginError."""
        request = api.AllocateRequest(container_requests=[api.ContainerAllocateRequest(devices_ids=ids)])
        try:
            answer: api.AllocateResponse = self._plugin(resource).stub.Allocate(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            raise PluginError(error.code().name, error.details()) from error
        (response,) = answer.container_responses
        with self._changed:
            self.claims.append(Claim(pod, container, resource, tuple(ids), response))
        return response

    def admit(self, resource: str, count: int = 1, *, pod: tuple[str, str], container: str = "main") -> Claim:
        """Allocates `count` devices that a kubelet would choose: healthy, free, and preferred by the plugin.

        Raises LookupError if there are too few, PluginError if the plugin refuses.
        """
        with self._changed:
            taken = {id for claim in self.claims if claim.resource == resource for id in claim.devices}
        free = [id for id, device in self.devices(resource).items() if device.healthy and id not in taken]
        if len(free) < count:
            raise LookupError(f"{resource}: {count} devices are wanted and {len(free)} are free")
        if self._plugin(resource).options.get_preferred_allocation_available:
            free = self.preferred(resource, free, size=count)
        self.allocate(resource, free[:count], pod=pod, container=container)
        return self.claims[-1]

    def release(self, pod: tuple[str, str]) -> None:
        """Frees the devices of a pod that has ended. The API has no call that tells the plugin."""
        with self._changed:
            self.claims = [claim for claim in self.claims if claim.pod != pod]

    def preferred(
        self, resource: str, available: Sequence[str], *, must: Sequence[str] = (), size: int = 1
    ) -> list[str]:
        """The ids that the plugin prefers among the available ones (GetPreferredAllocation)."""
        request = api.PreferredAllocationRequest(
            container_requests=[
                api.ContainerPreferredAllocationRequest(
                    available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
                )
            ]
        )
        answer: api.PreferredAllocationResponse = self._plugin(resource).stub.GetPreferredAllocation(
            request, timeout=PATIENCE
        )
        return list(answer.container_responses[0].deviceIDs)

    def _plugin(self, resource: str) -> _Plugin:
        with self._changed:
            plugin = self._plugins[resource]
        if plugin.stopped:
            raise PluginError("UNAVAILABLE", f"the endpoint of {resource} has been stopped")
        return plugin

    # Calls of plugins

    def register(self, request: api.RegisterRequest) -> str | None:
        """Carries out a Register call. Returns None, or why it is refused."""
        path = self.folder / request.endpoint
        if self.refuse:
            return f"{request.resource_name}: not today"
        if request.version != "v1beta1" or "/" not in request.resource_name or "/" in request.endpoint:
            return f"{request.resource_name}: version {request.version}, endpoint {request.endpoint}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:  # a real kubelet connects before it answers, too
                probe.connect(os.fspath(path))
            except OSError as error:
                return f"{request.resource_name}: {path}: {error}"
        plugin = _Plugin(
            request.endpoint, request.options, grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        )
        plugin.thread = threading.Thread(
            target=self._watch, args=(request.resource_name, plugin), daemon=True
        )
        with self._changed:
            self._clients[request.resource_name] = self._plugins[request.resource_name] = plugin
            self._running.append(plugin)
            self._counts[request.resource_name] = self._counts.get(request.resource_name, 0) + 1
            self._changed.notify_all()
        if self.watch:
            plugin.thread.start()
        return None

    def _watch(self, resource: str, plugin: _Plugin) -> None:
        """Keeps the resource's devices up to date until the plugin's stream ends, then disconnects the last client."""
        try:
            with self._changed:
                if plugin not in self._running:
                    return
                plugin.stream = stream = plugin.stub.ListAndWatch(api.Empty())
            for message in stream:
                with self._changed:
                    if plugin not in self._running:
                        return
                    plugin.listed = True
                    self._lists[resource] = {
                        each.ID: Device(
                            each.health == "Healthy", tuple(node.ID for node in each.topology.nodes)
                        )
                        for each in message.devices
                    }
                    self._changed.notify_all()
        except (grpc.RpcError, ValueError):  # ValueError: the channel was closed
            pass
        finally:
            with self._changed:
                last = self._clients.pop(resource, None) if plugin in self._running else None
                if plugin in self._running:
                    self._running.remove(plugin)
                if last:
                    last.stopped = True
                    self._lists[resource] = {
                        id: Device(False, device.nodes) for id, device in self._devices(resource).items()
                    }
                self._changed.notify_all()
            if last:
                last.channel.close()


def _hang_up(plugin: _Plugin) -> None:
    if plugin.stream:
        plugin.stream.cancel()
    plugin.channel.close()
    if plugin.thread and plugin.thread.ident:
        plugin.thread.join(PATIENCE)


def _server(path: Path) -> tuple[grpc.Server, ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(4)
    server = grpc.server(threads)
    server.add_insecure_port(f"unix:{path}")
    return server, threads


class _Registration(services.RegistrationServicer):
    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet

    def Register(self, request: api.RegisterRequest, context: grpc.ServicerContext) -> api.Empty:  # noqa: N802
        if why := self._kubelet.register(request):
            self._kubelet.refused.append(why)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        return api.Empty()


class _PodResources(pods_services.PodResourcesListerServicer):
    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self._lock = threading.Lock()
        self._tokens, self._at = _BURST, time.monotonic()

    def List(  # noqa: N802
        self, request: pods.ListPodResourcesRequest, context: grpc.ServicerContext
    ) -> pods.ListPodResourcesResponse:
        self._limit("List", context)
        return pods.ListPodResourcesResponse(pod_resources=map(self._of, self._known()))

    def Get(  # noqa: N802
        self, request: pods.GetPodResourcesRequest, context: grpc.ServicerContext
    ) -> pods.GetPodResourcesResponse:
        if self._kubelet.get == "missing":
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED, "unknown method Get for service v1.PodResourcesLister"
            )
        self._limit("Get", context)
        pod = (request.pod_namespace, request.pod_name)
        if self._kubelet.get == "disabled":
            context.abort(grpc.StatusCode.UNKNOWN, "PodResources API Get method disabled")
        if pod not in self._known():
            context.abort(grpc.StatusCode.UNKNOWN, f"pod {pod[1]} in namespace {pod[0]} not found")
        return pods.GetPodResourcesResponse(pod_resources=self._of(pod))

    def _known(self) -> list[tuple[str, str]]:
        return [*dict.fromkeys([*(claim.pod for claim in self._kubelet.claims), *self._kubelet.pods])]

    def _limit(self, method: str, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._kubelet.calls.append(method)
            now = time.monotonic()
            self._tokens, self._at = min(_BURST, self._tokens + (now - self._at) * _CALLS_PER_SECOND), now
            if self._kubelet.reject:
                self._kubelet.reject -= 1
            elif self._tokens >= 1:
                self._tokens -= 1
                return
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")

    def _of(self, pod: tuple[str, str]) -> pods.PodResources:
        claims = [claim for claim in self._kubelet.claims if claim.pod == pod]
        return pods.PodResources(
            namespace=pod[0],
            name=pod[1],
            containers=[
                pods.ContainerResources(
                    name=container,
                    devices=[
                        pods.ContainerDevices(resource_name=claim.resource, device_ids=claim.devices)
                        for claim in claims
                        if claim.container == container
                    ],
                )
                for container in dict.fromkeys(claim.container for claim in claims)
            ],
        )
