"""Attachments as transactions: add, delete, check, collect garbage; each undoes what it cannot finish.

The order of an ADD is what makes a kill at any point harmless: the lock, the record, the delegate's lease, the
link. Whatever is left of a killed one is named by its record, and ended by DEL, GC or the next ADD.
Must not read the environment, print, or know how a request arrived.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cni.attach import kernel_errors, result
from cni.attach import plan as plans
from cni.attach.ipam import Delegate
from cni.config import mac as mac_rules
from cni.errors import CniError, refused
from cni.kernel import ipv6, macvtap, netns, tap, tapdev
from cni.kernel.rtnl import (
    IFLA_ADDRESS,
    IFLA_MTU,
    IFLA_TARGET_NETNSID,
    RTM_DELLINK,
    RTM_SETLINK,
    Host,
    Rtnl,
    attr,
    link_message,
    mac_bytes,
    s32,
    u32,
)
from cni.spec import (
    NAME_IN_USE,
    PLUGIN_NOT_AVAILABLE,
    VERSIONS,
)
from cni.state import cdi, deviceid
from cni.state.lock import nothing
from cni.state.record import Record, alias, boot_id
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from cni.attach.plan import Plan
    from cni.config.netconf import NetConf
    from cni.config.policy import Functions, Grant
    from cni.kernel.rtnl import Link

    DeleteLink = Callable[[Rtnl, int, int | None], None]


_KUBEVIRT_UID = 107
"""qemu, user and group, in KubeVirt's launcher image."""


def delete_link(host: Rtnl, index: int, nsid: int | None) -> None:
    """Delete the link of that index, here or in the namespace nsid; already gone is fine. Raises OSError.

    Waits for the kernel's ACK, 15 to 40 ms; agent/link_deletion.py has one that does not.
    """
    where = [] if nsid is None else [s32(IFLA_TARGET_NETNSID, nsid)]
    try:
        host.do(link_message(RTM_DELLINK, *where, index=index))
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL):  # gone meanwhile, alone or with its namespace
            raise


@dataclass(frozen=True)
class Call:
    """One validated request. netns is an open fd of the pod's namespace; None where DEL has none."""

    conf: NetConf
    host: Host
    id: str
    """The attachment's name in the store."""
    container_id: str
    ifname: str
    arguments: Mapping[str, str]
    """CNI_ARGS."""
    netns_path: str
    netns: int | None
    env: Mapping[str, str]
    stdin: bytes
    store: Store
    delegate_seconds: float
    delete_link: DeleteLink = delete_link
    cdi: str | None = None
    """The folder of CDI specs, where devices go to containers by CDI."""
    waits: Callable[[], None] = nothing
    """Called before a wait for a delegate, another request or the end of a link: let others work meanwhile."""
    made: Callable[[Record], None] | None = None
    """Told of an ADD that came to its end."""

    def delegate(self) -> Delegate | None:
        """The IPAM plugin that the config names, or None."""
        if self.conf.ipam is None:
            return None
        return Delegate(str(self.conf.ipam["type"]), self.stdin, self.env, self.delegate_seconds, self.waits)

    def source(self, grant: Grant) -> Link | None:
        """The first device there is of those granted; None if there is none, or none was. Raises OSError."""
        return next(filter(None, (self.host.link(name=name) for name in grant.sources)), None)

    def unlink(self, host: Rtnl, index: int, nsid: int | None) -> None:
        """Delete that link. Raises OSError."""
        self.waits()
        self.delete_link(host, index, nsid)


