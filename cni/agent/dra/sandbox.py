"""Attaches the devices of prepared claims to their pod's sandbox, by ordinary ADDs, and ends them with the sandbox.

Two triggers: the runtime reports a sandbox by NRI (agent/nri); and a container that gets a device of a claim runs the
hook vmtap-hook (shim/vmtap.c) before it starts. The hook is what counts: no container of a claim starts unless its
network namespace has the claim's links, and its device nodes are of these links. It attaches what NRI has not.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from logging import ERROR, WARNING

from cni.agent.dra.container import Container
from cni.agent.log import log
from cni.attach.call import Request
from cni.attach.delete import attempt, raise_all
from cni.config.claim import macs
from cni.dataclass import dataclass, replace
from cni.errors import CniError
from cni.kernel import netns, tapdev
from cni.kernel.rtnl import Rtnl
from cni.names import is_id
from cni.plugin import Response
from cni.spec import (
    INTERNAL,
    INVALID_ENVIRONMENT,
    INVALID_NETNS,
    NO_ATTACHMENT,
    TRY_AGAIN_LATER,
    WRONG_DEVICE,
)
from cni.state import cdi
from cni.state.lock import keep_turn
from cni.state.lookup import find_link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cni.agent.nri.client import Pod
    from cni.state.claims import Claim, ClaimDevice, Claims
    from cni.state.record import Record
    from cni.state.store import Store

CLAIM = "VMTAP_CLAIM"
"""The variable of a hook's request that has the claim's UID."""


@dataclass(frozen=True)
class Sandbox:
    """The network namespace of a pod: an open fd, and the path that its attachments' records get."""

    fd: int
    path: str


