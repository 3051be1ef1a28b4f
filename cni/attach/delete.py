"""DEL, and the end of an attachment for whoever ends it: DEL, GC, an ADD that fails, the reconciler.

Goes on past errors, so that one failing step keeps no other thing alive.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress

from cni import lower
from cni.attach.ipam import Delegate
from cni.dataclass import replace
from cni.errors import CniError, refused
from cni.kernel import bridge_port, netns
from cni.state import cdi
from cni.state.lock import keep_turn
from cni.state.lookup import opened_netns
from cni.state.record import alias, parse_alias

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from cni.attach.call import Call, Node
    from cni.kernel.rtnl import DeleteLink, Rtnl
    from cni.state.record import Record
    from cni.state.store import Store


def delete(call: Call) -> None:
    """End the attachment, whatever there is of it; nothing at all is success (SPEC section 4 "DEL").

    Without the network's name it is the attachment of that container id and ifname in whatever network. Raises CniError
    after every step has been tried.
    """
    if call.conf.name:
        raise_all(_delete(call))
        return
    failed: list[CniError] = []
    for network in _networks(call):
        failed += _delete(replace(call, conf=replace(call.conf, name=network)))
    raise_all(failed)


def _networks(call: Call) -> set[str]:
    """The networks in which there is an attachment of the call's container id and ifname."""
    networks = {record.network for record in call.node.store.of(call.container_id, call.ifname)}
    if call.netns is not None:
        with suppress(OSError):
            link = call.host.link(name=call.ifname, nsid=call.host.nsid(call.netns))
            marked = parse_alias(link.alias) if link else None
            if marked and marked[1:] == (call.container_id, call.ifname):
                networks.add(marked[0])
    return networks


def _delete(call: Call) -> list[CniError]:
    """delete() in the network that the config names. Returns the errors."""
    store = call.node.store
    failed: list[CniError] = []
    with ExitStack() as stack:
        try:
            store.prepare()
            stack.enter_context(store.locked(call.id, yield_turn=call.yield_turn))
        except (CniError, OSError):  # a full or read-only file system must not keep a link alive
            pass
        record = None
        try:
            record = store.load(call.id)
        except CniError as error:
            failed.append(error)
        if record:
            failed += end_for(call, record, tolerant=not record.ips)
        else:
            delegate = call.delegate_after_add(None)
            link_last = call.conf.addressing == "link"
            if link_last:
                failed += _release(delegate, None, tolerant=True)
            failed += attempt(_remove_unrecorded, call)
            if not link_last:
                failed += _release(delegate, None, tolerant=True)
            failed += attempt(store.forget_id, call.id, call.conf.device_index, keep=call.request.ifindex)
            failed += attempt(store.minors.detach, call.id)
    return failed


def end(
    host: Rtnl,
    store: Store,
    record: Record,
    delegate: Delegate | None,
    delete_link: DeleteLink,
    *,
    second: Delegate | None = None,
    tolerant: bool = False,
) -> list[CniError]:
    """Undo everything that record lists: the record last, and only if nothing else is left. Returns the errors.

    The caller holds the attachment's lock. delegate, second, tolerant: as for _release(). Where addresses are on the
    link, it comes first: the plugin may use the link, as dhcp does.
    """
    link_last = record.config is not None and record.config.get("addressing") == "link"
    released = _release(delegate, second, tolerant=tolerant) if link_last else []
    failed = attempt(_remove_links, host, record, delete_link)
    failed += attempt(_remove_filters, record)
    if not failed:
        failed += attempt(lower.release, host, store, record, delete_link)
    if record.cdi:
        failed += attempt(cdi.remove, record.cdi)
    if record.node:
        failed += attempt(store.remove_node, record.ifindex)
        if not failed:
            failed += attempt(store.minors.detach, record.id)
    failed += released if link_last else _release(delegate, second, tolerant=tolerant)
    if not failed:
        failed += attempt(store.forget, record)
    return failed


def _release(delegate: Delegate | None, second: Delegate | None, *, tolerant: bool) -> list[CniError]:
    """Run the IPAM plugin with DEL, if there is one. Returns the errors.

    second: the plugin with another config, to run if it fails with that of the call. tolerant: whether an error is only
    logged, because no address is known to be leased, and the config alone may be the cause.
    """
    failed = attempt(delegate.run, "DEL") if delegate else []
    if failed and second:
        failed = attempt(second.run, "DEL")
    if failed and delegate and tolerant:
        delegate.stderr(f"{failed[0]}; no address was leased by it, so DEL succeeds\n")
        return []
    return failed


