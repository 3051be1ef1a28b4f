"""Type vmdq: the NIC's queues do what the kernel's macvlan does by software, where the NIC has l2-fwd-offload.

It is switched on when it is first needed, for macvtaps that come up from then on, and stays on; that it was off is kept
in FOLDER/offloads/DEVICE for who uninstalls. When the NIC has no queues left, the kernel falls back to software and
tells nobody; each macvtap that the NIC does carry is a subordinate of the device, and its queues show that
(net/core/net-sysfs.c, traffic_class_show).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from cni.errors import CniError
from cni.kernel import ethtool
from cni.spec import INVALID_NETWORK_CONFIG, IO_FAILURE

FEATURE = "l2-fwd-offload"
_SUBORDINATE = re.compile(r"[0-9]+(-[0-9]+)")


def switch_on(folder: str, source: str) -> None:
    """folder: the state's. Raises CniError 7 if the NIC cannot, 5 if it cannot be noted."""
    try:
        if ethtool.features(source).get(FEATURE):
            return
        check(source)
        os.makedirs(f"{folder}/offloads", mode=0o700, exist_ok=True)
        with open(f"{folder}/offloads/{source}", "w", encoding="ascii"):
            pass  # before it is on
        ethtool.switch(source, FEATURE, True)
    except OSError as error:
        raise CniError(IO_FAILURE, f"{FEATURE} of {source!r} cannot be switched on", str(error)) from error


def check(source: str) -> None:
    """Raises CniError 7 if the NIC has not got it, OSError."""
    if not ethtool.can(source, FEATURE):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"type vmdq: {source!r} or its driver has no {FEATURE}; make the interface of type ethernet",
        )


def restore(folder: str) -> list[str]:
    """Switch it off where it was; the devices. One that is gone needs nothing. Raises OSError."""
    done = []
    with suppress(FileNotFoundError):
        for source in sorted(os.listdir(f"{folder}/offloads")):
            if os.path.exists(f"/sys/class/net/{source}"):
                ethtool.switch(source, FEATURE, False)
                done.append(source)
            os.unlink(f"{folder}/offloads/{source}")
    return done


def taken(source: str) -> int:
    """How many macvtaps the device's own queues carry."""
    return len(subordinates(f"/sys/class/net/{source}/queues"))


def subordinates(folder: str) -> set[str]:
    """The subordinate devices that transmit queues belong to; folder is a device's queues in sysfs."""
    found = set()
    with suppress(FileNotFoundError):
        for queue in os.listdir(folder):
            with suppress(OSError), open(f"{folder}/{queue}/traffic_class", encoding="ascii") as file:
                if match := _SUBORDINATE.fullmatch(file.read().strip()):
                    found.add(match[1])
    return found