def add(call: Call, grant: Grant) -> dict[str, Any]:
    """Make the attachment and answer with the CNI result. Raises CniError, and then nothing of it is left."""
    assert call.netns is not None  # noqa: S101 - plugin.py opens it for every command but DEL
    delegate = call.delegate()
    if delegate:
        delegate.find()  # before there is anything to undo: its DEL could not be run either
    # In one message: the kernel's answer to each costs as much again.
    source, nsid = call.host.look(grant.source, call.netns)
    if source is None and len(grant.sources) > 1:
        source = call.source(grant)
    plan = plans.decide(source, call.conf, grant, call.container_id, call.ifname, arguments=call.arguments)
    call.store.prepare()
    with call.store.locked(call.id, waits=call.waits):
        stale = call.store.load(call.id)
        # Else the kernel says so (EEXIST), and there is nothing to undo.
        early = stale or delegate or plan.device == "tap"
        if early and call.host.link(name=call.ifname, nsid=nsid):
            raise CniError(NAME_IN_USE, kernel_errors.name_in_use(call.ifname))
        # A record without a link is that of an ADD that was killed: it ends before its addresses are asked for.
        if stale:
            _raise(_end(call, stale))
        record = None
        delegated = False
        try:
            record = _record(call, grant, plan, nsid)
            call.store.save(record)
            if plan.functions:
                record = _take_function(call, plan.functions, record)
            if plan.offload:
                from cni.lower import offload  # noqa: PLC0415 - most nodes have none

                offload.switch_on(call.store.folder, str(record.source))
            if plan.vlan and plan.source:
                from cni.lower import vlan  # noqa: PLC0415 - for those who ask for one

                record = vlan.take(call.host, call.store, record, plan.source, plan.vlan, waits=call.waits)
            leased = result.Result()
            if delegate:
                delegated = True
                leased = result.parse(
                    delegate.run("ADD") or {},
                    call.conf.cni_version,
                    where=f"the result of ipam.type {delegate.type!r}",
                )
                said = result.render(leased, VERSIONS[-1])
                record = replace(
                    record,
                    ips=tuple(said.get("ips", ())),
                    routes=tuple(said.get("routes", ())),
                    dns=said.get("dns"),
                )
                call.store.save(record)
            answer = _answer(call, record, leased)  # may fail: on what prevResult or the delegate says
            _make(call, plan, record)
            call.store.seal(record)
        except BaseException as error:
            undone = (
                _end(call, record, delegated=delegated)
                if record
                else _attempt(call.store.forget_id, call.id, call.conf.device_index)
            )
            if undone and isinstance(error, CniError):
                left = "; ".join(str(each) for each in undone)
                raise CniError(
                    error.code, error.msg, f"{error.details} (undoing it: {left})".strip()
                ) from error
            raise
        if call.made:
            call.made(record)
        return answer


def delete(call: Call) -> None:
    """End the attachment, whatever of it there is; nothing at all is success (SPEC section 4 "DEL").

    Raises CniError after everything that could be done was done.
    """
    failed: list[CniError] = []
    with ExitStack() as stack:
        try:
            call.store.prepare()
            stack.enter_context(call.store.locked(call.id, waits=call.waits))
        except (CniError, OSError):  # a full or read-only file system must not keep a link alive
            pass
        record = None
        try:
            record = call.store.load(call.id)
        except CniError as error:
            failed.append(error)
        if record:
            failed += _end(call, record)
        else:
            failed += _attempt(_remove_unrecorded, call)
            if delegate := call.delegate():
                failed += _attempt(delegate.run, "DEL")
            failed += _attempt(call.store.forget_id, call.id, call.conf.device_index)
    _raise(failed)


def collect(call: Call) -> None:
    """GC: end this network's attachments that are not among the valid ones (SPEC section 4 "GC").

    Goes on past errors and raises them all at the end. Without a list of the valid ones nothing is ours to end;
    the delegate is asked all the same.
    """
    failed: list[CniError] = []
    if (valid := call.conf.valid_attachments) is not None:
        indexes: dict[str, list[int]] = {id: [] for id in call.store.recorded()}
        for number, id in call.store.reserved():
            indexes.setdefault(id, []).append(number)
        for id, numbers in sorted(indexes.items()):
            failed += _attempt(_collect, call, valid, id, numbers)
    if delegate := call.delegate():
        failed += _attempt(delegate.run, "GC")
    _raise(failed)


