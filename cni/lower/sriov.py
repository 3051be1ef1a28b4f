"""A virtual function for an attachment: found, taken, set up for its guest, and given back as it was.

take() records what the VF was and what it is going to be before anything is changed. So release() can undo it from the
record alone, whatever was killed at any moment. It undoes only what still is as ADD made it: a VF that was removed and
made again belongs to somebody else.

The VF's link stays in the host's network namespace; a passthru macvtap in the pod sits on it, as macvtaps sit on a NIC.
While an attachment has the VF, the link has the attachment's alias and the guest's MAC, and the host's own IPv6 and ARP
are off on it. Must not decide which interface, mode or VLAN an attachment gets.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from cni.dataclass import replace
from cni.errors import CniError, reason
from cni.kernel import ipv6, vf
from cni.kernel.rtnl import (
    IFF_ALLMULTI,
    IFF_NOARP,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFALIAS,
    IFLA_MTU,
    RTM_SETLINK,
    attr,
    link_message,
    mac_bytes,
    text,
    u32,
)
from cni.kernel.sysfs import read
from cni.kernel.vf_settings import VfSettings
from cni.lower import LowerDevice
from cni.lower.vf_choice import check_pool, check_switch, none_free, of_whom, why_busy
from cni.lower.vf_discovery import SYSFS, driver, functions, most, pf_link, places, vf_link
from cni.spec import (
    INVALID_NETWORK_CONFIG,
    KERNEL_REFUSED,
    MAC_IN_USE,
    SOURCE_MISSING,
    TRY_AGAIN_LATER,
)
from cni.state.record import VfLink, VirtualFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.kernel.rtnl import DeleteLink, Link, Rtnl
    from cni.lower import Wanted
    from cni.state.record import Record
    from cni.state.store import Store

_DEVICES = f"{SYSFS}/bus/pci/devices"
_DRIVERS = f"{SYSFS}/bus/pci/drivers"
_LOCK = "sriov"
"""The name of a lock. An attachment's id is not this: each id has a dash in it."""
_NO_MAC = "00:00:00:00:00:00"
_TRIES, _PAUSE = 100, 0.05
"""How often, and after how many seconds, a NIC is looked at again that comes back after a reset."""
_FLAGS = IFF_UP | IFF_NOARP | IFF_ALLMULTI
"""The link's flags that ADD sets and DEL restores."""


def available(source: str, wanted: Wanted) -> None:
    """Raises CniError 7 if no NIC of the pool could have virtual functions."""
    assert wanted.functions is not None  # noqa: S101 - lower/__init__.py
    check_pool(wanted.functions)


def take(
    host: Rtnl, store: Store, record: Record, source: Link, wanted: Wanted, *, yield_turn: Callable[[], None]
) -> Record:
    """Choose a free VF and keep it in the record, which is saved. Nothing of the VF is changed yet.

    record.mode is what the NIC's embedded switch must do. Raises CniError 11 if no VF is free, 102 if other attachments
    need the switch in another mode, 103 if another VF has the MAC, 7 or 100 if the NIC cannot do it.
    """
    assert wanted.functions is not None  # noqa: S101 - lower/__init__.py
    entry = wanted.functions
    with store.locked(_LOCK, yield_turn=yield_turn):
        for name in entry.pool:
            _make(name, entry.vfs, yield_turn)
        everything = places(entry.pool, entry.vfs)
        busy: dict[str, str] = {}
        order = sorted(enumerate(everything), key=lambda it: not (it[1][1] and it[1][1].pci == wanted.first))
        for at, (_pf, each) in order:
            if each is None or (wanted.number is not None and at != wanted.number):
                continue
            if why := why_busy(host, store, each):
                busy[each.pci] = why
                continue
            pf = host.link(name=each.pf)
            if pf is None:  # it has been renamed since
                continue
            check_switch(host, store, pf, str(record.mode))
            before = vf.settings(host, pf.index)
            for other, has in before.items():
                if has.mac == record.mac and other != each.number:
                    by = f"VF {other}{of_whom(store, pf.name, other)}"
                    raise CniError(
                        MAC_IN_USE,
                        f"MAC {record.mac} is in use on {pf.name!r} by {by}: give this VM another",
                    )
            link = vf_link(host, each.pci)
            if each.number not in before or link is None or not store.hold_function(each.pci, record.id):
                busy[each.pci] = "changing"
                continue
            made = replace(entry.settings, mac=record.mac)
            was = vars(before[each.number])
            function = VirtualFunction(
                pci=each.pci,
                number=each.number,
                driver=each.driver,
                before=VfSettings(**{name: was[name] for name in made.given()}),
                made=made,
                link=VfLink(
                    mac=link.mac,
                    mtu=link.mtu,
                    flags=link.flags & _FLAGS,
                    alias=link.alias,
                    ipv6=ipv6.is_on(link.name),
                    pinned=False,
                ),
            )
            record = replace(record, source=pf.name, vf=function)
            store.save(record)
            return record
    raise none_free(entry, everything, busy, wanted.number)


