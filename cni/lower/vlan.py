"""VLAN devices of a source that macvtaps share: made when first needed, removed with the last attachment.

A device of ours is known by its name, which has the source's index in it (v5.100, with 802.1ad v5s100), and its alias
says whose VLAN it is. Which attachments use it is what the records say, under a lock of its own. One that somebody else
has made for the same VLAN is used, as the kernel allows no second, and left alone.
Must not decide which VLAN an attachment gets.

Sources: net/8021q/vlan_netlink.c, vlan.c.
"""

from __future__ import annotations

import errno
import re
import struct
from dataclasses import replace

from cni.errors import CniError
from cni.kernel import ipv6
from cni.kernel.rtnl import (
    IFF_NOARP,
    IFF_UP,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINKINFO,
    IFLA_MTU,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTEXT_FILTER_SKIP_STATS,
    RTM_NEWLINK,
    RTM_SETLINK,
    attr,
    attributes,
    link_message,
    nest,
    text,
    u32,
)
from cni.spec import KERNEL_REFUSED, SOURCE_MISSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cni.config.netconf import Vlan
    from cni.kernel.rtnl import Link, Rtnl
    from cni.state.record import Record
    from cni.state.store import Store

_IFLA_VLAN_ID, _IFLA_VLAN_PROTOCOL = 1, 5
_ALIAS = "vmtap: VLAN "
_NAME = re.compile(r"v([0-9a-f]+)([.s])([0-9]+)")


def device(source: Link, tag: Vlan) -> dict[str, Any]:
    """What a record has of the VLAN of that source."""
    name = f"v{source.index:x}{'s' if tag.protocol == '802.1ad' else '.'}{tag.id}"
    return {"device": name, "id": tag.id, "protocol": tag.protocol}


def take(
    host: Rtnl, store: Store, record: Record, source: Link, tag: Vlan, *, waits: Callable[[], None]
) -> Record:
    """The record, which is saved already and so keeps the device, with the device's real name. It is there then.

    Raises CniError 100, OSError.
    """
    assert record.vlan is not None  # noqa: S101 - the caller
    name = record.vlan["device"]
    with store.locked(_lock(name), waits=waits):
        link = host.link(name=name)
        if link is None and (theirs := _make(host, name, source, tag)):
            record = replace(record, vlan=record.vlan | {"device": theirs})
            store.save(record)
        elif link is None or not link.flags & IFF_UP or link.mtu < source.mtu:
            _bring_up(host, name, source, tag)
    return record


def lower(host: Rtnl, record: Record) -> Link:
    """The device that the record's macvtap sits on. Raises CniError 104."""
    assert record.vlan is not None  # noqa: S101 - the caller
    link = host.link(name=record.vlan["device"])
    if link is None:
        raise CniError(
            SOURCE_MISSING, f"VLAN device {record.vlan['device']!r} of {record.source!r} went away"
        )
    return link


def release(
    host: Rtnl,
    store: Store,
    name: str,
    id: str,
    delete_link: Callable[[Rtnl, int, int | None], None],
    *,
    wait: bool = True,
) -> bool:
    """Remove the device if it is ours and no attachment but that of id uses it; whether it was removed.

    Raises CniError, OSError; BlockingIOError: somebody is at work on it, and wait is false.
    """
    if not _NAME.fullmatch(name):
        return False
    with store.locked(_lock(name), wait=wait):
        link = host.link(name=name)
        if link is None or not is_ours(link) or _is_used(host, store, link, id):
            return False
        delete_link(host, link.index, None)
    return True


def is_marked(link: Link) -> bool:
    """is_ours(), and it says so: nobody else's can be taken for it by its name alone."""
    return is_ours(link) and link.alias.startswith(_ALIAS)


def is_ours(link: Link) -> bool:
    """Whether the link is a VLAN device that take() made."""
    named = _NAME.fullmatch(link.name)
    return link.kind == "vlan" and named is not None and int(named[1], 16) == link.lower


def adopt(link: Link) -> dict[str, Any] | None:
    """What a record without a past has of a device of ours; None if it is none."""
    named = _NAME.fullmatch(link.name)
    if named is None or not is_ours(link):
        return None
    protocol = "802.1ad" if named[2] == "s" else "802.1Q"
    return {"device": link.name, "id": int(named[3]), "protocol": protocol}


def _lock(name: str) -> str:
    return f"vlan {name}"  # no id has a space


def _make(host: Rtnl, name: str, source: Link, tag: Vlan) -> str | None:
    """Make it; the name of somebody else's, if there is one for the VLAN already."""
    number, protocol = struct.pack("=H", tag.id), struct.pack("!H", tag.ethertype)
    data = nest(IFLA_INFO_DATA, attr(_IFLA_VLAN_ID, number), attr(_IFLA_VLAN_PROTOCOL, protocol))
    try:
        host.do(
            link_message(
                RTM_NEWLINK,
                text(IFLA_IFNAME, name),
                u32(IFLA_LINK, source.index),
                nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "vlan"), data),
                nlm=NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
            )
        )
    except OSError as error:
        if error.errno == errno.EEXIST and (theirs := _find(host, source, number, protocol)):
            return theirs
        what = f"VLAN {tag.id} of {source.name!r} cannot be made"
        if error.errno == errno.EOPNOTSUPP:
            what += ": boot a kernel with CONFIG_VLAN_8021Q, or look whether the device can have VLANs"
        raise CniError(KERNEL_REFUSED, what, str(error)) from error
    return None


def _bring_up(host: Rtnl, name: str, source: Link, tag: Vlan) -> None:
    """The host itself has no business in the guests' VLAN: neither IPv6 nor ARP."""
    link = host.link(name=name)
    if link is None:
        return
    ipv6.keep_out(name, speaks=False)
    try:
        host.do(
            link_message(
                RTM_SETLINK,
                text(IFLA_IFALIAS, f"{_ALIAS}{tag.id} of {source.name}"),
                u32(IFLA_MTU, source.mtu),
                index=link.index,
                flags=IFF_UP | IFF_NOARP,
                change=IFF_UP | IFF_NOARP,
            )
        )
    except OSError as error:
        if error.errno != errno.ENETDOWN:  # it comes up with its source
            raise


def _find(host: Rtnl, source: Link, number: bytes, protocol: bytes) -> str | None:
    for link in host.links():
        if link.kind != "vlan" or link.lower != source.index:
            continue
        info = attributes(host.details(link.index, RTEXT_FILTER_SKIP_STATS).get(IFLA_LINKINFO, b""))
        data = attributes(info.get(IFLA_INFO_DATA, b""))
        if (data.get(_IFLA_VLAN_ID), data.get(_IFLA_VLAN_PROTOCOL)) == (number, protocol):
            return link.name
    return None


def _is_used(host: Rtnl, store: Store, link: Link, id: str) -> bool:
    """By another attachment, or by a macvtap that no record speaks of: to remove it would cut off a guest."""
    for other in store.records():
        if other.vlan and other.vlan["device"] == link.name and other.id != id:
            return True
    for nsid in host.nsids():
        try:
            pods = host.links(nsid=nsid)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that: it died meanwhile
                raise
            continue
        if any(each.lower == link.index and each.lower_nsid is not None for each in pods):
            return True
    return False