def _collect(call: Call, valid: tuple[tuple[str, str], ...], id: str, numbers: Iterable[int]) -> None:
    """End the attachment of that id if it is this network's and not valid, or if nothing is known of it any more."""

    def stays(record: Record) -> bool:
        return record.network != call.conf.name or (record.container_id, record.ifname) in valid

    seen = call.store.load(id)
    if seen and stays(seen):  # without its lock: an ADD of another network may take its time
        return
    with call.store.locked(id, waits=call.waits):
        record = call.store.load(id)
        if record is None:  # an ADD was killed before it wrote one
            call.store.forget_id(id, *numbers)
        elif not stays(record):
            _raise(_end(call, record))


def status(call: Call, grant: Grant) -> None:
    """Raises CniError 50 if an ADD of this config would fail now for want of something on the node."""
    delegate = call.delegate()
    try:
        if delegate:
            delegate.find()
        plan = plans.decide(
            call.source(grant), call.conf, grant, call.container_id, call.ifname, arguments=call.arguments
        )
        if plan.functions:
            from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

            sriov.check(plan.functions)
        if plan.offload:
            from cni.lower import offload  # noqa: PLC0415 - most nodes have none

            offload.check(str(grant.source))
        call.store.prepare()
    except CniError as error:
        raise CniError(PLUGIN_NOT_AVAILABLE, error.msg, error.details) from error
    if delegate:
        delegate.run("STATUS")


def _record(call: Call, grant: Grant, plan: Plan, nsid: int) -> Record:
    assert call.netns is not None  # noqa: S101 - as in add
    conf = call.conf
    boot = boot_id()
    device_id = conf.device_id if conf.device_index else None
    tagged = None
    if plan.vlan and plan.source:
        from cni.lower import vlan  # noqa: PLC0415 - for those who ask for one

        tagged = vlan.device(plan.source, plan.vlan)
    ifindex = call.store.reserve_ifindex(call.id, device_id)  # last: nothing that fails may follow
    wants_node = plan.device == "macvtap" and (
        device_id is not None or conf.owner is not None or conf.group is not None
    )
    return Record(
        network=conf.name,
        container_id=call.container_id,
        ifname=call.ifname,
        netns=call.netns_path,
        netns_id=netns.identity(call.netns),
        nsid=nsid,
        device=plan.device,
        ifindex=ifindex,
        mac=plan.mac,
        mtu=plan.mtu,
        queues=conf.queues,
        boot_id=boot,
        interface=grant.interface,
        source=plan.source.name if plan.source else None,
        mode=plan.mode,
        node=call.store.node(ifindex) if wants_node else None,
        config=dict(conf.raw) if conf.ipam else None,
        args=call.env.get("CNI_ARGS", ""),
        cni_path=call.env.get("CNI_PATH", "") if conf.ipam else "",
        device_id=device_id,
        vlan=tagged,
        cdi=cdi.path(call.cdi, device_id) if call.cdi and device_id else None,
    )


def _take_function(call: Call, functions: Functions, record: Record) -> Record:
    from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

    device = deviceid.parse(call.conf.device_id or "")
    number = device[1] if device else None
    return sriov.take(call.host, call.store, record, functions, number=number, waits=call.waits)