class Sandboxes:
    """Safe for threads: a claim's lock, which Prepare and Unprepare take too, keeps two from working on one claim.

    answer: carries out a CNI request; its second argument is called before a wait. attached: called with a claim and
    the records of its devices before a container of it starts; returns whether it has replaced a file that containers
    have mounted; raises CniError. cni_path: the folder of IPAM plugins; cdi: that of CDI files.
    """

    def __init__(
        self,
        store: Store,
        claims: Claims,
        answer: Callable[[Request, Callable[[], None]], Response],
        attached: Callable[[Claim, Sequence[Record]], bool],
        *,
        cni_path: str,
        cdi: str,
    ) -> None:
        self._store = store
        self._claims = claims
        self._answer = answer
        self._report = attached
        self._cni_path = cni_path
        self._cdi = cdi

    # The calls of the NRI plugin

    def run(self, pod: Pod) -> None:
        """Attach the claims of a pod whose sandbox is there. Raises CniError: the sandbox must then not be used."""
        for claim in self._of(pod):
            if not pod.netns:
                raise CniError(
                    INVALID_NETNS,
                    f"{_name(claim)}: pod {pod.namespace}/{pod.name} has no network namespace of its own; do not set "
                    "hostNetwork",
                )
            with _opened(pod.netns) as sandbox:
                self._attach(claim.uid, pod.uid, sandbox, networks=pod.networks)

    def stop(self, pod: Pod) -> None:
        """End what is attached in a sandbox that ends. Raises CniError after every claim has been tried."""
        failed: list[CniError] = []
        for claim in self._of(pod):
            with self._locked(claim.uid):
                for device in claim.devices:
                    record = self._store.load(claim.attachment(device))
                    if record and (record.netns == pod.netns or _leads_to(pod.netns, record.netns_id)):
                        try:
                            self.end(claim, device)
                        except CniError as error:
                            failed.append(error)
        if failed:
            raise failed[0]

    def synchronize(self, pods: list[Pod]) -> None:
        """Attach the claims of sandboxes that were started while no NRI plugin was connected."""
        for pod in pods:
            if not pod.pid and sum(each.uid == pod.uid for each in pods) > 1:
                continue  # an earlier sandbox of the pod, which has ended
            try:
                self.run(pod)
            except CniError as error:  # the hook fails the containers
                log(WARNING, "a claim is not attached", pod=f"{pod.namespace}/{pod.name}", error=str(error))

    # The hook

    def hook(self, request: Request, yield_turn: Callable[[], None] = keep_turn) -> Response:
        """Attach a claim if it is not, and check the container. An error in the response must fail the container."""
        try:
            container = Container.read(request.stdin)
            uid = request.env.get(CLAIM, "")
            if request.netns is None or not is_id(uid):
                raise CniError(INVALID_ENVIRONMENT, "vmtap-hook sent no claim, or no network namespace")
            self._owned(uid, container)
            with _reopened(request.netns, container.netns) as sandbox:
                devices, replaced = self._attach(uid, container.pod, sandbox, yield_turn)
            for path, device in devices.items():
                container.check(path, device)
            if replaced:
                raise CniError(
                    WRONG_DEVICE,
                    f"the container was created before the attach of claim {uid}, and has its former device metadata: "
                    "create the container again",
                )
        except CniError as error:
            return Response(b"", 1, error)
        except Exception as error:  # the container must fail with a reason
            log(ERROR, "internal error in a hook: please report it", error=repr(error))
            return Response(
                b"", 1, CniError(INTERNAL, "a fault in vmtap itself: please report it", repr(error))
            )
        return Response(b"", 0)

    def _owned(self, uid: str, container: Container) -> None:
        """Check that the container's pod is the claim's. Raises CniError 11 or 107."""
        claim = self._claims.load(uid)
        if claim is None:
            raise CniError(TRY_AGAIN_LATER, f"the resource claim {uid} is not prepared on this node")
        if container.pods != {claim.pod_uid}:
            pods = ", ".join(sorted(container.pods)) or "unknown"
            raise CniError(
                WRONG_DEVICE,
                f"{_name(claim)} is prepared for pod {claim.namespace}/{claim.pod_name} (UID {claim.pod_uid}), and the "
                f"container's pod has UID {pods}: a device has one pod; give each pod a claim of its own",
            )

    # Unprepare

    def end(self, claim: Claim, device: ClaimDevice) -> None:
        """End the attachment of a claim's device; none is success. Raises CniError after each step has been tried.

        The caller holds the claim's lock.
        """
        record = self._store.load(claim.attachment(device))
        if record is None:
            return
        failed = attempt(cdi.set_devices, self._cdi, claim.uid, {_path(device): None})
        path = record.netns if _leads_to(record.netns, record.netns_id) else ""
        if error := self._answer(self._request("DEL", claim, device, path), keep_turn).error:
            failed.append(error)
        raise_all(failed)

    # Steps

    def _of(self, pod: Pod) -> list[Claim]:
        """The pod's claims. None if they cannot be read: that must not fail pods without claims, and the hook does."""
        try:
            return self._claims.of_pod(pod.uid) if pod.uid else []
        except CniError as error:
            log(
                WARNING,
                "the claims of a pod cannot be read",
                pod=f"{pod.namespace}/{pod.name}",
                error=str(error),
            )
            return []

    def _attach(
        self,
        uid: str,
        pod_uid: str,
        sandbox: Sandbox,
        yield_turn: Callable[[], None] = keep_turn,
        networks: str = "",
    ) -> tuple[dict[str, tuple[int, int]], bool]:
        """Attach each device of the claim that is not.

        Returns (major, minor) by the device's path in a container, and whether a file in the container was replaced.

        networks: the pod's annotation, of which the hook does not know.
        Raises CniError; what was attached before stays for the next try, and ends with the sandbox.
        """
        found: dict[str, tuple[int, int]] = {}
        with self._locked(uid, yield_turn):
            claim = self._claims.load(uid)
            if claim is None or claim.pod_uid != pod_uid:
                raise CniError(
                    TRY_AGAIN_LATER, f"the resource claim {uid} is not prepared for this pod any more"
                )
            if (settled := _with_macs(claim, networks)) != claim:
                self._claims.save(claim := settled)
            for device in claim.devices:
                node = self._attached(claim, device, sandbox) or self._add(claim, device, sandbox, yield_turn)
                found[_path(device)] = node
            cdi.set_devices(self._cdi, uid, found)
            records = [self._store.load(claim.attachment(device)) for device in claim.devices]
            replaced = self._report(claim, [record for record in records if record])
        return found, replaced

    def _add(
        self, claim: Claim, device: ClaimDevice, sandbox: Sandbox, yield_turn: Callable[[], None]
    ) -> tuple[int, int]:
        """Attach one device. Returns its (major, minor)."""
        where = f"{_name(claim)}, request {device.request}"
        try:
            # Of an earlier sandbox, or of an ADD that was killed.
            if self._store.load(claim.attachment(device)):
                self.end(claim, device)
            else:  # a container that is created meanwhile must not get the numbers of an earlier link
                cdi.set_devices(self._cdi, claim.uid, {_path(device): None})
            request = self._request("ADD", claim, device, sandbox.path, sandbox.fd)
            if error := self._answer(request, yield_turn).error:
                raise error
        except CniError as error:
            raise CniError(error.code, f"{where}: {error.msg}", error.details) from None
        if node := self._attached(claim, device, sandbox):
            return node
        raise CniError(NO_ATTACHMENT, f"{where}: the link {device.ifname} that was made is not there")

    def _attached(self, claim: Claim, device: ClaimDevice, sandbox: Sandbox) -> tuple[int, int] | None:
        """(major, minor) of the device's link, if it is in the sandbox and a finished ADD has made it; None if not."""
        record = self._store.load(claim.attachment(device))
        if (
            record is None
            or record.netns_id != netns.identity(sandbox.fd)
            or record.ifindex != device.ifindex
        ):
            return None
        with suppress(CniError, OSError), Rtnl() as host:  # the link, or meanwhile the record, is gone
            if not self._store.sealed(record.id):
                return None
            link = find_link(host, record)
            index, *node = tapdev.number(sandbox.fd, device.ifname)
            if link and link.name == device.ifname and index == device.ifindex:
                return node[0], node[1]
        return None

    def _request(
        self, command: str, claim: Claim, device: ClaimDevice, path: str, fd: int | None = None
    ) -> Request:
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": claim.uid,
            "CNI_NETNS": path,
            "CNI_IFNAME": device.ifname,
            "CNI_ARGS": device.args,
            "CNI_PATH": self._cni_path,
            "PATH": os.environ.get("PATH", os.defpath),
        }
        config = device.config | ({"mac": device.mac} if device.mac else {})
        stdin = json.dumps(config).encode()
        return Request(env, stdin, netns=fd, ifindex=device.ifindex, function=device.function)

    @contextmanager
    def _locked(self, uid: str, yield_turn: Callable[[], None] = keep_turn) -> Iterator[None]:
        with self._store.locked(f"claim/{uid}", yield_turn=yield_turn):
            yield


