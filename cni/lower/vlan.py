"""VLAN devices of a source, which macvtaps share: made when first needed, removed with the last attachment.

A device that ADD has made has the source's index in its name (v5.100; for 802.1ad v5s100), and its alias names VLAN and
source. Records show which attachments use it, under a lock for each device. The kernel allows one device for a VLAN: if
somebody else has made it, it is used, and never changed or removed. Must not decide which VLAN an attachment gets.

Sources: net/8021q/vlan_netlink.c, vlan.c.
"""

from __future__ import annotations

import errno
import re
import struct
from contextlib import suppress

from cni.dataclass import replace
from cni.errors import CniError, reason
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
from cni.lower import LowerDevice
from cni.spec import INVALID_NETWORK_CONFIG, KERNEL_REFUSED, SOURCE_BUSY, SOURCE_MISSING
from cni.state.record import VlanDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.config.netconf import Vlan
    from cni.kernel.rtnl import DeleteLink, Link, Rtnl
    from cni.lower import Wanted
    from cni.state.record import Record
    from cni.state.store import Store

_IFLA_VLAN_ID, _IFLA_VLAN_PROTOCOL = 1, 5
_ALIAS = "vmtap: VLAN "
_NAME = re.compile(r"v([0-9a-f]+)([.s])([0-9]+)")


def available(source: str, wanted: Wanted) -> None:
    """Nothing is checked: whether the kernel and the source can have VLANs shows when the device is made."""


def take(
    host: Rtnl, store: Store, record: Record, source: Link, wanted: Wanted, *, yield_turn: Callable[[], None]
) -> Record:
    """Make the device, if it is not there. The record that is returned keeps it, and its MTU.

    Raises CniError 7, 100 or 102, OSError.
    """
    tag = wanted.vlan
    assert tag is not None  # noqa: S101 - lower/__init__.py
    name = f"v{source.index:x}{'s' if tag.protocol == '802.1ad' else '.'}{tag.id}"
    record = replace(record, vlan=VlanDevice(name, tag.id, tag.protocol))
    store.save(record)  # before the device is made: it must not outlive an ADD that is killed
    with store.locked(_lock(name), yield_turn=yield_turn):
        link = host.link(name=name)
        if link and not is_ours(link):
            raise CniError(
                KERNEL_REFUSED, f"link {name!r} is not the VLAN device of {source.name!r}: rename it"
            )
        if link is None and (theirs := _make(host, store, name, source, tag)):
            if source.flags & IFF_UP and not theirs.flags & IFF_UP:  # it comes up with the source
                raise CniError(
                    SOURCE_BUSY,
                    f"VLAN device {theirs.name!r} of {source.name!r} is down, and vmtap did not make it: run 'ip link "
                    f"set {theirs.name} up', or remove it, and vmtap makes one",
                )
            if wanted.mtu and wanted.mtu > theirs.mtu:
                raise CniError(
                    INVALID_NETWORK_CONFIG,
                    f"mtu {wanted.mtu} is more than the {theirs.mtu} of VLAN device {theirs.name!r} of "
                    f"{source.name!r}, which vmtap did not make: give less, or raise the device's",
                )
            device = VlanDevice(theirs.name, tag.id, tag.protocol)
            record = replace(record, vlan=device, mtu=min(record.mtu, theirs.mtu))
            store.save(record)
        elif link is None or not link.flags & IFF_UP or link.mtu < source.mtu:
            _bring_up(host, name, source, tag)
    return record


def ready(host: Rtnl, store: Store, record: Record, *, allmulti: bool) -> LowerDevice:
    """The device, which take() has set up. Raises CniError 104."""
    return device(host, record)


def differences(host: Rtnl, record: Record | None, source: Link) -> list[str]:
    """[]: attachments share the device, so nothing of it is an attachment's own."""
    return []


def device(host: Rtnl, record: Record) -> LowerDevice:
    """The device that the record's macvtap sits on. Raises CniError 104."""
    assert record.vlan is not None  # noqa: S101 - lower/__init__.py
    link = host.link(name=record.vlan.device)
    if link is None:
        raise CniError(SOURCE_MISSING, f"VLAN device {record.vlan.device!r} of {record.source!r} went away")
    return LowerDevice(link)


def release(host: Rtnl, store: Store, record: Record, delete_link: DeleteLink) -> None:
    """Remove the device, if ADD has made it and no other attachment uses it. Raises CniError, OSError."""
    assert record.vlan is not None  # noqa: S101 - lower/__init__.py
    remove(host, store, record.vlan.device, record.id, delete_link)


