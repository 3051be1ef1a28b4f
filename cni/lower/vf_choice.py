"""Which virtual function an attachment may take, and why it gets none."""

from __future__ import annotations

import errno
import os
import struct

from cni.errors import CniError, reason
from cni.kernel import vf
from cni.kernel.rtnl import RTM_GETADDR
from cni.lower.vf_discovery import most, vf_link
from cni.spec import INVALID_NETWORK_CONFIG, SOURCE_BUSY, TRY_AGAIN_LATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.config.policy import Functions
    from cni.kernel.rtnl import Link, Rtnl
    from cni.lower.vf_discovery import Function
    from cni.state.store import Store

_RT_SCOPE_LINK = 253


def check_switch(host: Rtnl, store: Store, pf: Link, mode: str) -> None:
    """Put the embedded switch into that mode, if no attachment needs another. Raises CniError 7 or 102."""
    wanted = vf.SWITCH_MODES[mode]
    now = vf.switch_mode(host, pf.index)
    if now == wanted or (now is None and mode == "bridge"):  # a switch without modes is a plain bridge
        return
    for other in store.records():
        if other.vf and other.source == pf.name and other.mode != mode:
            raise CniError(
                SOURCE_BUSY,
                f"mode {mode}: the embedded switch of {pf.name!r} is in mode {other.mode} for {other.ifname} of "
                f"{other.owner} in network {other.network!r}, and has one mode for all",
            )
    try:
        vf.set_switch_mode(host, pf.index, wanted)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"mode {mode} is refused: the driver of {pf.name!r} cannot put its embedded switch into it",
            reason(error),
        ) from error


def why_busy(host: Rtnl, store: Store, function: Function) -> str | None:
    """Why the VF cannot be taken, for a message; None if it is free."""
    if store.function_held_by(function.pci):
        return "attached"
    link = vf_link(host, function.pci)
    if link is None:
        return f"with driver {function.driver}" if function.driver else "without a driver"
    if link.alias.startswith("vmtap/"):
        return "attached"
    uppers = [name for name in os.listdir(f"/sys/class/net/{link.name}") if name.startswith("upper_")]
    if link.master or uppers or _has_address(host, link.index):
        return "in use by the host"
    return None


def _has_address(host: Rtnl, index: int) -> bool:
    """Whether it has an IP address of the host's, beyond the link-local one."""
    addresses = (struct.unpack_from("=3xBI", body) for body in host.dump(RTM_GETADDR, bytes(8)))  # ifaddrmsg
    return any(of == index and scope != _RT_SCOPE_LINK for scope, of in addresses)


def check_pool(entry: Functions) -> None:
    """Raises CniError 7 if no NIC of the pool could have virtual functions."""
    if not any(map(most, entry.pool)):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"type sr-iov: source {', '.join(entry.pool)} has no virtual functions: it is no SR-IOV PF",
        )


def none_free(
    entry: Functions,
    everything: list[tuple[str, Function | None]],
    busy: Mapping[str, str],
    number: int | None,
) -> CniError:
    """The error for an ADD that gets no VF. everything: places(); busy: why_busy() by PCI address; number: Wanted's."""
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
        check_pool(entry)
        return CniError(
            TRY_AGAIN_LATER,
            f"{names} has 0 of {sum(map(most, entry.pool))} VFs: make some, or set vfs in the policy",
        )
    words = list(busy.values())
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return CniError(TRY_AGAIN_LATER, f"no VF of {names} is free: of {there}, {counts}")


def of_whom(store: Store, pf: str, number: int) -> str:
    """Whose that VF of the PF is, for a message: " of pod NAMESPACE/NAME"; "" if no attachment has it."""
    held = (each for each in store.records() if each.vf and (each.source, each.vf.number) == (pf, number))
    return next((f" of {each.owner}" for each in held), "")
