"""Serves the devices of one resource to the kubelet, on a socket of its own.

Allocate creates nothing and stores nothing: its answer follows from the device id (cni/state/deviceid.py), so it is the
same after a restart. ADD creates the device.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from logging import INFO, WARNING

import grpc

from cni.agent.deviceplugin import v1beta1_pb2 as api
from cni.agent.deviceplugin import v1beta1_pb2_grpc as services
from cni.agent.deviceplugin.devices import Device, Held, preferred
from cni.agent.log import log
from cni.dataclass import dataclass
from cni.state import cdi, deviceid
from cni.state.claims import Claims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import NoReturn

    from cni.agent.metrics import Counter
    from cni.agent.settings import Settings
    from cni.state.record import Record
    from cni.state.store import Store

    Context = grpc.ServicerContext

HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"
CLAIMED = "Claimed"
"""Of metrics only: the kubelet gets such a device as unhealthy."""
_THREADS = 4
"""A kubelet has one ListAndWatch stream and one call at a time; the stream of an earlier kubelet may not have ended."""
_GOODBYE_SECONDS = 5.0
"""How long close() waits for the last message: a kubelet that misses it goes on counting the devices."""
OPTIONS = api.DevicePluginOptions(get_preferred_allocation_available=True)


@dataclass(frozen=True)
class Answers:
    """Answers that do not depend on the resource."""

    settings: Settings
    store: Store
    allocated: Counter

    def container(self, ids: Collection[str]) -> api.ContainerAllocateResponse:
        """The devices and mounts of a container that was allocated these device ids, each valid."""
        answer = api.ContainerAllocateResponse()
        for id in ids:
            if self.settings.device_route == "cdi":
                answer.cdi_devices.add(name=cdi.name(id))
                continue
            index = deviceid.index_of(id)
            path = self.store.node(index)
            answer.devices.add(container_path=f"/dev/tap{index}", host_path=path, permissions="rw")
        if self.settings.broker_mount:
            folder = f"{self.settings.run}/launcher"
            answer.mounts.add(container_path=folder, host_path=folder, read_only=True)
        return answer

    def holder(self, id: str) -> Record | None:
        """The attachment that holds the device of that id; None without a record of it. Raises CniError 5."""
        holder = self.store.reserved_by(deviceid.index_of(id))
        return self.store.load(holder) if holder else None

    def held(self) -> Held:
        """What attachments hold now. Raises CniError 5."""
        claims = Claims(self.settings.run).reserved() if self.settings.dra else ()
        first, indexes = dict(self.store.functions_held()), dict(self.store.reserved())
        # An attachment reserves its index before its VF and releases it after: a VF that is held before and after the
        # indexes are listed has its index in the list.
        functions = {pci: id for pci, id in first.items() if self.store.function_held_by(pci) == id}
        return Held(functions, indexes, claims)


class Resource(services.DevicePluginServicer):
    """Serves the devices of one interface until close(). path: of the socket, which exists once this returns.

    watching: called in a gRPC thread when a ListAndWatch stream begins or ends. Raises RuntimeError if the socket
    cannot be made.
    """

    def __init__(
        self,
        name: str,
        interface: str,
        devices: tuple[Device, ...],
        answers: Answers,
        path: str,
        *,
        watching: Callable[[], None],
    ) -> None:
        self.name = name
        self.path = path
        self.lost = False
        """Whether the kubelet has ended a stream: it has then marked all devices of the resource unhealthy."""
        self._watching = watching
        self._streams = 0
        self._answers = answers
        self._changed = threading.Condition()
        self._interface = interface
        self._devices = devices
        self._version = 0
        self._ending = False
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="device-plugin")
        self._server = grpc.server(self._threads)
        services.add_DevicePluginServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    @property
    def watched(self) -> bool:
        """Whether the kubelet has a ListAndWatch stream open, and has ended none."""
        return self._streams > 0 and not self.lost

    def show(self, devices: tuple[Device, ...]) -> None:
        """Set the devices, and send them to the kubelets that watch if they have changed."""
        with self._changed:
            if devices != self._devices:
                self._devices = devices
                self._version += 1
                self._changed.notify_all()

    def close(self, *, withdraw: bool = False) -> None:
        """Stop to serve. withdraw: first report an empty list; without it the kubelet expects the devices to return."""
        with self._changed:
            if withdraw:
                self._devices = ()
            self._version += 1
            self._ending = True
            self._changed.notify_all()
        self._server.stop(_GOODBYE_SECONDS if withdraw else None).wait(_GOODBYE_SECONDS + 1)
        self._threads.shutdown(wait=False)

    def _listed(self) -> api.ListAndWatchResponse:
        answer = api.ListAndWatchResponse()
        for number, each in enumerate(self._devices):
            answer.devices.add(
                ID=deviceid.format(self._interface, number),
                health=UNHEALTHY if each.fault or each.claimed else HEALTHY,
                topology=None if each.node is None else api.TopologyInfo(nodes=[api.NUMANode(ID=each.node)]),
            )
        return answer

    def _foreign(self, id: str) -> str | None:
        """Why id is not a device of this resource; None if it is one."""
        parsed, count = deviceid.parse(id), len(self._devices)
        if parsed is None or parsed[0] != self._interface:
            first = deviceid.format(self._interface, 0)
            return f"{id!r} is not a device of {self.name}; the first one is {first}"
        if parsed[1] >= count:
            return f"{id!r} is beyond the capacity of {self.name}, which is {count}"
        return None

    def _refuse(self, context: Context, code: grpc.StatusCode, why: str) -> NoReturn:
        log(WARNING, "allocation refused", resource=self.name, why=why)
        context.abort(code, why)

    # The calls of the kubelet; the names are those of the API

    def GetDevicePluginOptions(self, request: api.Empty, context: Context) -> api.DevicePluginOptions:  # noqa: N802
        return OPTIONS

    def ListAndWatch(self, request: api.Empty, context: Context) -> Iterator[api.ListAndWatchResponse]:  # noqa: N802
        def count(change: int) -> None:
            with self._changed:
                self._streams += change
                self.lost |= change < 0 and not self._ending
                self._changed.notify_all()
            self._watching()

        count(+1)
        if not context.add_callback(lambda: count(-1)):
            count(-1)
            return
        seen = -1
        while True:
            with self._changed:
                while self._version == seen and context.is_active():
                    self._changed.wait()
                if not context.is_active():
                    return
                seen, message, last = self._version, self._listed(), self._ending
            yield message
            if last:
                return

    def GetPreferredAllocation(  # noqa: N802
        self, request: api.PreferredAllocationRequest, context: Context
    ) -> api.PreferredAllocationResponse:
        used = self._answers.held().indexes
        pfs = [each.pf for each in self._devices]
        return api.PreferredAllocationResponse(
            container_responses=[
                api.ContainerPreferredAllocationResponse(
                    deviceIDs=preferred(
                        each.available_deviceIDs, each.must_include_deviceIDs, each.allocation_size, used, pfs
                    )
                )
                for each in request.container_requests
            ]
        )

    def Allocate(self, request: api.AllocateRequest, context: Context) -> api.AllocateResponse:  # noqa: N802
        wanted = [list(each.devices_ids) for each in request.container_requests]
        for id in (id for ids in wanted for id in ids):
            if why := self._foreign(id):
                self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, why)
            # A kubelet calls Allocate when it admits a pod, before the pod is attached, and not when a container
            # restarts (k8s.io/kubernetes, pkg/kubelet/cm/devicemanager/manager.go, devicesToAllocate).
            if holder := self._answers.holder(id):
                held = f"is held by {holder.owner} still, attachment {holder.id}"
                why = f"{id} of {self.name} {held}: wait until it is detached"
                self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, why)
        for ids in wanted:
            self._answers.allocated.inc(self.name, by=len(ids))
            log(INFO, "allocated", resource=self.name, devices=ids)
        return api.AllocateResponse(container_responses=map(self._answers.container, wanted))

    def PreStartContainer(  # noqa: N802
        self, request: api.PreStartContainerRequest, context: Context
    ) -> api.PreStartContainerResponse:
        return api.PreStartContainerResponse()
