"""A virtual function for an attachment: found, taken, set up for its guest, and given back as it was.

take() writes down what the VF was and what it is going to be before anything is changed, so that give_back() can
undo it from the record alone, whatever was killed when; and undoes only what still is as we made it, because a VF
that was taken away and made anew is somebody else's.

The VF's link stays in the host's namespace: a passthru macvtap in the pod sits on it, as macvtaps do on a NIC. Its
alias is the attachment's while it is ours, and the host's own IPv6 and ARP are off on it: it has the guest's MAC.
Must not decide which interface, mode or VLAN an attachment gets.

Sources: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from cni.errors import CniError
from cni.kernel import ipv6, vf
from cni.kernel.rtnl import (
    IFF_ALLMULTI,
    IFF_NOARP,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFALIAS,
    IFLA_MTU,
    RTM_GETADDR,
    RTM_SETLINK,
    Rtnl,
    attr,
    link_message,
    mac_bytes,
    text,
    u32,
)
from cni.spec import (
    INVALID_NETWORK_CONFIG,
    KERNEL_REFUSED,
    MAC_IN_USE,
    SOURCE_BUSY,
    SOURCE_MISSING,
    TRY_AGAIN_LATER,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from cni.config.policy import Functions
    from cni.kernel.rtnl import Link
    from cni.state.record import Record
    from cni.state.store import Store

_SYSFS = "/sys"
_DEVICES = f"{_SYSFS}/bus/pci/devices"
_DRIVERS = f"{_SYSFS}/bus/pci/drivers"
_LOCK = "sriov"
"""Stands where an attachment's id stands; no id is without a dash."""
_NUMBER = re.compile(r"virtfn([0-9]+)")
_RT_SCOPE_LINK = 253
_NO_MAC = "00:00:00:00:00:00"
_TRIES, _PAUSE = 100, 0.05
"""Seconds for a NIC to come back after a reset, at most."""


_FLAGS = IFF_UP | IFF_NOARP | IFF_ALLMULTI
_FRESH = {"flags": 0, "alias": "", "ipv6": True, "pinned": True}
"""A VF's link as its driver makes it."""


@dataclass(frozen=True)
class Function:
    """One VF. link: its network device's name, None while a driver has none in this namespace."""

    pf: str
    number: int
    pci: str
    """The address, "0000:01:10.0"."""
    driver: str | None
    link: str | None
    numa: int
    """-1: the machine does not say."""


def functions(pf: str, sysfs: str = _SYSFS) -> list[Function]:
    """The VFs of a PF, in their order. sysfs: one that shows the PF's namespace, or else the calling thread's."""
    folder = f"{sysfs}/class/net/{pf}/device"
    found = []
    with suppress(FileNotFoundError):
        numbers = sorted(int(match[1]) for match in map(_NUMBER.fullmatch, os.listdir(folder)) if match)
        for number in numbers:
            vf = f"{folder}/virtfn{number}"
            pci = os.path.basename(os.readlink(vf))
            numa = int(_read(f"{vf}/numa_node") or -1)
            found.append(Function(pf, number, pci, _driver(vf), _netdev(vf), numa))
    return found


def places(pool: Iterable[str], vfs: int | None, sysfs: str = _SYSFS) -> list[tuple[str, Function | None]]:
    """The PF and VF of each device number of a kubelet's. None: a VF of vfs that is not made, or whose PF is away.

    So a VF keeps its number when another PF's are made, or go.
    """
    found: list[tuple[str, Function | None]] = []
    for pf in pool:
        found += [(pf, each) for each in functions(pf, sysfs)] or [(pf, None)] * (vfs or 0)
    return found


def most(pf: str, sysfs: str = _SYSFS) -> int:
    """How many VFs the PF could have; 0 if it is no PF."""
    return int(_read(f"{sysfs}/class/net/{pf}/device/sriov_totalvfs") or 0)


def check(entry: Functions) -> None:
    """Raises CniError 7 if none of the pool could have virtual functions."""
    if not any(map(most, entry.pool)):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"type sr-iov: source {', '.join(entry.pool)} has no virtual functions: it is no SR-IOV PF",
        )


