"""Registers with the container runtime as an NRI plugin, and again whenever the connection ends.

The runtime reports one event at a time and waits for the answer, by default for two seconds; then it drops the plugin
and goes on as if there were none. So an event that takes longer is answered before that, and its work goes on: whoever
starts the pod's containers must wait for it. An event that fails fails the pod's sandbox, with the error's text.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from logging import ERROR, INFO, WARNING

from google.protobuf.message import DecodeError

from cni.agent.log import log
from cni.agent.nri import nri_pb2 as api
from cni.agent.nri.connection import PLUGIN, REQUEST, RESPONSE, RUNTIME, Connection, Message, ProtocolError
from cni.config.claim import NETWORKS
from cni.dataclass import dataclass
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from google.protobuf.message import Message as Proto

    class Handler(Protocol):
        """What is done about pods. Each method may take long, and may run beside the others."""

        def run(self, pod: Pod) -> None:
            """A sandbox has its network namespace, and no container yet. An exception fails the sandbox."""

        def stop(self, pod: Pod) -> None:
            """A sandbox ends: its containers have ended, its network namespace has not."""

        def synchronize(self, pods: list[Pod]) -> None:
            """The sandboxes that there are, dead ones too, each time that the plugin has connected."""


NAME, INDEX = "vmtap", "10"
"""The plugin's name, and its place among the plugins, which are called in the order of their indexes."""
_PREFIX = "nri.pkg.api.v1alpha1."
_EVENTS = 1 << (api.RUN_POD_SANDBOX - 1) | 1 << (api.STOP_POD_SANDBOX - 1)
_REGISTRATION_SECONDS = 10.0
"""How long the runtime may take to register, configure and synchronize the plugin."""
_RETRY_SECONDS = 1.0
_REQUEST_SECONDS = 2.0
"""What the runtime waits for an answer if it does not state it."""
_MARGIN_SECONDS = 0.3
"""How long before the runtime stops to wait the answer is sent."""
_MOST_LISTED = 64 << 20
"""Bytes of a list of sandboxes, which may take several messages."""
_MOST_JOBS = 64
"""Events whose work goes on at once. One more is answered without work."""
_UNIMPLEMENTED, _INTERNAL, _FAILED = 12, 13, 9  # google.rpc.Code


@dataclass(frozen=True)
class Pod:
    """A sandbox as the runtime describes it."""

    id: str
    namespace: str
    name: str
    uid: str
    netns: str
    """The path of its network namespace; "" if it has none of its own."""
    pid: int
    """Of the sandbox's process; 0 if it has ended, or the runtime has none."""
    networks: str = ""
    """The pod's annotation config.claim.NETWORKS."""