def _make(call: Call, plan: Plan, record: Record) -> None:
    assert call.netns is not None  # noqa: S101 - as in add
    conf = call.conf
    # A plain tap's other end is the pod's kernel itself.
    speaks = conf.addressing == "link" or plan.source is None
    try:
        if record.vf:
            from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

            lower = sriov.set_up(call.host, call.store, record, allmulti=conf.allmulti)
            plan = replace(plan, source=lower, mode="passthru")
        if record.vlan:
            from cni.lower import vlan  # noqa: PLC0415 - for those who ask for one

            plan = replace(plan, source=vlan.lower(call.host, record))
        if plan.device == "macvtap":
            assert plan.source is not None and plan.mode is not None  # noqa: S101 - _plan
            macvtap.create(
                call.host,
                netns=call.netns,
                lower=plan.source,
                ifname=record.ifname,
                ifindex=record.ifindex,
                mode=plan.mode,
                mac=record.mac,
                mtu=record.mtu,
                bcqueuelen=conf.bcqueuelen,
                promisc=conf.promisc,
                allmulti=conf.allmulti,
            )
        else:
            tap.create(
                call.netns,
                ifname=record.ifname,
                ifindex=record.ifindex,
                queues=record.queues,
                owner=conf.owner,
                group=conf.group,
            )
        with netns.entered(call.netns, call.host.fd):
            ipv6.keep_out(record.ifname, speaks=speaks)
            pod = Rtnl()
        with pod:
            if plan.device == "tap":
                _connect(pod, call, plan, record)
            macvtap.bring_up(
                pod, record.ifindex, record.alias, promisc=conf.promisc, allmulti=conf.allmulti, speaks=speaks
            )
        if record.node:
            _, *device = tapdev.number(call.netns, record.ifname)
            # Who is given a device by the kubelet runs as KubeVirt's QEMU does, unless the config says otherwise.
            default = _KUBEVIRT_UID if record.device_id else 0
            owner = default if conf.owner is None else conf.owner
            group = default if conf.group is None else conf.group
            tapdev.make_node(record.node, (device[0], device[1]), owner, group)
            if record.cdi:
                cdi.write(record, (device[0], device[1]), owner, group)
        if conf.addressing == "link" and record.ips:
            call.waits()  # nobody else needs to wait for pyroute2
            from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

            gateways = {
                6 if ":" in ip["gateway"] else 4: ip["gateway"] for ip in record.ips if ip.get("gateway")
            }
            iproute.put_addresses(
                call.netns,
                record.ifindex,
                [ip["address"] for ip in record.ips],
                list(record.routes),
                gateways,
            )
    except OSError as error:
        raise kernel_errors.explain(error, plan, record, call.store) from error


def _connect(pod: Rtnl, call: Call, plan: Plan, record: Record) -> None:
    """Give a tap its address and MTU, and join it to its bridge."""
    assert call.netns is not None  # noqa: S101 - as in add
    # On a bridge the redirect takes every frame before the pod's stack could mistake it for its own.
    address = record.mac if plan.source else mac_rules.of_plain_tap(record.mac)
    pod.do(
        link_message(
            RTM_SETLINK,
            attr(IFLA_ADDRESS, mac_bytes(address)),
            u32(IFLA_MTU, record.mtu),
            index=record.ifindex,
        )
    )
    if plan.source:
        call.waits()  # nobody else needs to wait for pyroute2
        from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

        iproute.join_bridge(
            call.netns,
            tap=record.ifindex,
            mtu=record.mtu,
            bridge=plan.source.index,
            isolated=plan.mode == "pepa",
            alias=record.alias,
        )


def _answer(call: Call, record: Record, leased: result.Result) -> dict[str, Any]:
    """The result: what came before in the chain, and ours after it (SPEC section 5)."""
    interfaces = [
        result.Interface(name=record.ifname, mac=record.mac, mtu=record.mtu, sandbox=call.netns_path)
    ]
    if record.device == "tap" and record.source:
        from cni.kernel import iproute  # noqa: PLC0415 - pyroute2 takes 160 ms to import

        # Not the pair's end in the pod: Multus reports every interface with a sandbox as a network of its own.
        name, _ = iproute.veth_names(record.ifindex)
        interfaces.append(result.Interface(name=name, mac=iproute.host_mac(record.ifindex), mtu=record.mtu))
    own = result.Result(
        interfaces=tuple(interfaces),
        ips=tuple(replace(each, interface=0) for each in leased.ips),
        routes=leased.routes,
        dns=result.parse_dns(call.conf.dns) if call.conf.dns else leased.dns,
    )
    return result.extend(call.conf.prev_result, own, call.conf.cni_version)