def take(
    host: Rtnl,
    store: Store,
    record: Record,
    entry: Functions,
    *,
    number: int | None = None,
    waits: Callable[[], None],
) -> Record:
    """Choose a free VF and write it into the record, which is saved. Nothing of the VF is changed yet.

    record.mode is what the embedded switch must do. number: the one that the
    device plugin has given to the pod, counted through the pool. Raises CniError 11 if none is free, 102 if others use
    the PF in another mode, 103 if another VF has the MAC, 7 or 100 if the NIC cannot do it.
    """
    with store.locked(_LOCK, waits=waits):
        for name in entry.pool:
            _make(name, entry.vfs, waits)
        everything = places(entry.pool, entry.vfs)
        busy: dict[str, str] = {}
        for at, (_, each) in enumerate(everything):
            if each is None or (number is not None and at != number):
                continue
            if why := _why_busy(host, store, each):
                busy[each.pci] = why
                continue
            pf = host.link(name=each.pf)
            if pf is None:  # renamed while we looked
                continue
            _check_switch(host, store, pf, str(record.mode))
            before = vf.settings(host, pf.index)
            for other, has in before.items():
                if has["mac"] == record.mac and other != each.number:
                    raise CniError(
                        MAC_IN_USE,
                        f"MAC {record.mac} is in use on {pf.name!r} by VF {other}: give this VM another",
                    )
            link = _link(host, each.pci)
            if each.number not in before or link is None or not store.hold_function(each.pci, record.id):
                busy[each.pci] = "changing"
                continue
            made = {"mac": record.mac, **entry.settings}
            record = replace(
                record,
                source=pf.name,
                vf={
                    "pci": each.pci,
                    "number": each.number,
                    "driver": each.driver,
                    "before": {name: before[each.number].get(name) for name in made},
                    "made": made,
                    "link": {
                        "mac": link.mac,
                        "mtu": link.mtu,
                        "flags": link.flags & _FLAGS,
                        "alias": link.alias,
                        "ipv6": ipv6.is_on(link.name),
                        "pinned": False,
                    },
                },
            )
            store.save(record)
            return record
    raise _none_free(entry, everything, busy, number)


def set_up(host: Rtnl, store: Store, record: Record, *, allmulti: bool) -> Link:
    """Make the taken VF the guest's; the link to put the passthru macvtap on. Raises CniError 11, 100 or 104.

    Notes in record what only this shows of the VF.
    """
    assert record.vf is not None  # noqa: S101 - the caller
    function, made = record.vf, record.vf["made"]
    pf = _pf(host, function["pci"])
    link = _link(host, function["pci"])
    if pf is None or link is None:
        raise CniError(SOURCE_MISSING, f"VF {function['number']} of {record.source!r} went away")
    what = f"VF {function['number']} of {pf.name!r}"
    if not _set_mac(host, link.index, record.mac):  # now: the PF's word makes some drivers refuse it
        function["link"]["pinned"] = True
        store.save(record)
    now = vf.settings(host, pf.index).get(function["number"], {})
    changes = {name: value for name, value in made.items() if now.get(name) != value}
    changes["mac"] = record.mac  # in any case: it ties the driver to this one
    for name, error in vf.change(host, pf.index, function["number"], changes).items():
        if name == "rate" and _read(f"/sys/class/net/{pf.name}/carrier") != "1":
            raise CniError(
                TRY_AGAIN_LATER, f"{what} can have no rate while {pf.name!r} has no link: look at its cable"
            )
        raise CniError(
            KERNEL_REFUSED,
            f"{what} cannot have {name} {made[name]!r}: this NIC or its driver does not do it",
            str(error),
        )
    link = _with_mac(host, function, record.mac)
    if link is None:
        raise CniError(
            KERNEL_REFUSED, f"{what} does not take the MAC {record.mac}, not even when bound again"
        )
    ipv6.keep_out(link.name, speaks=False)
    host.do(
        link_message(
            RTM_SETLINK,
            text(IFLA_IFALIAS, record.alias),
            u32(IFLA_MTU, max(link.mtu, record.mtu)),
            index=link.index,
            flags=IFF_UP | IFF_NOARP | (IFF_ALLMULTI if allmulti else 0),
            change=_FLAGS,
        )
    )
    return link


def give_back(host: Rtnl, store: Store, record: Record) -> None:
    """Undo set_up(), or what there is of it, and let go of the VF. Its macvtap has to be gone.

    A VF that is not there any more is let go of. Raises CniError 100, and keeps it, if it cannot be put right.
    """
    assert record.vf is not None  # noqa: S101 - the caller
    function, made = record.vf, record.vf["made"]
    pci, number = function["pci"], function["number"]
    if os.path.exists(f"{_DEVICES}/{pci}"):
        # None: we were killed between unbind and bind.
        if function["driver"] and _driver(f"{_DEVICES}/{pci}") is None:
            _write(f"{_DRIVERS}/{function['driver']}/bind", pci)
        pf, link = _pf(host, pci), _link(host, pci)
        now = vf.settings(host, pf.index).get(number, {}) if pf else {}
        has_mac = "mac" in made and now.get("mac") == made["mac"]
        marked = link is not None and link.alias == record.alias
        if link and marked:  # so that the host says nothing with the guest's MAC
            host.do(link_message(RTM_SETLINK, index=link.index, change=IFF_UP))
        if pf and has_mac and function["before"]["mac"] != made["mac"]:
            _restore_mac(host, pf, function)
        changes = {
            name: was
            for name, was in function["before"].items()
            if name != "mac" and now.get(name) == made[name] != was and was is not None
        }
        refused = vf.change(host, pf.index, number, changes) if pf else {}
        if (has_mac or marked) and (link := _link(host, pci)):
            _restore_link(host, link, function["link"])
        if refused:
            said = "; ".join(f"{name} {changes[name]!r}: {error}" for name, error in refused.items())
            raise CniError(KERNEL_REFUSED, f"VF {number} of {record.source!r} cannot be given back", said)
    store.release_function(pci, record.id)


