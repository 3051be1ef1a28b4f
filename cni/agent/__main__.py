"""vmtapd: starts the parts of the agent, and stops them on SIGTERM."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from logging import ERROR, INFO, WARNING

from cni import plugin
from cni.agent import attachment_metrics, health, local_grpc, metrics, node_metrics, server
from cni.agent import log as logs
from cni.agent.broker import Broker
from cni.agent.cgroups import Cgroups
from cni.agent.drift import Drift
from cni.agent.handover import Handover
from cni.agent.http_server import Answer, HttpServer
from cni.agent.link_deletion import LinkDeleter
from cni.agent.log import log
from cni.agent.policies import VARIABLE, Policies
from cni.agent.reconcile.runner import Reconciler
from cni.agent.settings import load as load_settings
from cni.agent.vepa_warning import VepaWarning
from cni.agent.wire import HOOK
from cni.attach.call import Node, Request
from cni.errors import CniError, reason
from cni.kernel import packet
from cni.kernel.netns import libc
from cni.kernel.rtnl import Host
from cni.plugin import Response
from cni.spec import PLUGIN_NOT_AVAILABLE
from cni.state.claims import Claims
from cni.state.lock import keep_turn
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.deviceplugin.allocations import Allocations
    from cni.agent.deviceplugin.offering import DevicePlugin
    from cni.agent.dra.driver import Driver
    from cni.agent.nri.client import Client
    from cni.agent.server import Reply
    from cni.agent.settings import Settings
    from cni.state.record import Record


_GC_THRESHOLD = 20_000
"""Allocations from one garbage collection to the next: a request makes some hundred, hardly any in a cycle."""
_SPARE_HOSTS = 8
"""Host objects (netlink sockets, namespace fds) that are kept for the next requests."""
_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 2
"""glibc gives nearly every thread an arena; the dozens with the device plugin took 2 to 7 MB of 45."""
_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "HOOK")


def _no_reply(response: Response, stderr: bytes) -> None:
    """The reply to a pending DEL, whose shim has ended."""


def _no_hook(request: Request, yield_turn: Callable[[], None]) -> Response:
    return Response(
        b"", 1, CniError(PLUGIN_NOT_AVAILABLE, "dra is off in the agent's settings: no claim is attached")
    )


class Agent:
    """Answers requests: what they need and what outlives them, and the metrics of them."""

    def __init__(
        self, settings: Settings, store: Store, registry: metrics.Registry, handover: Handover | None
    ) -> None:
        self.settings = settings
        self.policies = Policies(settings.policy, os.environ.get(VARIABLE), required=settings.device_plugin)
        self.allocations = _allocations(settings)
        self.groups = Cgroups(settings.cgroup)
        self.node = Node(
            store,
            self.policies,
            settings.delegate_seconds,
            LinkDeleter(),
            settings.cdi if settings.device_route == "cdi" else None,
            self._added,
            delegate_stderr=_delegate_stderr,
            confirm=self.allocations.confirm if self.allocations else None,
            allocated=self.allocations.indexes if self.allocations else None,
            cgroup=self.groups.find,
            handover=handover is not None,
        )
        self.hook: Callable[[Request, Callable[[], None]], Response] = _no_hook
        """Answers the hook of a container that gets a device of a resource claim."""
        self.claims: Callable[[], dict[str, object]] | None = None
        """What the driver of resource claims has reached, if there is one."""
        self._handover = handover
        self._warn = VepaWarning(settings.run)
        self._hosts: list[Host] = []
        """Those not in use: a request takes one, or makes one, and puts it back."""
        self._operations = registry.counter(
            "vmtap_operations_total",
            "CNI requests by what was answered; code 0 is success.",
            "command",
            "code",
        )
        self._seconds = registry.histogram(
            "vmtap_operation_duration_seconds", "How long CNI requests took, delegates included.", "command"
        )
        self._in_flight = registry.gauge("vmtap_operations_in_flight", "CNI requests being carried out now.")
        self._refused = registry.counter(
            "vmtap_connections_refused_total",
            "Connections to the CNI socket that carried no request of ours.",
        )

    def answer(
        self, request: Request, reply: Reply = _no_reply, yield_turn: Callable[[], None] = keep_turn
    ) -> Response:
        """Carry out one request. reply: called with the response; yield_turn: see plugin.handle."""
        begin = time.monotonic()
        self._in_flight.inc()
        carry_out = self.hook if request.called_as == HOOK else self._handle
        response = carry_out(request, yield_turn)
        seconds = time.monotonic() - begin
        stderr = b""
        fields: dict[str, object] = {"ms": round(seconds * 1000, 2)}
        if response.error:
            stderr = f"{request.called_as}: {response.error}\n".encode(errors="backslashreplace")
            fields |= {"code": response.error.code, "error": str(response.error)}
        reply(response, stderr)  # first: the runtime waits for it
        self._in_flight.inc(by=-1)
        self._count(request.env.get("CNI_COMMAND", ""), response.error, seconds)
        log(
            WARNING if response.error else INFO,
            "request",
            command=request.env.get("CNI_COMMAND"),
            container=request.env.get("CNI_CONTAINERID"),
            ifname=request.env.get("CNI_IFNAME"),
            **({"claim": request.env.get("VMTAP_CLAIM")} if request.called_as == HOOK else {}),
            **fields,
        )
        return response

    def _handle(self, request: Request, yield_turn: Callable[[], None]) -> Response:
        try:
            host = self._hosts.pop()
        except IndexError:
            host = Host()
        response = plugin.handle(request, self.node, host, yield_turn)
        if len(self._hosts) < _SPARE_HOSTS:
            self._hosts.append(host)
        else:
            host.close()
        return response

    def _added(self, record: Record, pod_netns: int) -> None:
        """Called by an ADD before its answer: only takes notes."""
        self._warn(record)
        if self._handover:
            self._handover.made(record, pod_netns)

    def served(self, more: bool) -> None:
        """Called after each connection. more: whether another one waits."""
        if self._handover:
            self._handover.wake(busy=more)

    def refused(self, why: str) -> None:
        """Count and log a connection that was not served."""
        self._refused.inc()
        log(WARNING, "refused", why=why)

    def _count(self, command: str, error: CniError | None, seconds: float) -> None:
        known = command if command in _COMMANDS else "other"
        self._operations.inc(known, str(error.code if error else 0))
        self._seconds.observe(seconds, known)

    def policy_error(self) -> str | None:
        """Why the policy file as it is now is not in force; None if it is, or if there need not be one."""
        with suppress(CniError):
            self.policies()
        return str(self.policies.error) if self.policies.error else None


def main() -> int:
    """Run until SIGTERM or SIGINT. The exit status: 0, 64 for wrong settings, 1 if the agent cannot start."""
    try:
        settings = load_settings(sys.argv[1:])
    except CniError as error:
        print(f"vmtapd: {error}", file=sys.stderr)
        return 64
    with suppress(AttributeError):  # another libc than glibc
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # the threads inherit the mask
    logs.start(settings.log_level)
    try:
        return _run(settings)
    except (CniError, OSError) as error:
        log(ERROR, "cannot start", error=reason(error))
        return 1


def _run(settings: Settings) -> int:
    store = Store(settings.run, _note)
    store.prepare()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # For a pidfd of each VM, and queues being sent.
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    folder = f"{settings.run}/agent"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    registry = metrics.Registry()
    logs.declare(registry)
    handover = _handover(settings, store, registry)
    agent = Agent(settings, store, registry, handover)
    node_metrics.declare(registry, store, agent.policies, lambda: agent.policy_error() is None)
    if settings.attachment_metrics:
        attachment_metrics.declare(registry, store)
    agent.policy_error()  # logs it; every ADD reports it, too
    reconciler = Reconciler(
        agent.node, agent.answer, agent.groups, registry, seconds=settings.reconcile_seconds
    )
    reconciler.start()
    if handover:
        handover.start()
    drift = _drift(settings, store, registry, handover)
    if drift:
        drift.start()
    path = f"{folder}/cni.sock"
    lent = _inherited()
    serving = server.Server(
        lent or server.listen(path), agent.answer, agent.refused, agent.served, lent=lent is not None
    )
    broker = Broker(settings.run, registry)
    broker.start()
    plugin = _device_plugin(settings, agent.policies, store, registry)
    parts = [*filter(None, (plugin,)), *_claims(settings, agent, store, registry)]
    gc.collect()
    gc.freeze()  # these objects stay: collections need not visit them
    gc.set_threshold(_GC_THRESHOLD)
    serving.start()
    for part in parts:
        part.start()
    pages = _pages(path, agent, broker, registry)
    _notify("READY=1")
    log(INFO, "ready", socket=path)
    number = signal.sigwait((signal.SIGTERM, signal.SIGINT))
    _notify("STOPPING=1")
    log(INFO, "ending", signal=signal.Signals(number).name)
    for part in parts:
        part.stop()
    broker.stop()
    if not serving.stop(settings.drain_seconds):
        log(WARNING, "requests were still in flight; the reconciler will repair what they leave")
    if drift:
        drift.stop()
    if handover:
        handover.stop()
    reconciler.stop()
    for page in pages:
        page.stop()
    return 0


def _handover(settings: Settings, store: Store, registry: metrics.Registry) -> Handover | None:
    if packet.permitted():
        return Handover(store, registry, seconds=settings.reconcile_seconds)
    log(
        WARNING,
        "without CAP_NET_RAW no guest can be heard: VMs that migrate are lost to neighbours meanwhile",
    )
    return None


def _drift(
    settings: Settings, store: Store, registry: metrics.Registry, handover: Handover | None
) -> Drift | None:
    try:
        return Drift(store, registry, handover=handover, seconds=settings.reconcile_seconds)
    except OSError as error:
        log(WARNING, "links that others change are not put back", error=reason(error))
        return None


def _allocations(settings: Settings) -> Allocations | None:
    """The kubelet's allocations, if the settings have the device plugin on."""
    if not settings.device_plugin:
        return None
    local_grpc.load()
    from cni.agent.deviceplugin.allocations import Allocations  # noqa: PLC0415 - gRPC is 21 MB

    return Allocations(settings)