def remove(
    host: Rtnl, store: Store, name: str, id: str, delete_link: DeleteLink, *, wait: bool = True
) -> bool:
    """Remove the device, if ADD has made it and no attachment but that of id uses it; whether it was removed.

    Raises CniError, OSError; BlockingIOError if a request is at work on it, and wait is false.
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
    """Whether the link is a VLAN device that take() has made, by its name and its alias."""
    return is_ours(link) and link.alias.startswith(_ALIAS)


def is_ours(link: Link) -> bool:
    """Whether the link is a VLAN device that take() has made, by its name."""
    named = _NAME.fullmatch(link.name)
    return link.kind == "vlan" and named is not None and int(named[1], 16) == link.lower


def adopt(link: Link) -> VlanDevice | None:
    """The VLAN device for the record of a macvtap on that link; None if take() has not made the link."""
    named = _NAME.fullmatch(link.name)
    if named is None or not is_ours(link):
        return None
    protocol = "802.1ad" if named[2] == "s" else "802.1Q"
    return VlanDevice(link.name, int(named[3]), protocol)


def _lock(name: str) -> str:
    return f"vlan {name}"  # an attachment's id has no space in it


def _make(host: Rtnl, store: Store, name: str, source: Link, tag: Vlan) -> Link | None:
    """Make the device. Returns None, or the device that somebody else has made. Raises CniError 100 or 102."""
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
        what = f"VLAN {tag.id} of {source.name!r}"
        if error.errno == errno.EEXIST:
            if theirs := _find(host, source, number, protocol):
                return theirs
            where = _whereabouts(host, store, source, number, protocol)
            raise CniError(
                SOURCE_BUSY,
                f"{what} has a device in {where}, and the kernel allows one: end what uses it, or give another vlan",
                reason(error),
            ) from error
        why = ""
        if error.errno == errno.EOPNOTSUPP:
            why = ": boot a kernel with CONFIG_VLAN_8021Q, or look whether the device can have VLANs"
        raise CniError(KERNEL_REFUSED, f"{what} cannot be made{why}", reason(error)) from error
    return None


def _bring_up(host: Rtnl, name: str, source: Link, tag: Vlan) -> None:
    """Set the device up, with the source's MTU. The host gets neither IPv6 nor ARP on it: the VLAN is the guests'."""
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
        if error.errno != errno.ENETDOWN:  # the source is down; the device comes up with it
            raise


def _find(host: Rtnl, source: Link, number: bytes, protocol: bytes, nsid: int | None = None) -> Link | None:
    """The device of the VLAN in host's network namespace, or in that of id nsid; None if there is none."""
    for link in host.links(nsid=nsid):
        # A device in another namespace has the source's index with the id that it has for the host's.
        if (link.kind, link.lower, link.lower_nsid is None) != ("vlan", source.index, nsid is None):
            continue
        info = attributes(host.details(link.index, RTEXT_FILTER_SKIP_STATS, nsid).get(IFLA_LINKINFO, b""))
        data = attributes(info.get(IFLA_INFO_DATA, b""))
        if (data.get(_IFLA_VLAN_ID), data.get(_IFLA_VLAN_PROTOCOL)) == (number, protocol):
            return link
    return None


def _whereabouts(host: Rtnl, store: Store, source: Link, number: bytes, protocol: bytes) -> str:
    """The network namespace that the device of the VLAN is in, in words."""
    for nsid in host.nsids():
        with suppress(OSError):  # the namespace has ended since
            if link := _find(host, source, number, protocol, nsid):
                netns = next((each.netns for each in store.records() if each.nsid == nsid), "")
                known = netns or f"nsid {nsid} (ip netns list-id)"
                return f"another network namespace, {known}, as {link.name!r}"
    return "another network namespace (ip -all netns exec ip -d link show type vlan)"


def _is_used(host: Rtnl, store: Store, link: Link, id: str) -> bool:
    """Whether another attachment uses the device, or a macvtap that no record speaks of."""
    for other in store.records():
        if other.vlan and other.vlan.device == link.name and other.id != id:
            return True
    for nsid in host.nsids():
        try:
            pods = host.links(nsid=nsid)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the namespace has ended since
                raise
            continue
        if any(each.lower == link.index and each.lower_nsid is not None for each in pods):
            return True
    return False