def lower(host: Rtnl, record: Record) -> Link | None:
    """The VF's link as it is now."""
    return _link(host, record.vf["pci"]) if record.vf else None


def differences(host: Rtnl, record: Record) -> list[str]:
    """What somebody has changed of the VF since set_up(), in words; [] if nothing. Raises OSError."""
    if record.vf is None or (pf := _pf(host, record.vf["pci"])) is None:
        return ["it is gone"]
    now = vf.settings(host, pf.index).get(record.vf["number"], {})
    made = record.vf["made"]
    return [
        f"{name} is {now.get(name)!r}, and ADD made it {value!r}"
        for name, value in made.items()
        if now.get(name) != value
    ]


def let_go(host: Rtnl, index: int, mark: str) -> None:
    """The same where no record is left, of the link with that index, if its alias is mark: it is free, and down."""
    link = host.link(index=index)
    if link and link.alias == mark:
        _restore_link(host, link, _FRESH | {"mtu": link.mtu})


def adopt(host: Rtnl, link: Link) -> tuple[Link, str, dict[str, Any]] | None:
    """The PF, the mode and what a record without a past has of the VF with that link.

    None if it is none that set_up() made.
    """
    pci = os.path.basename(os.path.realpath(f"{_SYSFS}/class/net/{link.name}/device"))
    pf = _pf(host, pci) if link.alias else None
    each = next((each for each in functions(pf.name) if each.pci == pci), None) if pf else None
    if pf is None or each is None:
        return None
    number = vf.switch_mode(host, pf.index)
    mode = next((name for name, value in vf.SWITCH_MODES.items() if value == number), "bridge")
    was = _FRESH | {"mtu": link.mtu, "mac": link.mac}
    function = {
        "pci": pci,
        "number": each.number,
        "driver": each.driver,
        "before": {},
        "made": {},
        "link": was,
    }
    return pf, mode, function


def _restore_link(host: Rtnl, link: Link, was: Mapping[str, Any]) -> None:
    if was["ipv6"]:
        ipv6.let_in(link.name)
    host.do(
        link_message(
            RTM_SETLINK,
            attr(IFLA_IFALIAS, was["alias"].encode() + b"\0" if was["alias"] else b""),
            u32(IFLA_MTU, was["mtu"]),
            index=link.index,
            flags=was["flags"],
            change=_FLAGS,
        )
    )


def _restore_mac(host: Rtnl, pf: Link, function: Mapping[str, Any]) -> None:
    """Both MACs, the PF's for the VF and the VF's own; and whether the PF has tied the one to the other."""
    number, admin, own = function["number"], function["before"]["mac"], function["link"]["mac"]
    if not function["link"]["pinned"]:
        vf.change(host, pf.index, number, {"mac": _NO_MAC})  # lets the driver choose, where it may be said
        if link := _link(host, function["pci"]):
            _set_mac(host, link.index, own)
    if vf.settings(host, pf.index).get(number, {}).get("mac") != admin:
        vf.change(host, pf.index, number, {"mac": admin})
    _with_mac(host, function, own)


def _with_mac(host: Rtnl, function: Mapping[str, Any], mac: str) -> Link | None:
    """The VF's link when it has that MAC, its driver bound anew if that is what it takes; None if it will not."""
    link = _link(host, function["pci"])
    if link and link.mac != mac:
        _set_mac(host, link.index, mac)
        link = _link(host, function["pci"])
    if (link is None or link.mac != mac) and function["driver"]:
        with suppress(OSError):  # not bound
            _write(f"{_DRIVERS}/{function['driver']}/unbind", function["pci"])
        _write(f"{_DRIVERS}/{function['driver']}/bind", function["pci"])
        link = _link(host, function["pci"])
    return link if link and link.mac == mac else None


def _set_mac(host: Rtnl, index: int, mac: str) -> bool:
    """Whether the driver has taken it."""
    (said,) = host.talk(link_message(RTM_SETLINK, attr(IFLA_ADDRESS, mac_bytes(mac)), index=index))
    return not isinstance(said, OSError)