def _device_plugin(
    settings: Settings, policies: Policies, store: Store, registry: metrics.Registry
) -> DevicePlugin | None:
    """The device plugin, if the settings have it on. Raises CniError, OSError."""
    if not settings.device_plugin:
        if policies.discovers:
            log(WARNING, f"{VARIABLE} requests discovery, which needs the device plugin, and that is off")
        return None
    from cni.agent.deviceplugin.offering import DevicePlugin  # noqa: PLC0415 - gRPC is 21 MB

    return DevicePlugin(settings, policies, store, registry)


def _claims(
    settings: Settings, agent: Agent, store: Store, registry: metrics.Registry
) -> list[Driver | Client]:
    """The driver of Dynamic Resource Allocation and the NRI plugin, if the settings have dra on; sets the agent's hook.

    Raises CniError, OSError.
    """
    if not settings.dra:
        return []
    from cni.agent.dra.driver import Driver  # noqa: PLC0415 - gRPC is 21 MB
    from cni.agent.dra.sandbox import Sandboxes  # noqa: PLC0415
    from cni.agent.nri.client import Client  # noqa: PLC0415

    sandboxes = Sandboxes(
        store,
        Claims(settings.run, _note),
        lambda request, yield_turn: agent.answer(request, yield_turn=yield_turn),
        lambda claim, records: driver.report(claim, records),  # noqa: PLW0108 - made below
        cni_path=os.path.dirname(settings.hook),
        cdi=settings.cdi,
    )
    end, allocated = sandboxes.end, agent.node.allocated
    driver = Driver(settings, agent.policies, store, registry, end=end, allocated=allocated)
    client = Client(settings.nri, sandboxes)
    agent.hook, agent.claims = sandboxes.hook, lambda: driver.state() | client.state()
    return [driver, client]