def end_for(call: Call, record: Record, *, delegated: bool = True, tolerant: bool = False) -> list[CniError]:
    """end() as part of a call. delegated: whether a delegate may have leased addresses. Returns the errors.

    The delegate gets the call's config if record is of its attachment and its ipam is ADD's. If that fails, or ipam is
    another one, it gets the config that record was added with.
    """
    own = added = None
    if delegated:
        added = delegate_of(record, call.request.env, call.node, call.yield_turn)
        leased_by = (record.config or {}).get("ipam")
        if record.id == call.id and leased_by in (None, call.conf.raw.get("ipam")):
            own = call.delegate_after_add(record)
    second = added if own and call.conf.raw != record.config else None
    delete_link = call.delete_link
    return end(
        call.host, call.node.store, record, own or added, delete_link, second=second, tolerant=tolerant
    )


def delegate_of(
    record: Record, env: Mapping[str, str], node: Node, yield_turn: Callable[[], None] = keep_turn
) -> Delegate | None:
    """The delegate that record was added with, or None. env: what it gets besides the attachment's own variables."""
    if not record.config:
        return None
    import json  # noqa: PLC0415 - nothing else here needs it

    env = {
        **env,
        "CNI_CONTAINERID": record.container_id,
        "CNI_IFNAME": record.ifname,
        "CNI_NETNS": record.netns if os.path.exists(record.netns) else "",
        "CNI_ARGS": record.args,
        "CNI_PATH": env.get("CNI_PATH") or record.cni_path,
    }
    config = json.dumps(record.config).encode()
    kind = str(record.config["ipam"]["type"])
    return Delegate(kind, config, env, node.delegate_seconds, yield_turn, node.delegate_stderr)


def attempt(step: Any, *args: object, **options: object) -> list[CniError]:
    """Run one step of a clean-up that must go on. Returns the error, if there is one."""
    try:
        step(*args, **options)
    except CniError as error:
        return [error]
    except OSError as error:
        return [refused(error, "clean-up is not complete; DEL may be repeated")]
    return []


def raise_all(failed: Iterable[CniError]) -> None:
    """Raise the first error, with the others in its details; do nothing if there is none."""
    errors = list(failed)
    if errors:
        first, *rest = errors
        raise CniError(first.code, first.msg, "; ".join([first.details, *map(str, rest)]).strip("; "))


def _remove_links(host: Rtnl, record: Record, delete_link: DeleteLink) -> None:
    """Delete the record's link if it is there and provably the attachment's. Raises OSError."""
    try:
        link = host.link(index=record.ifindex, nsid=record.nsid)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the namespace has ended, and the link with it
            raise
        link = None
    # It has the alias, whatever its name is now; or it has none yet, because its ADD was killed before.
    if link and (link.alias == record.alias or (not link.alias and link.name == record.ifname)):
        delete_link(host, link.index, record.nsid)
    if record.device == "tap" and record.source:
        bridge_port.remove(host, record.ifindex, record.alias, delete_link)


def _remove_filters(record: Record) -> None:
    """Remove the filters of the record's link, which must not pass frames without them: after it. Raises OSError.

    A later link of that name would have them (nf_tables_api.c, nf_tables_netdev_event, since Linux 6.16).
    """
    if record.port is None:
        return
    from cni.port import guard  # noqa: PLC0415 - few attachments have any

    if record.device == "tap":
        guard.remove(record)
        return
    # Those of a namespace that no path of the record's leads to end with it.
    with opened_netns(record, search=False) as pod:
        if pod is not None:
            with netns.entered(pod):
                guard.remove(record)


def _remove_unrecorded(call: Call) -> None:
    """Delete the attachment's link, which no record speaks of, if its alias proves it. Raises CniError, OSError."""
    if call.netns is None:
        return
    host = call.host
    nsid = host.nsid(call.netns)
    link = host.link(name=call.ifname, nsid=nsid)
    if link is None or link.alias != alias(call.conf.name, call.container_id, call.ifname):
        return
    from cni.lower import unrecorded  # noqa: PLC0415 - a DEL without a record is rare
    from cni.port import guard  # noqa: PLC0415

    call.delete_link(host, link.index, nsid)
    if link.kind == "tun":
        bridge_port.remove(host, link.index, link.alias, call.delete_link)
        guard.remove_of(bridge_port.veth_names(link.index)[0])
    else:
        unrecorded.release(host, link)
        with netns.entered(call.netns, host.fd):
            guard.remove_of(link.name)
