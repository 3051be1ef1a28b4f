"""Type vmdq: with l2-fwd-offload, the NIC's queues sort frames as the kernel's macvlan otherwise does in software.

The feature is switched on when it is first needed, for macvtaps that come up from then on, and stays on. The file
FOLDER/offloads/DEVICE records that it was off, for `vmtapctl uninstall`. When the NIC has no queues left, the kernel
falls back to software and reports nothing. Each macvtap that the NIC carries is a subordinate of the device, which the
device's queues show (net/core/net-sysfs.c, traffic_class_show).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from cni.errors import CniError, reason
from cni.kernel import ethtool, sysfs
from cni.spec import INVALID_NETWORK_CONFIG, IO_FAILURE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.kernel.rtnl import Link, Rtnl
    from cni.lower import Wanted
    from cni.state.record import Record
    from cni.state.store import Store

FEATURE = "l2-fwd-offload"
_SUBORDINATE = re.compile(r"[0-9]+(-[0-9]+)")


def available(source: str, wanted: Wanted | None = None) -> None:
    """Raises CniError 7 if the NIC has no l2-fwd-offload, OSError."""
    if not ethtool.can(source, FEATURE):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"type vmdq: {source!r} or its driver has no {FEATURE}; make the interface of type ethernet",
        )


def take(
    host: Rtnl, store: Store, record: Record, source: Link, wanted: Wanted, *, yield_turn: Callable[[], None]
) -> Record:
    """Switch the feature on. Raises CniError 7 if the NIC has not got it, 5 if its former state cannot be recorded."""
    switch_on(store.folder, source.name)
    return record


def switch_on(folder: str, source: str) -> None:
    """folder: the state folder; source: the NIC's name. Raises CniError 7 or 5."""
    try:
        if ethtool.features(source).get(FEATURE):
            return
        available(source)
        os.makedirs(f"{folder}/offloads", mode=0o700, exist_ok=True)
        with open(f"{folder}/offloads/{source}", "w", encoding="ascii"):
            pass  # before it is on
        ethtool.switch(source, FEATURE, True)
    except OSError as error:
        raise CniError(IO_FAILURE, f"{FEATURE} of {source!r} cannot be switched on", reason(error)) from error


def differences(host: Rtnl, record: Record | None, source: Link) -> list[str]:
    """Whether the feature has been switched off since ADD. Raises OSError."""
    if ethtool.features(source.name).get(FEATURE):
        return []
    return [f"{FEATURE} of {source.name} is off, and ADD had it on"]


def restore(folder: str) -> list[str]:
    """Switch the feature off where switch_on() has switched it on; the devices' names. Raises OSError."""
    done = []
    with suppress(FileNotFoundError):
        for source in sorted(os.listdir(f"{folder}/offloads")):
            if os.path.exists(f"/sys/class/net/{source}"):
                ethtool.switch(source, FEATURE, False)
                done.append(source)
            os.unlink(f"{folder}/offloads/{source}")
    return done


def taken(source: str) -> int:
    """How many macvtaps the device's own queues carry. source: its name."""
    return len(subordinates(f"/sys/class/net/{source}/queues"))


def subordinates(folder: str) -> set[str]:
    """The subordinate devices that own a transmit queue. folder: a device's queues in sysfs."""
    found = set()
    with suppress(FileNotFoundError):
        for queue in os.listdir(folder):
            if match := _SUBORDINATE.fullmatch(sysfs.read(f"{folder}/{queue}/traffic_class")):
                found.add(match[1])
    return found