@contextmanager
def _opened(path: str) -> Iterator[Sandbox]:
    fd = netns.open_path(path, name="the sandbox's network namespace")
    try:
        yield Sandbox(fd, path)
    finally:
        os.close(fd)


@contextmanager
def _reopened(seen: int, path: str) -> Iterator[Sandbox]:
    """The sandbox of an fd that may be of O_PATH, and stays open."""
    fd = netns.reopen(seen, path, name="the container's network namespace")
    try:
        yield Sandbox(fd, path)
    finally:
        if fd != seen:
            os.close(fd)


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    """Whether path is the network namespace of that (st_dev, st_ino)."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return (status.st_dev, status.st_ino) == identity
    return False


def _with_macs(claim: Claim, networks: str) -> Claim:
    """The claim with the MACs of the pod's annotation. Raises CniError 7 if that is not valid."""
    rest = {key: iter(each) for key, each in macs(networks, claim.in_pod or claim.name).items()}
    devices = [
        replace(each, mac=next(rest.get(each.request.partition("/")[0], iter(())), each.mac))
        for each in claim.devices
    ]
    return replace(claim, devices=tuple(devices))


def _path(device: ClaimDevice) -> str:
    """The path of the device's node in a container."""
    return f"/dev/tap{device.ifindex}"


def _name(claim: Claim) -> str:
    return f"ResourceClaim {claim.namespace}/{claim.name}"