def _make(pf: str, count: int | None, waits: Callable[[], None]) -> None:
    """VFs where there are none, if the entry says how many. Raises CniError 7 or 100."""
    path = f"/sys/class/net/{pf}/device/sriov_numvfs"
    if count is None or _read(path) != "0":
        return
    if count > most(pf):
        raise CniError(
            INVALID_NETWORK_CONFIG, f"vfs: {count} of {pf!r} is refused: it can have {most(pf)} at most"
        )
    try:
        _write(path, str(count))
    except OSError as error:
        raise CniError(KERNEL_REFUSED, f"{pf!r} cannot make {count} VFs", str(error)) from error
    if not int(_read(f"/sys/class/net/{pf}/flags") or "0", 16) & IFF_UP:
        return
    waits()
    for _ in range(_TRIES):  # the NIC was reset; a driver may set no rate before it has its link again
        if _read(f"/sys/class/net/{pf}/carrier") == "1":
            break
        time.sleep(_PAUSE)


def _check_switch(host: Rtnl, store: Store, pf: Link, mode: str) -> None:
    """The embedded switch in that mode, set if nobody else needs another. Raises CniError 7 or 102."""
    wanted = vf.SWITCH_MODES[mode]
    now = vf.switch_mode(host, pf.index)
    if now == wanted or (now is None and mode == "bridge"):  # one without modes is a plain bridge
        return
    for other in store.records():
        if other.vf and other.source == pf.name and other.mode != mode:
            raise CniError(
                SOURCE_BUSY,
                f"mode {mode}: the embedded switch of {pf.name!r} is in mode {other.mode} for {other.ifname} of "
                f"container {other.container_id} in network {other.network!r}, and has one mode for all",
            )
    try:
        vf.set_switch_mode(host, pf.index, wanted)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"mode {mode} is refused: the embedded switch of {pf.name!r} cannot be put into it, its driver says",
            str(error),
        ) from error


def _why_busy(host: Rtnl, store: Store, function: Function) -> str | None:
    """Who has the VF, in a word; None if it is free."""
    if store.function_held_by(function.pci):
        return "attached"
    link = _link(host, function.pci)
    if link is None:
        return f"with driver {function.driver}" if function.driver else "without a driver"
    if link.alias.startswith("vmtap/"):
        return "attached"
    uppers = [name for name in os.listdir(f"/sys/class/net/{link.name}") if name.startswith("upper_")]
    if link.master or uppers or _has_address(host, link.index):
        return "in use by the host"
    return None


def _has_address(host: Rtnl, index: int) -> bool:
    """Whether the host has given it an IP address, beyond the one that comes by itself."""
    addresses = (struct.unpack_from("=3xBI", body) for body in host.dump(RTM_GETADDR, bytes(8)))  # ifaddrmsg
    return any(of == index and scope != _RT_SCOPE_LINK for scope, of in addresses)


def _none_free(
    entry: Functions,
    everything: list[tuple[str, Function | None]],
    busy: Mapping[str, str],
    number: int | None,
) -> CniError:
    names = ", ".join(entry.pool)
    if number is not None:
        if number >= len(everything):
            return CniError(
                INVALID_NETWORK_CONFIG,
                f"deviceID: VF {number} of {names} was allocated, and there are {len(everything)}",
            )
        pf, each = everything[number]
        what, why = (f"VF {each.number}", busy.get(each.pci, "gone")) if each else ("a VF", "not there")
        return CniError(TRY_AGAIN_LATER, f"{what} of {pf!r}, which was allocated, is {why}")
    there = sum(each is not None for _, each in everything)
    if not there:
        check(entry)
        return CniError(
            TRY_AGAIN_LATER,
            f"{names} has 0 of {sum(map(most, entry.pool))} VFs: make some, or set vfs in the policy",
        )
    words = list(busy.values())
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return CniError(TRY_AGAIN_LATER, f"no VF of {names} is free: of {there}, {counts}")


def _pf(host: Rtnl, pci: str) -> Link | None:
    with suppress(OSError):
        for name in os.listdir(f"{_DEVICES}/{pci}/physfn/net"):
            return host.link(name=name)
    return None


def _link(host: Rtnl, pci: str) -> Link | None:
    for _ in range(_TRIES):
        name = _netdev(f"{_DEVICES}/{pci}")
        if name is None:
            return None
        if link := host.link(name=name):
            return link
        time.sleep(_PAUSE)  # udev has just renamed it
    return None


def _netdev(device: str) -> str | None:
    with suppress(OSError):
        return next(iter(os.listdir(f"{device}/net")), None)
    return None


def _driver(device: str) -> str | None:
    with suppress(OSError):
        return os.path.basename(os.readlink(f"{device}/driver"))
    return None


def _read(path: str) -> str:
    """A sysfs file's line; "" if there is none, or none to be had now."""
    with suppress(OSError), open(path, encoding="ascii") as file:
        return file.read().strip()
    return ""


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
