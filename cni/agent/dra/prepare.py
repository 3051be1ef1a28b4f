"""Prepares a resource claim for its pod, and undoes that.

NodePrepareResources comes before there is a sandbox: it settles everything that a later attach needs, so that what can
be refused is refused here, where the user sees the reason as an event of the pod. Nothing is attached. It leaves

    what each device has reserved: its interface index, and one of the devices that the device plugin offers of the
    interface, whose index no ADD of the kubelet's gets then; the claim's file (state/claims.py), its metadata
    (metadata.py) and its CDI spec (state/cdi.py)

all of them or none. It may be called again at any time, also by a kubelet that has lost its checkpoint, and after a
reboot. NodeUnprepareResources ends the claim's attachments, if the sandbox's end has not, and removes all of it.
"""

from __future__ import annotations

from contextlib import ExitStack
from logging import INFO

from cni.agent.dra.api import RESOURCE, segment
from cni.agent.log import log
from cni.config import claim as claims
from cni.config import policy as policies
from cni.dataclass import dataclass, replace
from cni.errors import CniError, reason
from cni.lower import vf_discovery
from cni.spec import INVALID_NETWORK_CONFIG, IO_FAILURE, TRY_AGAIN_LATER
from cni.state import cdi, deviceid
from cni.state.claims import Claim, ClaimDevice, Claims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import Any

    from cni.agent.dra.api import Api
    from cni.agent.dra.metadata import Metadata
    from cni.agent.settings import Settings
    from cni.config.policy import Interface, Policy
    from cni.state.store import Store


@dataclass(frozen=True)
class Prepared:
    """One device as the kubelet gets it. request: without the name of a subrequest."""

    request: str
    pool: str
    device: str
    cdi: str
    """The qualified name of the CDI device."""


