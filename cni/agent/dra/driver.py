"""The driver's thread: serves the kubelet, and keeps the slices as policy and links are.

It waits for events: of links, of PCI devices, of switches (LLDP), of the folders of the policy, of the kubelet and of
what attachments hold, and registrations. After each it looks at all of it. The slices are compared with the API
server's when they should change, some times after each registration, since the kubelet that starts removes all of the
node's, and else every _AGAIN seconds.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from logging import ERROR, INFO, WARNING

from cni.agent.deviceplugin.links import Links
from cni.agent.deviceplugin.pci import PciEvents
from cni.agent.dra.api import Api
from cni.agent.dra.metadata import Metadata
from cni.agent.dra.prepare import Preparing
from cni.agent.dra.publishing import Publishing
from cni.agent.dra.serving import Sockets
from cni.agent.dra.slices import Node, Pool, count, pool
from cni.agent.dra.status import Status
from cni.agent.dra.switches import Switches
from cni.agent.inotify import Folders
from cni.agent.log import log
from cni.errors import CniError, reason
from cni.kernel import mount
from cni.spec import INVALID_NETWORK_CONFIG
from cni.state.claims import Claims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cni.agent.metrics import Registry
    from cni.agent.policies import Policies
    from cni.agent.settings import Settings
    from cni.state.claims import Claim, ClaimDevice
    from cni.state.record import Record
    from cni.state.store import Store

_STOP_SECONDS = 10.0
_AFTER_REGISTRATION = (0.0, 2.0, 10.0, 40.0)
"""When the slices are compared. A kubelet that starts wipes them at once, and tries that again if it fails."""
_AGAIN = 300.0
_REST_SECONDS = 2.0
_SOONEST, _LATEST = 1.0, 60.0
"""Seconds until a step that failed is tried again."""


class Driver:
    """Works from start() to stop(). end: ends the attachment of a claim's device, under the claim's lock.

    allocated: as of Preparing.
    Raises CniError 7 if the settings or the environment lack what it needs, OSError if event sockets cannot be made.
    """

    def __init__(
        self,
        settings: Settings,
        policies: Policies,
        store: Store,
        registry: Registry,
        *,
        end: Callable[[Claim, ClaimDevice], None],
        allocated: Callable[[], Collection[int]] | None,
    ) -> None:
        if not settings.node:
            raise CniError(
                INVALID_NETWORK_CONFIG,
                "dra: the node's name is missing; give --node, as by the field spec.nodeName of the agent's pod",
            )
        self._api = api = Api(*_server())
        self._settings, self._policies, self._store = settings, policies, store
        self._kubelet = os.path.dirname(settings.kubelet.rstrip("/"))
        self._claims = Claims(settings.run)
        self._metadata = Metadata(settings.run)
        self._status = Status(api, lambda uid: self._claims.load(uid) is not None)
        self._publishing = Publishing(api, settings.node)
        self._preparing = Preparing(
            settings,
            store,
            self._metadata,
            api,
            policy=policies,
            attributes=lambda: {each["name"]: each["attributes"] for each in self._pool.devices},
            end=end,
            allocated=allocated,
        )
        self._pool = Pool([])
        self._published: str | None = None
        """The devices, as JSON, of the last comparison that succeeded."""
        self._due: list[float] = []
        """When to compare next, by time.monotonic(), sorted."""
        self._asked = False
        """Whether the API server has been asked what it stores. It is asked again at each registration."""
        self._registration = False
        """Whether a kubelet has registered the driver since the last look."""
        self._rest = 0.0
        """Until when the slices are not written again, by time.monotonic(): a carrier may come and go all the time."""
        self._failures = 0
        self._registered_at = self._published_at = 0.0
        """By time.time(): since when a kubelet knows the driver, and when the slices were last right. 0: never."""
        self._refused = self._error = ""
        """The kubelet's answer to the registration, and why the slices are not right."""
        self._sockets: Sockets | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dra", daemon=True)
        self._calls = registry.counter(
            "vmtap_dra_claims_total", "Claims that the kubelet had prepared or unprepared.", "call", "result"
        )
        self._failed_publications = registry.counter(
            "vmtap_dra_publish_failures_total", "Attempts to write the node's ResourceSlices that failed."
        )
        for call in ("prepare", "unprepare"):
            for result in ("success", "error"):
                self._calls.inc(call, result, by=0)  # so that the first error is an increase
        registry.computed(
            "vmtap_dra_registered_timestamp_seconds",
            "When the kubelet registered the driver; 0 if it has not.",
            look=lambda: {(): self._registered_at},
        )
        registry.computed(
            "vmtap_dra_published_timestamp_seconds",
            "When the node's ResourceSlices were last found or made as they should be; 0 if never.",
            look=lambda: {(): self._published_at},
        )
        registry.computed(
            "vmtap_dra_devices",
            "Devices of the node's ResourceSlices, each slot of a shared one counted.",
            look=lambda: {(): count(self._pool.devices)},
        )
        registry.computed(
            "vmtap_dra_prepared", "Prepared claims.", look=lambda: {(): len(self._claims.all())}
        )
        self._open(policies.path)

    def _open(self, policy: str) -> None:
        """Open the sources of events; policy: its path. Raises OSError."""
        with ExitStack() as stack:
            self._links = stack.enter_context(closing(Links()))
            self._pci = stack.enter_context(closing(PciEvents()))
            watched = (
                f"{self._kubelet}/plugins_registry",
                os.path.dirname(policy),
                self._store.functions,
                f"{self._settings.run}/claims",
            )
            self._folders = stack.enter_context(closing(Folders(watched)))
            # Without the device plugin, only claims take devices.
            indexes = (f"{self._settings.run}/ifindex",) if self._settings.device_plugin else ()
            self._indexes = stack.enter_context(closing(Folders(indexes)))
            self._switches = stack.enter_context(closing(Switches()))
            sysfs = mount.detached(b"sysfs")
            stack.callback(os.close, sysfs)
            self._sysfs = f"/proc/self/fd/{sysfs}"
            self._woken, self._waker = (stack.enter_context(end) for end in socket.socketpair())
            self._woken.setblocking(False)
            self._waker.setblocking(False)
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Start the threads."""
        self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop the threads and the sockets. Prepared claims stay; the kubelet removes the slices after a while."""
        self._stopping = True
        self._wake()
        self._status.stop()
        self._api.stop()
        self._status.join()
        self._thread.join(_STOP_SECONDS)

    def report(self, claim: Claim, records: Sequence[Record]) -> bool:
        """To be called when the claim's devices are attached, before a container of its pod starts.

        records: of its attachments. The metadata files are complete when this returns, the claim's status later.
        Returns whether a file was replaced, which a container that has been created before does not see. Raises
        CniError 5.
        """
        self._status.report(claim, records)
        return self._metadata.attached(claim, records)

    def state(self) -> dict[str, object]:
        """For vmtapctl doctor. Times are those of time.time(), 0 for never."""
        return {
            "hook": self._settings.hook,
            "kubelet": self._kubelet,
            "registered": self._registered_at,
            "refused": self._refused,
            "published": self._published_at,
            "error": self._error,
            "devices": len(self._pool.devices),
        }

    def _wake(self) -> None:
        with suppress(OSError):  # full: the thread will wake; closed: it has ended
            self._waker.send(b".")

    def _run(self) -> None:
        poll = select.poll()
        for each in (self._links, self._pci, self._folders, self._indexes, self._switches, self._woken):
            poll.register(each, select.POLLIN)
        with self._stack:
            while not self._stopping:
                try:
                    self._look()
                    self._failures = 0
                except Exception as error:  # the API server and the kubelet come and go
                    if not self._stopping:
                        self._failed(error)
                self._wait(poll)
            if self._sockets:
                self._sockets.close()

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        pause = min(_LATEST, _SOONEST * 2.0 ** (self._failures - 1))
        self._rest = time.monotonic() + pause
        self._due = [self._rest]
        level, why = ERROR, repr(error)
        if isinstance(error, OSError | CniError | RuntimeError):
            level, why = WARNING, str(error) if isinstance(error, CniError) else reason(error)
        self._error = why
        log(level, "a step of the driver failed; it is tried again", error=why, seconds=pause)

    def _wait(self, poll: select.poll) -> None:
        """Return at an event that may change the slices, or when the next comparison is due."""
        sources = {str(each["attributes"]["source"]["string"]) for each in self._pool.devices}
        quiet = {
            self._links.fileno(): lambda: self._links.take(sources),
            self._pci.fileno(): self._pci.take,
            self._switches.fileno(): self._switches.take,
        }
        due = self._due[0] if self._due else time.monotonic() + _AGAIN
        poll.modify(self._indexes, select.POLLIN)
        while not self._stopping:
            ready = poll.poll(max(0.0, due - time.monotonic()) * 1000 + 1)
            if {fd for fd, _ in ready} == {self._indexes.fileno()}:  # each ADD: many of them cause one look
                poll.modify(self._indexes, 0)
                due = min(due, time.monotonic() + _REST_SECONDS)
                continue
            with suppress(BlockingIOError):
                self._woken.recv(1 << 10)
            with suppress(OSError):
                if ready and all(fd in quiet and not quiet[fd]() for fd, _ in ready):
                    continue
            return

    def _look(self) -> None:
        self._folders.take()
        self._indexes.take()
        self._links.take()
        self._pci.take()
        self._switches.take()
        if self._sockets and not self._sockets.there:
            log(INFO, "the driver's socket was removed: serving a new one")
            self._sockets.close()
            self._sockets, self._registered_at = None, 0.0
        if self._sockets is None:
            self._sockets = Sockets(self._kubelet, self._preparing, self._calls, self._registered)
        if self._registration or not self._asked:
            self._publishing.ask()
            self._asked = True
        self._compute()
        devices = json.dumps(self._pool.devices)
        now = time.monotonic()
        if self._registration:
            self._registration = False
            self._due = [now + each for each in _AFTER_REGISTRATION]
        if devices != self._published:
            self._due = sorted([*self._due, max(now, self._rest)])
        if self._due[0] > now:
            return
        self._due = [each for each in self._due if each > now]
        shares = self._publishing.shares
        try:
            if self._publishing.publish(self._pool.devices):
                self._rest = time.monotonic() + _REST_SECONDS
        except BaseException:
            self._failed_publications.inc()
            self._published = None
            raise
        self._published, self._published_at, self._error = devices, time.time(), ""
        if self._publishing.shares != shares:
            self._published = None
            self._due = [now]  # an API server that has lost the feature: without shared devices, then
        if self._failures:  # a kubelet that could not wipe the slices does so now
            self._due = sorted([*self._due, *(now + each for each in _AFTER_REGISTRATION[1:])])
        self._due = self._due or [now + _AGAIN]

    def _registered(self, error: str) -> None:
        """Called in a gRPC thread: the driver's own thread alone changes when to compare."""
        self._registered_at, self._refused = 0.0 if error else time.time(), error
        if not error:
            self._registration = True
            self._wake()

    def _compute(self) -> None:
        try:
            policy = self._policies()
        except CniError:  # no valid policy so far: logged where it was read
            policy = None
        claims = self._claims.all()
        links = self._links.by_name()
        node = Node(
            links,
            self._sysfs,
            dict(self._store.functions_held()),
            [each.device for claim in claims for each in claim.devices],
            {claim.attachment(each) for claim in claims for each in claim.devices},
            [index for index, _ in self._store.reserved()],
            self._switches.neighbours(),
        )
        found = pool(policy.interfaces if policy else (), node, shares=self._publishing.shares)
        for name, (why, next_step) in found.left_out.items():
            if self._pool.left_out.get(name) != (why, next_step):
                log(WARNING, "an interface is not in the slices", interface=name, why=why, next=next_step)
        self._pool = found
        sources = {str(each["attributes"]["source"]["string"]) for each in found.devices}
        self._switches.listen({name: links[name].index for name in sources & links.keys()})


def _server() -> tuple[str, int]:
    """The API server's address, from the environment that a kubelet gives to pods. Raises CniError 7."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port.isdecimal():
        raise CniError(
            INVALID_NETWORK_CONFIG,
            "dra: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are missing; run the agent in a pod",
        )
    return host, int(port)
