"""The sockets of the driver: one that the kubelet finds and asks who serves it, and one for its calls.

The names of the sockets are new with each start: an agent that replaces another must not remove the other's, nor lose
its own when the other ends. The socket for registrations is made last, as the kubelet calls it when it appears.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging import ERROR, INFO, WARNING

import grpc

from cni.agent.deviceplugin.sockets import sweep
from cni.agent.dra import registration_pb2 as registry
from cni.agent.dra import registration_pb2_grpc as registry_services
from cni.agent.dra import v1_pb2 as api
from cni.agent.dra import v1_pb2_grpc as v1_services
from cni.agent.dra import v1beta1_pb2_grpc as v1beta1_services
from cni.agent.log import log
from cni.config.claim import DRIVER
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.dra.prepare import Prepared, Preparing
    from cni.agent.metrics import Counter

    Context = grpc.ServicerContext

SERVICES = ("v1.DRAPlugin", "v1beta1.DRAPlugin")
_THREADS = 8
"""A kubelet prepares the claims of several pods at once, and each waits for the API server."""
_STOP_SECONDS = 5.0
_MESSAGE = 1000
"""Characters of an error that an event shows: the rest is cut by the API server."""


class _Plugin:
    """Both versions of the service: they differ in their name only."""

    def __init__(self, preparing: Preparing, calls: Counter) -> None:
        self._preparing, self._calls = preparing, calls

    def NodePrepareResources(  # noqa: N802 - the names are those of the API
        self, request: api.NodePrepareResourcesRequest, context: Context
    ) -> api.NodePrepareResourcesResponse:
        answer = api.NodePrepareResourcesResponse()
        for claim in request.claims:
            entry = answer.claims[claim.uid]
            step = partial(self._preparing.prepare, claim.namespace, claim.name, claim.uid)
            found, entry.error = self._attempt("prepare", claim, step)
            for each in found:
                entry.devices.add(
                    request_names=[each.request],
                    pool_name=each.pool,
                    device_name=each.device,
                    cdi_device_ids=[each.cdi],
                )
        return answer

    def NodeUnprepareResources(  # noqa: N802
        self, request: api.NodeUnprepareResourcesRequest, context: Context
    ) -> api.NodeUnprepareResourcesResponse:
        answer = api.NodeUnprepareResourcesResponse()
        for claim in request.claims:
            step = partial(self._preparing.unprepare, claim.uid)
            answer.claims[claim.uid].error = self._attempt("unprepare", claim, step)[1]
        return answer

    def _attempt(
        self, what: str, claim: api.Claim, step: Callable[[], list[Prepared] | None]
    ) -> tuple[list[Prepared], str]:
        """(what step() returns, "") or ([], the error for the kubelet). One claim's failure is not another's."""
        error, found = "", None
        try:
            found = step()
        except (CniError, OSError) as failure:
            error = reason(failure)[:_MESSAGE]
            log(
                WARNING,
                f"claim not {what}d",
                claim=f"{claim.namespace}/{claim.name}",
                uid=claim.uid,
                error=error,
            )
        except Exception as failure:  # the kubelet must get an answer for each claim
            error = "a fault in vmtap itself: please report it"
            log(ERROR, f"claim not {what}d", uid=claim.uid, error=repr(failure))
        self._calls.inc(what, "error" if error else "success")
        return found or [], error


class _Registration(registry_services.RegistrationServicer):
    def __init__(self, endpoint: str, registered: Callable[[str], None]) -> None:
        self._endpoint, self._registered = endpoint, registered

    def GetInfo(self, request: registry.InfoRequest, context: Context) -> registry.PluginInfo:  # noqa: N802
        return registry.PluginInfo(
            type="DRAPlugin", name=DRIVER, endpoint=self._endpoint, supported_versions=SERVICES
        )

    def NotifyRegistrationStatus(  # noqa: N802
        self, request: registry.RegistrationStatus, context: Context
    ) -> registry.RegistrationStatusResponse:
        if request.plugin_registered:
            log(INFO, "the driver is registered with the kubelet", driver=DRIVER)
        else:
            log(WARNING, "the kubelet refuses the driver", driver=DRIVER, error=request.error)
        self._registered("" if request.plugin_registered else request.error or "it gives no reason")
        return registry.RegistrationStatusResponse()


class Sockets:
    """The two sockets, which exist once this returns. close() removes them.

    kubelet: its folder. registered: called in a gRPC thread after each registration, with the kubelet's error, "" if it
    accepts the driver. Raises RuntimeError, OSError.
    """

    def __init__(
        self, kubelet: str, preparing: Preparing, calls: Counter, registered: Callable[[str], None]
    ) -> None:
        token = os.urandom(4).hex()
        folder, registrations = f"{kubelet}/plugins/{DRIVER}", f"{kubelet}/plugins_registry"
        os.makedirs(folder, mode=0o750, exist_ok=True)
        os.makedirs(registrations, mode=0o750, exist_ok=True)
        sweep(registrations, f"{DRIVER}-")
        sweep(folder, "dra-")
        self.path = f"{registrations}/{DRIVER}-{token}-reg.sock"
        """The socket for registrations."""
        endpoint = f"{folder}/dra-{token}.sock"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dra")
        plugin = _Plugin(preparing, calls)
        self._plugin = grpc.server(self._threads)
        v1_services.add_DRAPluginServicer_to_server(plugin, self._plugin)
        v1beta1_services.add_DRAPluginServicer_to_server(plugin, self._plugin)
        self._plugin.add_insecure_port(f"unix:{endpoint}")
        self._plugin.start()
        self._registration = grpc.server(self._threads)
        registry_services.add_RegistrationServicer_to_server(
            _Registration(endpoint, registered), self._registration
        )
        self._registration.add_insecure_port(f"unix:{self.path}")
        self._registration.start()

    @property
    def there(self) -> bool:
        """Whether the kubelet can find the socket for registrations."""
        return os.path.exists(self.path)

    def close(self) -> None:
        """End both; calls in progress are finished first."""
        for server in (self._registration, self._plugin):
            server.stop(_STOP_SECONDS).wait(_STOP_SECONDS + 1)
        self._threads.shutdown(wait=False)
