"""Ids of the devices that a kubelet allocates, and the interface index that an id stands for. Pure arithmetic.

The index is known before there is a link and needs no state: Allocate, an ADD after a reboot and one on a node whose
kubelet remembers an older answer all come to the same one. Indexes of attachments without an id are below (state.py).
"""

from __future__ import annotations

import re
from _blake2 import blake2s  # as in lock.py

DEFAULT_CAPACITY = 100
"""Devices of an interface whose policy entry has no capacity; kubevirt/macvtap-cni's default."""
MOST = 4096
"""Devices of one interface: twelve bits of the index."""
BASE = 0x70000000
"""The first index of a device."""
_ID = re.compile(r"(.+)Mvp(0|[1-9][0-9]{0,3})")


def format(name: str, number: int) -> str:
    """As kubevirt/macvtap-cni has it."""
    return f"{name}Mvp{number}"


def parse(device_id: str) -> tuple[str, int] | None:
    """(interface, number), or None if it is none of ours."""
    match = _ID.fullmatch(device_id) if device_id else None
    return (match[1], int(match[2])) if match and int(match[2]) < MOST else None


def ifindex(name: str, number: int) -> int:
    """0x70000000 to 0x7fffffff, the last that the kernel has: 16 bits of a hash of the name, 12 of the number.

    Two names of a node that have one hash cannot both be offered: the device plugin refuses the second.
    """
    return BASE | int.from_bytes(blake2s(name.encode(), digest_size=2).digest()) << 12 | number


def index_of(device_id: str | None) -> int:
    """The ifindex of an id; 0 for None, and for one that is none of ours."""
    parsed = parse(device_id) if device_id else None
    return ifindex(*parsed) if parsed else 0