class Preparing:
    """The claims of this node. Threads may share it; a claim is worked on by one at a time.

    policy: returns the policy in force. attributes: of the devices in the node's slices, by name. allocated: the
    interface indexes of devices that the kubelet has allocated, raises CniError; None without the device plugin.
    end: ends an attachment of a claim, raises CniError.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        metadata: Metadata,
        api: Api,
        *,
        policy: Callable[[], Policy | None],
        attributes: Callable[[], Mapping[str, Any]],
        end: Callable[[Claim, ClaimDevice], None],
        allocated: Callable[[], Collection[int]] | None = None,
    ) -> None:
        self._settings, self._store, self._metadata, self._api = settings, store, metadata, api
        self._policy, self._attributes, self._end, self._allocated = policy, attributes, end, allocated
        self._claims = Claims(settings.run)

    def prepare(self, namespace: str, name: str, uid: str) -> list[Prepared]:
        """Prepare the claim. Raises CniError, whose text is for the pod's owner; then nothing new is left."""
        path = f"{RESOURCE}/namespaces/{segment(namespace)}/resourceclaims/{segment(name)}"
        answer = self._api.get(path)
        if not answer.ok:
            raise answer.failed(f"ResourceClaim {namespace}/{name}")
        found = str((answer.body.get("metadata") or {}).get("uid"))
        if found != uid:
            raise _refusal(
                f"ResourceClaim {namespace}/{name} has UID {found}, and not {uid}: it is another one now"
            )
        pod_name, pod_uid = claims.pod_of(answer.body)
        wanted = [self._device(each, namespace, pod_name, pod_uid) for each in claims.allocated(answer.body)]
        if not wanted:
            raise _refusal(f"ResourceClaim {namespace}/{name} has no device of {claims.DRIVER}")
        in_pod = claims.pod_claim(answer.body) or ""
        claim = Claim(uid, namespace, name, pod_uid, pod_name, tuple(wanted), in_pod)
        allocated = self._allocated() if self._allocated and not self._claims.load(uid) else ()
        with self._store.locked(f"claim/{uid}"):
            before = self._claims.load(uid)
            if before and before.pod_uid != pod_uid:
                self._discard(uid, before)
                before = None
            claim = self._settle(claim, before, answer.body, allocated)
        if claim != before:
            log(INFO, "claim prepared", **_names(claim), devices=[each.device for each in claim.devices])
        return [
            Prepared(each.request.partition("/")[0], each.pool, each.device, cdi.claim_name(uid, number))
            for number, each in enumerate(claim.devices)
        ]

    def unprepare(self, uid: str) -> None:
        """Undo prepare(), whatever is left of it. Raises CniError; what was not removed is by the next call."""
        with self._store.locked(f"claim/{uid}"):
            claim = self._claims.load(uid)
            self._discard(uid, claim)
        if claim:
            log(INFO, "claim unprepared", **_names(claim))

    def _device(self, device: claims.Allocated, namespace: str, pod: str, pod_uid: str) -> ClaimDevice:
        """The device with its network config, authorized; without an interface index. Raises CniError."""
        policy = self._policy()
        if policy is None:
            raise _refusal("this node has no policy file, which a claim needs")
        entry, number = claims.interface_of(policy, device.device)
        source, function = _source(entry, number)
        config = claims.network_config(device, entry, source)
        try:
            conf = claims.parse(config)
            policies.authorize(policy, conf)
        except CniError as error:
            raise CniError(error.code, f"request {device.request}: {error.msg}", error.details) from None
        if conf.ipam and device.ipam_of_claim and policy.ipam_types is None:
            raise _refusal(
                f"request {device.request}: ipam.type: a claim may name an IPAM plugin only if ipamTypes of the policy "
                "lists it; list it there, or set ipam in the DeviceClass"
            )
        pod_words = f"K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod};K8S_POD_UID={pod_uid}"
        return ClaimDevice(
            request=device.request,
            device=device.device,
            pool=device.pool,
            share=device.share,
            ifname=device.ifname,
            ifindex=0,
            mac=conf.mac,
            config=config,
            args=f"IgnoreUnknown=1;{pod_words}",
            function=function,
        )

    def _settle(
        self, claim: Claim, before: Claim | None, document: Mapping[str, Any], allocated: Collection[int]
    ) -> Claim:
        """Reserve and write everything; undone if a step fails. Returns the claim with its interface indexes."""
        ids = [claim.attachment(each) for each in claim.devices]
        kept = {before.attachment(each): each for each in before.devices} if before else {}
        with ExitStack() as undo, ExitStack() as locks:
            for id in sorted(ids):  # a reconciler leaves alone what is locked
                locks.enter_context(self._store.locked(id))
            devices = []
            for id, each in zip(ids, claim.devices, strict=True):
                if id not in kept:
                    undo.callback(self._forget, id)
                known = kept.get(id)
                index = self._store.reserve_ifindex(id, claimed=known.ifindex if known else 0)
                self._reserve_device(id, str(each.config["interface"]), allocated)
                devices.append(replace(each, ifindex=index, mac=known.mac if known else each.mac))
            claim = replace(claim, devices=tuple(devices))
            if before is None:
                undo.callback(self._claims.remove, claim.uid)
                undo.callback(self._metadata.remove, claim.uid)
            if claim != before:
                self._claims.save(claim)
            mounts = self._metadata.write(claim, document, self._attributes())
            cdi.write_claim(self._settings.cdi, claim, mounts, self._settings.hook, self._settings.run)
            undo.pop_all()
        return claim

    def _reserve_device(self, id: str, interface: str, allocated: Collection[int]) -> None:
        """Reserve one device of the interface's capacity, which claims and the kubelet share, unless the id has one.

        Takes the last one: the device plugin prefers the first. VFs are reserved by the ADD. allocated: the indexes of
        the kubelet's. Raises CniError 11 if there is none.
        """
        policy = self._policy()
        entry = next((each for each in policy.interfaces if each.name == interface), None) if policy else None
        if entry is None or entry.functions:
            return
        reserved = dict(self._store.reserved())
        if deviceid.numbers(interface, (index for index, holder in reserved.items() if holder == id)):
            return
        taken = deviceid.numbers(interface, {*reserved, *allocated})
        if len(taken) < entry.devices:
            for number in reversed(range(entry.devices)):
                if number not in taken and self._store.hold(deviceid.ifindex(interface, number), id):
                    return
        raise CniError(
            TRY_AGAIN_LATER,
            f"interface {interface} has {entry.devices} devices, for claims and the device plugin together, and all "
            "are taken: wait until a pod ends, or raise its capacity",
        )

    def _forget(self, id: str) -> None:
        """Remove all that the id has reserved."""
        self._store.forget_id(id, *(number for number, holder in self._store.reserved() if holder == id))

    def _discard(self, uid: str, claim: Claim | None) -> None:
        """Remove all that there is of a claim; its file last, so that a later call finds what is left."""
        for each in claim.devices if claim else ():
            assert claim  # noqa: S101 - for mypy
            self._end(claim, each)
            self._forget(claim.attachment(each))
        try:
            cdi.remove(cdi.claim_path(self._settings.cdi, uid))
        except OSError as error:
            raise CniError(
                IO_FAILURE, f"the CDI spec of claim {uid} cannot be removed", reason(error)
            ) from error
        self._metadata.remove(uid)
        self._claims.remove(uid)


def _source(entry: Interface, number: int | None) -> tuple[str | None, str]:
    """(PF, PCI address or "") of a device that is a virtual function; (None, "") for another one."""
    if not entry.functions or number is None:
        return None, ""
    places = vf_discovery.places(entry.sources, entry.functions.vfs)
    if number >= len(places):
        raise _refusal(
            f"interface {entry.name} has {len(places)} virtual functions now, and number {number} is allocated"
        )
    pf, function = places[number]
    return pf, function.pci if function else ""


def _names(claim: Claim) -> dict[str, object]:
    return {"claim": f"{claim.namespace}/{claim.name}", "uid": claim.uid, "pod": claim.pod_name}


def _refusal(message: str) -> CniError:
    return CniError(INVALID_NETWORK_CONFIG, message)