def ready(host: Rtnl, store: Store, record: Record, *, allmulti: bool) -> LowerDevice:
    """Set up the taken VF for the record's guest. Raises CniError 11, 100 or 104, OSError.

    Saves the record again if the driver turns out to refuse a MAC.
    """
    assert record.vf is not None  # noqa: S101 - lower/__init__.py
    function, made = record.vf, record.vf.made
    pf = pf_link(host, function.pci)
    link = vf_link(host, function.pci)
    if pf is None or link is None:
        raise CniError(SOURCE_MISSING, f"VF {function.number} of {record.source!r} went away")
    what = f"VF {function.number} of {pf.name!r}"
    # Before the PF sets the MAC: after that some drivers refuse it.
    if not _set_mac(host, link.index, record.mac):
        function = replace(function, link=replace(function.link, pinned=True))
        store.save(replace(record, vf=function))
    now = vars(vf.settings(host, pf.index).get(function.number, VfSettings()))
    changes = {name: value for name, value in made.given().items() if now[name] != value}
    changes["mac"] = record.mac  # in any case: it ties the driver to this MAC
    for name, error in vf.change(host, pf.index, function.number, VfSettings(**changes)).items():
        if name == "rate" and read(f"/sys/class/net/{pf.name}/carrier") != "1":
            raise CniError(
                TRY_AGAIN_LATER, f"{what} can have no rate while {pf.name!r} has no link: look at its cable"
            )
        raise CniError(
            KERNEL_REFUSED,
            f"{what} cannot have {name} {changes[name]!r}: this NIC or its driver does not do it",
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
    return LowerDevice(link, "passthru")


def differences(host: Rtnl, record: Record | None, source: Link) -> list[str]:
    """What has been changed of the VF since ready(), each a clause; [] if nothing. Raises OSError."""
    if record is None or record.vf is None:
        return ["there is no record of its virtual function"]
    what = f"VF {record.vf.number} of {record.source}"
    found = changes(host, record.vf)
    if not found and vf_link(host, record.vf.pci) is None:
        found = ["its link is gone"]
    return [f"{what}: {each}" for each in found]


def changes(host: Rtnl, function: VirtualFunction) -> list[str]:
    """Which settings of the VF are not as ADD made them, each a clause; [] if none. Raises OSError."""
    pf = pf_link(host, function.pci)
    if pf is None:
        return ["it is gone"]
    now = vars(vf.settings(host, pf.index).get(function.number, VfSettings()))
    return [
        f"{name} is {_shown(now[name])}, and ADD made it {_shown(value)}"
        for name, value in function.made.given().items()
        if now[name] != value
    ]


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def device(host: Rtnl, record: Record) -> LowerDevice:
    """The VF's link as it is now. Raises CniError 104."""
    assert record.vf is not None  # noqa: S101 - lower/__init__.py
    link = vf_link(host, record.vf.pci)
    if link is None:
        raise CniError(SOURCE_MISSING, f"VF {record.vf.number} of {record.source!r} went away")
    return LowerDevice(link, "passthru")


def release(host: Rtnl, store: Store, record: Record, delete_link: DeleteLink) -> None:
    """Undo ready(), as far as it came, and give the VF back. Its macvtap must be gone.

    A VF that is gone is given back, too. Raises CniError 100, and keeps the VF, if a setting cannot be restored.
    """
    assert record.vf is not None  # noqa: S101 - lower/__init__.py
    function, made = record.vf, record.vf.made
    pci, number = function.pci, function.number
    if os.path.exists(f"{_DEVICES}/{pci}"):
        # No driver now: a process was killed between unbind and bind.
        if function.driver and driver(f"{_DEVICES}/{pci}") is None:
            _write(f"{_DRIVERS}/{function.driver}/bind", pci)
        pf, link = pf_link(host, pci), vf_link(host, pci)
        now = vf.settings(host, pf.index).get(number, VfSettings()) if pf else VfSettings()
        has_mac = made.mac is not None and now.mac == made.mac
        marked = link is not None and link.alias == record.alias
        if link and marked:  # down, so that the host sends nothing with the guest's MAC
            host.do(link_message(RTM_SETLINK, index=link.index, change=IFF_UP))
        if pf and has_mac and function.before.mac != made.mac:
            _restore_mac(host, pf, function)
        is_now, was_made = vars(now), vars(made)
        restored = {
            name: was
            for name, was in function.before.given().items()
            if name != "mac" and is_now[name] == was_made[name] != was
        }
        refused = vf.change(host, pf.index, number, VfSettings(**restored)) if pf else {}
        if (has_mac or marked) and (link := vf_link(host, pci)):
            _restore_link(host, link, function.link)
        if refused:
            details = "; ".join(
                f"{name} {restored[name]!r}: {reason(error)}" for name, error in refused.items()
            )
            raise CniError(KERNEL_REFUSED, f"VF {number} of {record.source!r} cannot be given back", details)
    store.release_function(pci, record.id)


def release_unrecorded(host: Rtnl, index: int, alias: str) -> None:
    """Free the VF whose link has that index and alias, where no record is left of what it was. Raises OSError."""
    link = host.link(index=index)
    if link and link.alias == alias:
        _restore_link(host, link, _fresh(link))


def adopt(host: Rtnl, link: Link) -> tuple[Link, str, VirtualFunction] | None:
    """(PF, mode, VF) for the record of a VF that ready() has set up, by its link. None: it is no such link.

    What the VF was before ADD is not known any more.
    """
    pci = os.path.basename(os.path.realpath(f"{SYSFS}/class/net/{link.name}/device"))
    pf = pf_link(host, pci) if link.alias else None
    each = next((each for each in functions(pf.name) if each.pci == pci), None) if pf else None
    if pf is None or each is None:
        return None
    number = vf.switch_mode(host, pf.index)
    mode = next((name for name, value in vf.SWITCH_MODES.items() if value == number), "bridge")
    function = VirtualFunction(pci, each.number, each.driver, VfSettings(), VfSettings(), _fresh(link))
    return pf, mode, function


def _fresh(link: Link) -> VfLink:
    """The link of a VF as its driver makes it."""
    return VfLink(mac=link.mac, mtu=link.mtu, flags=0, alias="", ipv6=True, pinned=True)


def _restore_link(host: Rtnl, link: Link, was: VfLink) -> None:
    if was.ipv6:
        ipv6.let_in(link.name)
    host.do(
        link_message(
            RTM_SETLINK,
            attr(IFLA_IFALIAS, was.alias.encode() + b"\0" if was.alias else b""),
            u32(IFLA_MTU, was.mtu),
            index=link.index,
            flags=was.flags,
            change=_FLAGS,
        )
    )


def _restore_mac(host: Rtnl, pf: Link, function: VirtualFunction) -> None:
    """Restore the PF's MAC for the VF and the VF's own, and whether the PF's ties the driver."""
    number, admin, own = function.number, function.before.mac, function.link.mac
    if not function.link.pinned:
        vf.change(
            host, pf.index, number, VfSettings(mac=_NO_MAC)
        )  # lets the driver choose, where it allows that
        if link := vf_link(host, function.pci):
            _set_mac(host, link.index, own)
    if vf.settings(host, pf.index).get(number, VfSettings()).mac != admin:
        vf.change(host, pf.index, number, VfSettings(mac=admin))
    _with_mac(host, function, own)


def _with_mac(host: Rtnl, function: VirtualFunction, mac: str) -> Link | None:
    """The VF's link once it has that MAC. Binds its driver again if need be; None if that does not help either."""
    link = vf_link(host, function.pci)
    if link and link.mac != mac:
        _set_mac(host, link.index, mac)
        link = vf_link(host, function.pci)
    if (link is None or link.mac != mac) and function.driver:
        with suppress(OSError):  # it is not bound
            _write(f"{_DRIVERS}/{function.driver}/unbind", function.pci)
        _write(f"{_DRIVERS}/{function.driver}/bind", function.pci)
        link = vf_link(host, function.pci)
    return link if link and link.mac == mac else None


def _set_mac(host: Rtnl, index: int, mac: str) -> bool:
    """Whether the driver has taken it."""
    (outcome,) = host.talk(link_message(RTM_SETLINK, attr(IFLA_ADDRESS, mac_bytes(mac)), index=index))
    return not isinstance(outcome, OSError)


def _make(pf: str, count: int | None, yield_turn: Callable[[], None]) -> None:
    """Make that many VFs of a PF that has none; None: make none. Raises CniError 7 or 100."""
    path = f"/sys/class/net/{pf}/device/sriov_numvfs"
    if count is None or read(path) != "0":
        return
    if count > most(pf):
        raise CniError(
            INVALID_NETWORK_CONFIG, f"vfs: {count} of {pf!r} is refused: it can have {most(pf)} at most"
        )
    try:
        _write(path, str(count))
    except OSError as error:
        raise CniError(KERNEL_REFUSED, f"{pf!r} cannot make {count} VFs", reason(error)) from error
    if not int(read(f"/sys/class/net/{pf}/flags") or "0", 16) & IFF_UP:
        return
    yield_turn()
    for _ in range(_TRIES):  # making VFs resets the NIC; a driver may set no rate before the carrier is back
        if read(f"/sys/class/net/{pf}/carrier") == "1":
            break
        time.sleep(_PAUSE)


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
