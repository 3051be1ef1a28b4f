"""Lower devices that no record speaks of: adopted with their macvtap, released, or removed when nothing uses them.

For the reconciler, and for a DEL that finds no record.
"""

from __future__ import annotations

from cni.dataclass import dataclass
from cni.kernel.macvtap import MODES
from cni.lower import sriov, vlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.kernel.rtnl import DeleteLink, Link, Rtnl
    from cni.state.record import Record, VirtualFunction, VlanDevice
    from cni.state.store import Store


@dataclass(frozen=True)
class Adopted:
    """What a record is to keep of the lower device of a macvtap that was found without a record."""

    source: Link
    mode: str
    """As the record has it: of a VF, what its NIC's embedded switch does."""
    vf: VirtualFunction | None = None
    vlan: VlanDevice | None = None


def adopt(host: Rtnl, lower: Link, mode: str) -> Adopted:
    """What a record is to keep of the lower device of a macvtap in that macvlan mode. Raises OSError."""
    if mode == "passthru" and (found := sriov.adopt(host, lower)):
        pf, switch_mode, function = found
        return Adopted(pf, switch_mode, vf=function)
    shared = vlan.adopt(lower)
    source = host.link(index=lower.lower or 0) if shared else None
    return Adopted(source or lower, mode, vlan=shared)


def release(host: Rtnl, macvtap: Link) -> None:
    """Undo lower.ready() for a macvtap that is deleted by now, and that no record speaks of. Raises OSError."""
    if macvtap.lower and macvtap.mode == MODES["passthru"]:
        sriov.release_unrecorded(host, macvtap.lower, macvtap.alias)


def leftovers(links: Iterable[Link], records: Iterable[Record]) -> list[str]:
    """The names of the devices among links that ADD has made and no record keeps any more."""
    made = {link.name for link in links if vlan.is_marked(link)}
    return sorted(made - {each.vlan.device for each in records if each.vlan}) if made else []


def remove(host: Rtnl, store: Store, name: str, delete_link: DeleteLink) -> bool:
    """Remove a device that leftovers() named, unless a macvtap is on it; whether it was removed.

    Raises BlockingIOError while a request is at work on it, CniError, OSError.
    """
    return vlan.remove(host, store, name, "", delete_link, wait=False)
