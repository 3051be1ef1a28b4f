"""What an attachment's macvtap sits on besides the source itself, and the one dispatcher of its kinds.

    sriov     a virtual function of the source, or of a pool of sources
    vlan      a VLAN device of the source
    offload   the source itself, whose queues do the kernel's sorting (type vmdq)

Each kind is a module with the functions of Kind, and of Kept if a record keeps a device of it. STATUS calls
available(); ADD calls take(), then ready(); CHECK calls differences(), then device(); whoever ends it calls release().
Must not decide which attachment gets what: config/policy.py and attach/plan.py do.
"""

from __future__ import annotations

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from cni.config.netconf import Vlan
    from cni.config.policy import Functions
    from cni.kernel.rtnl import DeleteLink, Link, Rtnl
    from cni.state.record import Record
    from cni.state.store import Store

    class Kind(Protocol):
        """What each kind can do for a request. Raises CniError, OSError."""

        def available(self, source: str, wanted: Wanted) -> None: ...

        def take(
            self,
            host: Rtnl,
            store: Store,
            record: Record,
            source: Link,
            wanted: Wanted,
            *,
            yield_turn: Callable[[], None],
        ) -> Record: ...

        def differences(self, host: Rtnl, record: Record | None, source: Link) -> list[str]: ...

    class Kept(Protocol):
        """What a kind can do with a device that a record keeps. Raises CniError, OSError."""

        def ready(self, host: Rtnl, store: Store, record: Record, *, allmulti: bool) -> LowerDevice: ...

        def device(self, host: Rtnl, record: Record) -> LowerDevice: ...

        def release(self, host: Rtnl, store: Store, record: Record, delete_link: DeleteLink) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What an attachment's macvtap is to sit on: a virtual function, or the source itself with what is given here."""

    functions: Functions | None = None
    """The pool of a virtual function."""
    number: int | None = None
    """The function's number, counted through the pool, if the kubelet has allocated one."""
    first: str = ""
    """The PCI address of the function to take if it is free: that of a resource claim's device."""
    vlan: Vlan | None = None
    """A VLAN device of the source."""
    offload: bool = False
    """The source, with its offload switched on."""
    mtu: int | None = None
    """The MTU that the network config gives; None: that of the device."""


@dataclass(frozen=True)
class LowerDevice:
    """The link that a macvtap sits on. mode: of the macvtap; None: the one that the attachment asks for."""

    link: Link
    mode: str | None = None


def available(source: str, wanted: Wanted) -> None:
    """Raises CniError 7 if the node cannot have what is wanted. Changes nothing."""
    for kind in _wanted(wanted):
        kind.available(source, wanted)


def take(
    host: Rtnl, store: Store, record: Record, source: Link, wanted: Wanted, *, yield_turn: Callable[[], None]
) -> Record:
    """Reserve or make what is wanted. The record that is returned says so, and is saved before anything is made.

    yield_turn is called before a wait. Raises CniError 7, 11, 100, 102 or 103, OSError.
    """
    for kind in _wanted(wanted):
        record = kind.take(host, store, record, source, wanted, yield_turn=yield_turn)
    return record


def ready(host: Rtnl, store: Store, record: Record, *, allmulti: bool) -> LowerDevice | None:
    """Set up what was taken, for the record's guest. None: the macvtap sits on the source itself.

    May save the record again. Raises CniError 11, 100 or 104, OSError.
    """
    for kind in _kept(record):
        return kind.ready(host, store, record, allmulti=allmulti)
    return None


def differences(host: Rtnl, record: Record | None, source: Link, wanted: Wanted) -> list[str]:
    """What has been changed of it since ADD, each a clause; [] if nothing. Raises OSError."""
    return [each for kind in _wanted(wanted) for each in kind.differences(host, record, source)]


def device(host: Rtnl, record: Record) -> LowerDevice | None:
    """What the record's macvtap sits on now. None: the source itself. Raises CniError 104, OSError."""
    for kind in _kept(record):
        return kind.device(host, record)
    return None


def release(host: Rtnl, store: Store, record: Record, delete_link: DeleteLink) -> None:
    """Undo take() and ready(), as far as they came. The macvtap must be gone. Raises CniError 100, OSError."""
    for kind in _kept(record):
        kind.release(host, store, record, delete_link)


# Loaded when needed: most nodes have none of them.
# ruff: noqa: PLC0415


def _wanted(wanted: Wanted) -> list[Kind]:
    found: list[Kind] = []
    if wanted.functions:
        from cni.lower import sriov

        found.append(sriov)
    if wanted.offload:
        from cni.lower import offload

        found.append(offload)
    if wanted.vlan:
        from cni.lower import vlan

        found.append(vlan)
    return found


def _kept(record: Record) -> list[Kept]:
    found: list[Kept] = []
    if record.vf:
        from cni.lower import sriov

        found.append(sriov)
    if record.vlan:
        from cni.lower import vlan

        found.append(vlan)
    return found