class Client:
    """Runs until stop(). path: of the runtime's socket."""

    def __init__(self, path: str, handler: Handler) -> None:
        self.connected = False
        """Whether the runtime has synchronized the plugin, and so reports each new sandbox."""
        self._path = path
        self._handler = handler
        self._wait = _REQUEST_SECONDS
        self._pods: list[Pod] = []
        """Of a synchronization that takes several messages, of so many bytes together."""
        self._listed = 0
        self._jobs = threading.Semaphore(_MOST_JOBS)
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._logged = ""
        """The failure that was logged last: a runtime without NRI is reported once."""
        self._thread = threading.Thread(target=self._run, name="nri", daemon=True)

    def start(self) -> None:
        """Start the thread that connects."""
        self._thread.start()

    def stop(self) -> None:
        """Disconnect. Work that goes on is not waited for."""
        self._stopping.set()
        if connection := self._connection:
            connection.shut()
        self._thread.join(_RETRY_SECONDS)

    def state(self) -> dict[str, object]:
        """For vmtapctl doctor: whether the plugin is connected, to which socket, and why not."""
        return {"connected": self.connected, "nri": self._path, "nriError": self._logged}

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with Connection(self._path) as connection:
                    self._connection = connection
                    self._serve(connection)
            except (OSError, ProtocolError, DecodeError, CniError) as error:
                self._failed(reason(error))
            except Exception as error:
                log(ERROR, "internal error in the NRI plugin: please report it", error=repr(error))
            finally:
                self.connected, self._connection = False, None
                self._pods, self._listed = [], 0
            self._stopping.wait(_RETRY_SECONDS)

    def _failed(self, error: str) -> None:
        if error != self._logged and not self._stopping.is_set():
            self._logged = error
            log(
                WARNING,
                "no connection to the runtime's NRI: hooks attach claims",
                path=self._path,
                error=error,
            )

    def _serve(self, connection: Connection) -> None:
        """Register, and answer until the connection ends, which raises."""
        if self._stopping.is_set():  # stop() has not seen this connection
            return
        connection.limit(_REGISTRATION_SECONDS)
        register = api.RegisterPluginRequest(plugin_name=NAME, plugin_idx=INDEX)
        request = api.Request(
            service=f"{_PREFIX}Runtime", method="RegisterPlugin", payload=register.SerializeToString()
        )
        connection.send(Message(RUNTIME, 1, REQUEST, request.SerializeToString()))
        for message in connection.receive():
            if (message.channel, message.kind) == (PLUGIN, REQUEST):
                answer = self.answer(message.data)
                connection.send(Message(PLUGIN, message.stream, RESPONSE, answer.SerializeToString()))
                if self.connected:
                    connection.limit(None)
            elif (message.channel, message.kind) == (RUNTIME, RESPONSE):
                response = api.Response.FromString(message.data)
                if response.status.code:
                    raise ProtocolError(f"the runtime refused to register: {response.status.message}")

    def answer(self, data: bytes) -> api.Response:
        """Carry out one call of the runtime's. An error becomes the response's status, except a ProtocolError."""
        try:
            request = api.Request.FromString(data)
            call = self._calls.get(request.method) if request.service == f"{_PREFIX}Plugin" else None
            if call is None:
                what = f"{request.service}/{request.method}"[:200]
                return api.Response(status=api.Status(code=_UNIMPLEMENTED, message=f"vmtap has no {what}"))
            return api.Response(payload=call(self, request.payload).SerializeToString())
        except ProtocolError:
            raise
        except CniError as error:
            return api.Response(status=api.Status(code=_FAILED, message=f"vmtap: {error}"))
        except DecodeError as error:
            return api.Response(status=api.Status(code=_INTERNAL, message=f"vmtap cannot read it: {error}"))
        except Exception as error:
            log(ERROR, "internal error in the NRI plugin: please report it", error=repr(error))
            why = "a fault in vmtap itself: please report it"
            return api.Response(status=api.Status(code=_INTERNAL, message=f"{why}: {type(error).__name__}"))

    def _configure(self, payload: bytes) -> api.ConfigureResponse:
        request = api.ConfigureRequest.FromString(payload)
        self._wait = (request.request_timeout or _REQUEST_SECONDS * 1000) / 1000
        log(INFO, "NRI", runtime=request.runtime_name, version=request.runtime_version, wait=self._wait)
        return api.ConfigureResponse(events=_EVENTS)

    def _synchronize(self, payload: bytes) -> api.SynchronizeResponse:
        request = api.SynchronizeRequest.FromString(payload)
        self._listed += len(payload)
        if self._listed > _MOST_LISTED:
            raise ProtocolError("the runtime's list of sandboxes does not end")
        self._pods += map(_pod, request.pods)
        if not request.more:
            pods, self._pods, self._listed = self._pods, [], 0
            self.connected, self._logged = True, ""
            self._begin(lambda: self._handler.synchronize(pods))
        return api.SynchronizeResponse(more=request.more)

    def _change(self, payload: bytes) -> api.Empty:
        event = api.StateChangeEvent.FromString(payload)
        pod = _pod(event.pod)
        if event.event == api.RUN_POD_SANDBOX:
            self._within(pod, lambda: self._handler.run(pod))
        elif event.event == api.STOP_POD_SANDBOX:
            self._within(pod, lambda: self._handler.stop(pod))
        return api.Empty()

    def _shutdown(self, _: bytes) -> api.Empty:
        return api.Empty()

    _calls: dict[str, Callable[[Client, bytes], Proto]] = {  # noqa: RUF012 - a table of its methods
        "Configure": _configure,
        "Synchronize": _synchronize,
        "StateChange": _change,
        "Shutdown": _shutdown,
    }

    def _within(self, pod: Pod, job: Callable[[], None]) -> None:
        """Do the job, and wait for it as long as the runtime does. Raises what it raises."""
        outcome = self._begin(job)
        try:
            if outcome is None:
                raise TimeoutError
            outcome.result(max(0.0, self._wait - _MARGIN_SECONDS))
        except TimeoutError:
            log(WARNING, "not done within the time of an NRI event", pod=f"{pod.namespace}/{pod.name}")

    def _begin(self, job: Callable[[], None]) -> Future[None] | None:
        """Do the job in a thread; None if too many jobs are being done."""
        if not self._jobs.acquire(blocking=False):
            return None
        outcome: Future[None] = Future()

        def work() -> None:
            try:
                job()
            except CniError as error:
                log(WARNING, "an NRI event failed", error=str(error))
                outcome.set_exception(error)
            except Exception as error:
                log(ERROR, "internal error in the NRI plugin: please report it", error=repr(error))
                outcome.set_exception(error)
            else:
                outcome.set_result(None)
            finally:
                self._jobs.release()

        threading.Thread(target=work, name="nri-event", daemon=True).start()
        return outcome


def _pod(pod: api.PodSandbox) -> Pod:
    paths = [each.path for each in pod.linux.namespaces if each.type == "network"]
    networks = pod.annotations.get(NETWORKS, "")
    return Pod(pod.id, pod.namespace, pod.name, pod.uid, paths[0] if paths else "", pod.pid, networks)