def delegate_of(
    record: Record, env: Mapping[str, str], seconds: float, waits: Callable[[], None] = nothing
) -> Delegate | None:
    """The delegate that record was added with, or None. env: what the delegate sees besides the attachment."""
    if not record.config:
        return None
    import json  # noqa: PLC0415 - only here

    env = {
        **env,
        "CNI_CONTAINERID": record.container_id,
        "CNI_IFNAME": record.ifname,
        "CNI_NETNS": record.netns if os.path.exists(record.netns) else "",
        "CNI_ARGS": record.args,
        "CNI_PATH": env.get("CNI_PATH") or record.cni_path,
    }
    return Delegate(
        str(record.config["ipam"]["type"]), json.dumps(record.config).encode(), env, seconds, waits
    )


def end(
    host: Rtnl, store: Store, record: Record, delegate: Delegate | None, delete_link: DeleteLink
) -> list[CniError]:
    """Take back everything that record speaks of; the record last, and only if nothing else is left.

    Wants the attachment's lock to be held. The errors, [] if all of it is gone.
    """
    failed = _attempt(_remove_links, host, record, delete_link)
    if record.vf and not failed:
        from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

        failed += _attempt(sriov.give_back, host, store, record)
    if record.vlan and not failed:
        from cni.lower import vlan  # noqa: PLC0415 - for those who ask for one

        failed += _attempt(vlan.release, host, store, record.vlan["device"], record.id, delete_link)
    if record.cdi:
        failed += _attempt(cdi.remove, record.cdi)
    if record.node:
        failed += _attempt(store.remove_node, record.ifindex)
    if delegate:
        failed += _attempt(delegate.run, "DEL")
    if not failed:
        failed += _attempt(store.forget, record)
    return failed


def _end(call: Call, record: Record, *, delegated: bool = True) -> list[CniError]:
    """end() as part of a call: the call's own delegate hears of it, or the one that record was added with."""
    delegate = (call.delegate() if record.id == call.id else None) or delegate_of(
        record, call.env, call.delegate_seconds, call.waits
    )
    return end(call.host, call.store, record, delegate if delegated else None, call.unlink)


def _remove_links(host: Rtnl, record: Record, delete_link: DeleteLink) -> None:
    """Delete the link that record speaks of if it is there and provably ours."""
    try:
        link = host.link(index=record.ifindex, nsid=record.nsid)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that: no namespace has the id any more, so the link went with it
            raise
        link = None
    # Marked as ours, under whatever name it has now; or killed before it was marked.
    if link and (link.alias == record.alias or (not link.alias and link.name == record.ifname)):
        delete_link(host, link.index, record.nsid)
    if record.device == "tap" and record.source:
        remove_port(host, record.ifindex, record.alias, delete_link)


def _remove_unrecorded(call: Call) -> None:
    """The same by the alias alone, where no record is left."""
    if call.netns is None:
        return
    host = call.host
    nsid = host.nsid(call.netns)
    link = host.link(name=call.ifname, nsid=nsid)
    if link and link.alias == alias(call.conf.name, call.container_id, call.ifname):
        call.unlink(host, link.index, nsid)
        if link.kind == "tun":
            remove_port(host, link.index, link.alias, call.unlink)
        elif link.lower and link.mode == macvtap.MODES["passthru"]:
            from cni.lower import sriov  # noqa: PLC0415 - most nodes have none

            sriov.let_go(host, link.lower, link.alias)


def remove_port(host: Rtnl, ifindex: int, mark: str, delete_link: DeleteLink) -> None:
    """The veth pair of a tap on a bridge: one end takes the other with it."""
    name = f"vth{ifindex:08x}"
    port = host.link(name=name)
    if port and port.kind == "veth" and port.alias in (mark, ""):
        delete_link(host, port.index, None)


def _attempt(step: Any, *args: object) -> list[CniError]:
    """Run one step of a clean-up that must go on: the error, if any."""
    try:
        step(*args)
    except CniError as error:
        return [error]
    except OSError as error:
        return [refused(error, "clean-up is not complete; DEL may be repeated")]
    return []


def _raise(failed: Iterable[CniError]) -> None:
    """Raise the first, with the others in its details."""
    errors = list(failed)
    if errors:
        first, *rest = errors
        raise CniError(first.code, first.msg, "; ".join([first.details, *map(str, rest)]).strip("; "))
