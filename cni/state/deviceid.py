"""Ids of the devices that a kubelet allocates, and the interface index of each id. Pure.

The index follows from the id alone, so it is known before there is a link: Allocate, an ADD after a reboot, and an ADD
on a node whose kubelet remembers an older answer all use the same. Attachments without an id have lower indexes
(store.py).
"""

from __future__ import annotations

import re
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_CAPACITY = 100
"""Devices of an interface whose policy entry has no capacity. kubevirt/macvtap-cni has the same default."""
MOST = 4096
"""Devices of one interface at most: the number is twelve bits of the index."""
BASE = 0x70000000
"""The first index of a device."""
_ID = re.compile(r"(.+)Mvp(0|[1-9][0-9]{0,3})")


def format(name: str, number: int) -> str:
    """The id of an interface's device of that number, in the form of kubevirt/macvtap-cni."""
    return f"{name}Mvp{number}"


def parse(device_id: str) -> tuple[str, int] | None:
    """(interface, number) of an id; None if it has another form."""
    match = _ID.fullmatch(device_id) if device_id else None
    return (match[1], int(match[2])) if match and int(match[2]) < MOST else None


def ifindex(name: str, number: int) -> int:
    """The interface index of a device: 0x7, 16 bits of a hash of the name, 12 bits of the number.

    It is at most 0x7fffffff, the kernel's largest. If two names of a node have one hash, the device plugin refuses the
    second.
    """
    return BASE | int.from_bytes(blake2s(name.encode(), digest_size=2).digest()) << 12 | number


def numbers(name: str, indexes: Iterable[int]) -> set[int]:
    """The numbers of the interface's devices whose indexes are among these."""
    first = ifindex(name, 0)
    return {index - first for index in indexes if 0 <= index - first < MOST}


def index_of(device_id: str | None) -> int:
    """The interface index of an id; 0 for None and for an id of another form."""
    parsed = parse(device_id) if device_id else None
    return ifindex(*parsed) if parsed else 0
