"""ADD as a transaction that undoes itself.

Its order makes a kill at any moment harmless: the lock, the record, the delegate's lease, the link; where addresses go
on the link, the link before the lease. The record lists what is left of an ADD that was killed, and DEL, GC, the
reconciler or the next ADD end it.
"""

from __future__ import annotations

from cni import lower
from cni.attach import kernel_errors, link, result
from cni.attach import plan as plans
from cni.attach.delete import attempt, end_for, raise_all
from cni.dataclass import replace
from cni.errors import CniError
from cni.kernel import bridge_port, gateways, netns
from cni.spec import DELEGATE_FAILED, INVALID_NETWORK_CONFIG, NAME_IN_USE, VERSIONS
from cni.state import cdi
from cni.state.record import Record, boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cni.attach.call import Call
    from cni.attach.ipam import Delegate
    from cni.attach.plan import Plan
    from cni.config.policy import Grant


def add(call: Call, grant: Grant) -> dict[str, Any]:
    """Make the attachment and return the CNI result. Raises CniError, and then nothing of the attachment is left."""
    assert call.netns is not None  # noqa: S101 - plugin.py opens it for every command but DEL
    store = call.node.store
    delegate = call.delegate()
    if delegate:
        delegate.find()  # before there is anything to undo: without the executable its DEL could not be run either
    # One message for both: each answer of the kernel's costs as much as the look-up.
    source, nsid = call.host.look(grant.source, call.netns)
    if source is None and len(grant.sources) > 1:
        source = call.source(grant)
    plan = plans.decide_for(call, grant, source)
    _check(call, grant, plan)
    store.prepare()
    with store.locked(call.id, yield_turn=call.yield_turn):
        stale = store.load(call.id)
        # Without these the kernel itself refuses a name that is taken (EEXIST), and there is nothing to undo.
        look_first = stale or delegate or plan.device == "tap"
        if look_first and call.host.link(name=call.ifname, nsid=nsid):
            raise CniError(NAME_IN_USE, kernel_errors.name_in_use(call.ifname))
        # A record without a link is left of an ADD that was killed. Its addresses go back before new ones are leased.
        if stale:
            raise_all(end_for(call, stale))
        record = None
        delegated = False
        try:
            record = _record(call, grant, plan, nsid)
            store.save(record)
            if plan.lower and plan.source:
                record = lower.take(
                    call.host, store, record, plan.source, plan.lower, yield_turn=call.yield_turn
                )
            # As the reference plugins do, for a delegate that uses the link, such as dhcp.
            link_first = call.conf.addressing == "link"
            if link_first:
                link.make(call, plan, record)
                record = _latest(call, record)
            leased = result.Result()
            if delegate:
                delegated = True
                leased = _lease(delegate, call.conf.cni_version)
                record = _with_lease(record, leased)
                store.save(record)
            answer = _answer(call, record, leased)  # prevResult may be wrong
            if not link_first:
                link.make(call, plan, record)
            elif record.ips:
                link.put_addresses(call, plan, record)
            store.seal(record)
        except BaseException as error:
            _undo(call, record, error, delegated=delegated)
            raise
        if call.node.added:
            call.node.added(record, call.netns)
        return answer


def _check(call: Call, grant: Grant, plan: Plan) -> None:
    """Check what the node has to say of the plan: the gateway's MAC, the kubelet's allocation. Raises CniError."""
    source, conf = plan.source, call.conf
    if grant.macs and grant.macs.gateway and source and plan.mac in gateways.macs(call.host, source.index):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"mac: {plan.mac} is refused: it is the gateway's on {source.name}; give another",
        )
    if call.node.confirm and conf.device_index and conf.device_id:
        call.yield_turn()
        call.node.confirm(conf.device_id, call.arguments)


def _lease(delegate: Delegate, version: str) -> result.Result:
    """Run the delegate's ADD, whose result must have an address. Raises CniError, 109 without an address."""
    document = delegate.run("ADD") or {}
    found = result.parse(document, version, where=f"the result of ipam.type {delegate.type!r}")
    if found.ips:
        return found
    why = f"install a release of it for cniVersion {version}, or leave ipam out"
    if "ip4" in document or "ip6" in document:
        why = f"ip4 and ip6 are of CNI 0.2.0, and the result is of {document.get('cniVersion') or version}; {why}"
    raise CniError(DELEGATE_FAILED, f"ipam.type {delegate.type!r} returned no address in ips: {why}")


def _with_lease(record: Record, leased: result.Result) -> Record:
    rendered = result.render(leased, VERSIONS[-1])
    routes = tuple(rendered.get("routes", ()))
    return replace(record, ips=tuple(rendered["ips"]), routes=routes, dns=rendered.get("dns"))


def _undo(call: Call, record: Record | None, error: BaseException, *, delegated: bool) -> None:
    """End what there is of an attachment whose ADD failed with error. Raises CniError if that fails as well."""
    if record:
        undone = end_for(call, _latest(call, record), delegated=delegated)
    else:
        undone = attempt(
            call.node.store.forget_id, call.id, call.conf.device_index, keep=call.request.ifindex
        )
    if undone and isinstance(error, CniError):
        left = "; ".join(map(str, undone))
        raise CniError(error.code, error.msg, f"{error.details} (undoing it: {left})".strip()) from error


def _latest(call: Call, record: Record) -> Record:
    """The record as it was last saved: setting up a lower device may have added to it."""
    try:
        return call.node.store.load(record.id) or record
    except CniError:
        return record


def _record(call: Call, grant: Grant, plan: Plan, nsid: int) -> Record:
    assert call.netns is not None  # noqa: S101 - as in add
    conf, store = call.conf, call.node.store
    boot = boot_id()
    device_id = conf.device_id if conf.device_index else None
    wants_node = plan.device == "macvtap" and (
        device_id is not None or conf.owner is not None or conf.group is not None
    )
    ifindex = store.reserve_ifindex(
        call.id, device_id, call.request.ifindex
    )  # last: the caller cannot undo a reservation without a record
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
        handover=call.node.handover and plan.handover,
        node=store.node(ifindex) if wants_node else None,
        config=dict(conf.raw) if conf.ipam else None,
        args=call.request.env.get("CNI_ARGS", ""),
        cni_path=call.request.env.get("CNI_PATH", "") if conf.ipam else "",
        device_id=device_id,
        cdi=cdi.path(call.node.cdi, device_id) if call.node.cdi and device_id else None,
        port=plan.port,
        claim=call.request.ifindex != 0,
    )


def _answer(call: Call, record: Record, leased: result.Result) -> dict[str, Any]:
    """The CNI result: prevResult, and this attachment's interfaces and addresses after it (SPEC section 5)."""
    interfaces = [
        result.Interface(name=record.ifname, mac=record.mac, mtu=record.mtu, sandbox=call.netns_path)
    ]
    if record.device == "tap" and record.source:
        # Not the pair's end in the pod: Multus reports every interface with a sandbox as a network of its own.
        name, _ = bridge_port.veth_names(record.ifindex)
        interfaces.append(
            result.Interface(name=name, mac=bridge_port.host_mac(record.ifindex), mtu=record.mtu)
        )
    own = result.Result(
        interfaces=tuple(interfaces),
        ips=tuple(replace(each, interface=0) for each in leased.ips),
        routes=leased.routes,
        dns=result.parse_dns(call.conf.dns) if call.conf.dns else leased.dns,
    )
    return result.extend(call.conf.prev_result, own, call.conf.cni_version)