def _pages(path: str, agent: Agent, broker: Broker, registry: metrics.Registry) -> list[HttpServer]:
    """Serve health and metrics. A server that cannot listen is logged and left out: pods must start all the same."""

    def text() -> Answer:
        warn = "a metric is left out"
        body = registry.render(lambda name, error: log(WARNING, warn, metric=name, error=str(error)))
        return Answer(HTTPStatus.OK, metrics.CONTENT_TYPE, body)

    live = {"socket": lambda: health.served(path), "broker": broker.stuck}
    ready = {**live, "state": agent.node.store.unwritable, "policy": agent.policy_error}
    pages = {
        "metrics": (agent.settings.metrics, {"/metrics": text}),
        "health": (agent.settings.health, {"/healthz": health.page(live), "/readyz": health.page(ready)}),
    }
    if agent.claims:
        pages["health"][1]["/claims"] = health.shown(agent.claims)
    servers = []
    for setting, (address, served) in pages.items():
        if not address:
            continue
        try:
            server = HttpServer(address, served, setting=setting)
        except CniError as error:
            log(ERROR, f"{setting} not served", error=str(error))
            continue
        server.start()
        log(INFO, setting, address=address, port=server.port)
        servers.append(server)
    return servers


def _note(text: str) -> None:
    """Log what the store reports."""
    log(WARNING, "note", what=text)


def _delegate_stderr(text: str) -> None:
    log(INFO, "an IPAM plugin wrote to stderr", text=text)


def _inherited() -> socket.socket | None:
    """The first socket that systemd passed to this process (sd_listen_fds(3)), or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not int(os.environ.get("LISTEN_FDS", "0")):
        return None
    os.set_inheritable(3, False)  # delegates must not inherit it
    return socket.socket(fileno=3)


def _notify(state: str) -> None:
    """Send state to systemd if it listens (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log(WARNING, "systemd cannot be notified", error=reason(error))


if __name__ == "__main__":
    sys.exit(main())
