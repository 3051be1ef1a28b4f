"""Offers the policy's interfaces to the kubelet while the agent runs.

One thread waits for events: of links (rtnetlink), of PCI devices (uevents), of the folders of the policy, of the
kubelet, of prepared claims and of the VFs that attachments hold (inotify), and answers to registrations. After each it
reconciles:

    policy, links, VFs  → offers → one Resource each, on a socket of its own, kept current
    kubelet.sock        → if it was replaced, or a plugin socket is gone (a new kubelet empties its folder): serve
                          and register again
    an answer           → accepted, or retried after a pause that grows to served.LATEST seconds
    a stream that ends  → serve and register again, after such a pause

A resource counts as registered while the kubelet has a ListAndWatch stream of it open. When the stream of an earlier
plugin of the resource ends, kubelets before the merge of kubernetes/kubernetes#135437 disconnect the client that
registered last, and mark all devices unhealthy (pkg/kubelet/cm/devicemanager/plugin/v1beta1/handler.go, runClient).

Each registration has a socket of its own. An agent that replaces another must not remove the other's socket, nor lose
its own when the other ends. Newer kubelets refuse a socket that they are connected to.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from logging import ERROR, INFO, WARNING
from queue import Empty, SimpleQueue

from cni.agent.deviceplugin.devices import Device, Held, devices, offers, suitable
from cni.agent.deviceplugin.links import Links
from cni.agent.deviceplugin.pci import PciEvents
from cni.agent.deviceplugin.registration import Registration
from cni.agent.deviceplugin.served import LATEST, Served
from cni.agent.deviceplugin.serving import CLAIMED, HEALTHY, UNHEALTHY, Answers, Resource
from cni.agent.deviceplugin.sockets import sweep
from cni.agent.inotify import Folders
from cni.agent.log import log
from cni.errors import CniError, reason
from cni.kernel import mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.metrics import Labels, Registry
    from cni.agent.policies import Policies
    from cni.agent.settings import Settings
    from cni.state.store import Store

_STOP_SECONDS = 5.0
_PREFIX = "vmtap-"


class DevicePlugin:
    """Works from start() to stop(). Created before requests are served, so that ADD knows the discovered interfaces.

    Raises CniError or OSError if the event sockets or the sysfs mount cannot be made.
    """

    def __init__(self, settings: Settings, policies: Policies, store: Store, registry: Registry) -> None:
        self._settings = settings
        self._policies = policies
        self._folder = settings.kubelet
        self._socket = f"{settings.kubelet}/kubelet.sock"
        self._token = os.urandom(4).hex()
        self._sockets = 0
        self._served: dict[str, Served] = {}
        self._not_offered: dict[str, tuple[str, str]] = {}
        self._kubelet: tuple[int, ...] | None = ()  # not looked up yet
        self._answered: SimpleQueue[Registration] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device-plugin", daemon=True)

        self._answers = Answers(
            settings,
            store,
            registry.counter(
                "vmtap_device_plugin_allocations_total", "Devices that the kubelet has allocated.", "resource"
            ),
        )
        self._registrations = registry.counter(
            "vmtap_device_plugin_registrations_total", "Registrations that the kubelet took.", "resource"
        )
        self._failures = registry.counter(
            "vmtap_device_plugin_registration_failures_total",
            "Registrations that failed, or whose stream the kubelet ended; each is tried again.",
            "resource",
        )
        registry.computed(
            "vmtap_device_plugin_devices",
            "Devices offered to the kubelet.",
            "resource",
            "health",
            look=self._count,
        )
        registry.computed(
            "vmtap_device_plugin_registered",
            "1 if the kubelet has a ListAndWatch stream of the resource open.",
            "resource",
            look=lambda: {(self._name(name),): each.watched for name, each in list(self._served.items())},
        )
        registry.computed(
            "vmtap_device_plugin_not_offered",
            "Interfaces of the policy that are not offered; the log says why.",
            look=lambda: {(): len(self._not_offered)},
        )

        with ExitStack() as stack:
            self._links = stack.enter_context(closing(Links()))
            self._pci = stack.enter_context(closing(PciEvents()))
            watched = [self._folder, os.path.dirname(policies.path), store.functions]
            watched += [f"{settings.run}/claims"] if settings.dra else []
            self._folders = stack.enter_context(closing(Folders(watched)))
            sysfs = mount.detached(b"sysfs")
            stack.callback(os.close, sysfs)
            self._sysfs = f"/proc/self/fd/{sysfs}"
            self._woken, self._waker = (stack.enter_context(end) for end in socket.socketpair())
            self._woken.setblocking(False)
            self._waker.setblocking(False)
            self._discover()
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and the sockets. The kubelet keeps devices for a while, those of running pods for good."""
        self._stopping = True
        self._wake()
        self._thread.join(_STOP_SECONDS)

    def _wake(self) -> None:
        with suppress(OSError):  # full: the thread will wake; closed: it has ended
            self._waker.send(b".")

    # The loop

    def _run(self) -> None:
        poll = select.poll()
        for each in (self._links, self._pci, self._folders, self._woken):
            poll.register(each, select.POLLIN)
        with self._stack:
            sweep(self._folder, _PREFIX)
            while not self._stopping:
                try:
                    due = self._look()
                except Exception as error:  # the thread must survive any failure: kubelets come and go
                    log(
                        ERROR,
                        "device plugin: a step failed; it is tried again",
                        error=reason(error) if isinstance(error, OSError | CniError) else repr(error),
                    )
                    due = time.monotonic() + LATEST
                self._wait(poll, due)
            for served in self._served.values():
                served.close()

    def _wait(self, poll: select.poll, due: float | None) -> None:
        """Return at an event that may change an offer, or at the time due."""
        sources = {dev for served in self._served.values() for dev in served.offer.sources}
        quiet = {self._links.fileno(): lambda: self._links.take(sources), self._pci.fileno(): self._pci.take}
        while True:
            ready = poll.poll(None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1)
            with suppress(BlockingIOError):
                self._woken.recv(1 << 10)
            with suppress(OSError):  # _look() retries, and reports
                if ready and all(fd in quiet and not quiet[fd]() for fd, _ in ready):
                    continue
            return

    def _look(self) -> float | None:
        """Reconcile once. Returns when to do so without an event, by time.monotonic(); None for never."""
        self._folders.take()
        self._links.take()
        self._pci.take()
        self._take_answers()
        self._discover()
        self._offer()
        kubelet = _identity(self._socket)
        if kubelet != self._kubelet:
            if kubelet is None:
                log(INFO, "no kubelet socket yet: waiting for it", socket=self._socket)
            self._kubelet = kubelet
            for served in self._served.values():
                served.renew()
        for name, served in self._served.items():
            self._serve(name, served)
            self._register(name, served)
        return min((each.due for each in self._served.values() if self._waits(each)), default=None)

    # Policy and links

    def _discover(self) -> None:
        if self._policies.discovers:
            self._policies.discovered(suitable(self._links.by_name(), self._sysfs))

    def _offer(self) -> None:
        """Compute the offers of the current policy; withdraw those that it no longer has."""
        try:
            policy = self._policies()
        except CniError:  # no valid policy so far: logged where it was read
            policy = None
        offered, not_offered = offers(policy.interfaces if policy else ())
        for name, (why, next_step) in not_offered.items():
            if self._not_offered.get(name) != (why, next_step):
                log(
                    WARNING,
                    "interface is not offered to the kubelet",
                    interface=name,
                    why=why,
                    next=next_step,
                )
        self._not_offered = not_offered
        for name in self._served.keys() - {offer.name for offer in offered}:
            self._withdraw(name)
        links = self._links.by_name()
        wanted = self._settings.dra or any(offer.virtual for offer in offered)
        held = self._answers.held() if wanted else Held()
        for offer in offered:
            now = devices(offer, links, self._sysfs, held)
            served = self._served.get(offer.name)
            if served is None:
                served = self._served[offer.name] = Served(offer)
                log(INFO, "interface is offered", **self._fields(Served(offer, now)))
            elif served.offer != offer or len(served.devices) != len(now):
                log(INFO, "offer of an interface changed", **self._fields(Served(offer, now)))
            before, served.offer, served.devices = served.devices, offer, now
            _log_health(before, now, self._fields(served))
            if served.resource:
                served.resource.show(now)

    def _withdraw(self, name: str) -> None:
        served = self._served.pop(name)
        log(INFO, "interface is withdrawn", **self._fields(served))
        served.close(withdraw=True)

    # The kubelet

    def _serve(self, name: str, served: Served) -> None:
        if served.resource and not os.path.exists(served.resource.path):
            log(INFO, "the plugin's socket was removed: serving a new one", **self._fields(served))
            served.renew()
        elif served.resource and served.resource.lost:
            served.forgive()
            self._failed(served, "the kubelet ended its ListAndWatch stream")
        if served.resource or served.due > time.monotonic() or not os.path.isdir(self._folder):
            return
        self._sockets += 1
        path = f"{self._folder}/{_PREFIX}{self._token}-{self._sockets}.sock"
        try:
            served.resource = Resource(
                self._name(name), name, served.devices, self._answers, path, watching=self._wake
            )
        except RuntimeError as error:
            self._failed(served, f"{path} cannot be served: {error}")

    def _waits(self, served: Served) -> bool:
        """Whether something is to be done for the resource at the time due."""
        if served.watched or served.pending:
            return False
        return self._kubelet is not None if served.resource else os.path.isdir(self._folder)

    def _register(self, name: str, served: Served) -> None:
        if not served.resource or not self._waits(served) or served.due > time.monotonic():
            return
        if served.accepted:
            self._failed(served, "the kubelet accepted the registration, and opened no ListAndWatch stream")
        else:
            served.pending = Registration(self._socket, name, served.resource, self._answer)

    def _answer(self, registration: Registration) -> None:
        """Called in a gRPC thread."""
        self._answered.put(registration)
        self._wake()

    def _take_answers(self) -> None:
        """Apply the kubelet's answers to registrations."""
        while True:
            try:
                registration = self._answered.get_nowait()
            except Empty:
                return
            registration.close()
            served = self._served.get(registration.interface)
            if served is None or served.pending is not registration:
                continue  # the kubelet was replaced meanwhile, or the offer withdrawn
            served.pending = None
            if registration.error and not served.watched:
                self._failed(served, registration.error)
                continue
            served.accept()
            self._registrations.inc(self._name(registration.interface))
            log(INFO, "registered with the kubelet", **self._fields(served))
            if all(each.accepted for each in self._served.values()):
                gc.collect()  # a closed gRPC server leaves reference cycles, which the agent collects rarely

    def _failed(self, served: Served, error: str) -> None:
        served.close()
        self._failures.inc(self._name(served.offer.name))
        pause = served.later()
        if error != served.error:
            log(WARNING, "not registered; tried again", error=error, seconds=pause, **self._fields(served))
        served.error = error

    # Names and numbers for logs and metrics

    def _name(self, interface: str) -> str:
        return f"{self._settings.resource_namespace}/{interface}"

    def _fields(self, served: Served) -> dict[str, object]:
        source = ", ".join(served.offer.sources)
        return {
            "resource": self._name(served.offer.name),
            "source": source,
            "capacity": len(served.devices),
        }

    def _count(self) -> dict[Labels, float]:
        found: dict[Labels, float] = {}
        for name, served in list(self._served.items()):
            states = [
                UNHEALTHY if each.fault else CLAIMED if each.claimed else HEALTHY for each in served.devices
            ]
            for each in (UNHEALTHY, CLAIMED, HEALTHY):
                found[self._name(name), each] = states.count(each)
        return found


def _log_health(before: tuple[Device, ...], now: tuple[Device, ...], fields: dict[str, object]) -> None:
    """Log the devices whose health has changed: one line for each fault."""
    was = [each.fault for each in before] + [""] * len(now)
    changed: dict[tuple[str, str], list[int]] = {}
    for number, each in enumerate(now):
        if each.fault != was[number]:
            changed.setdefault((each.fault, each.next_step), []).append(number)
    for (why, next_step), numbers in changed.items():
        more = {} if len(numbers) == len(now) else {"devices": numbers}
        if why:
            log(WARNING, "devices are unhealthy", why=why, next=next_step, **fields, **more)
        else:
            log(INFO, "devices are healthy again", **fields, **more)


def _identity(path: str) -> tuple[int, ...] | None:
    """What distinguishes a socket from one that replaces it; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
