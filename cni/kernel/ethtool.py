"""A NIC's offload features, by ioctl: ETHTOOL_GSSET_INFO, GSTRINGS, GFEATURES, SFEATURES (linux/ethtool.h)."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from fcntl import ioctl

SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES, _SFEATURES = 0x1B, 0x37, 0x3A, 0x3B
_ETH_SS_FEATURES = 4
_NAME = 32  # ETH_GSTRING_LEN


def features(ifname: str) -> dict[str, bool]:
    """Each feature's name, and whether it is active, of a device of the calling thread's namespace. Raises OSError."""
    return {name: active for name, (_, active) in _all(ifname).items()}


def can(ifname: str, feature: str) -> bool:
    """Whether the feature is active, or could be switched on. Raises OSError."""
    available, active = _all(ifname).get(feature, (False, False))
    return available or active


def switch(ifname: str, feature: str, on: bool) -> None:
    """Switch the feature on or off. Raises OSError: EOPNOTSUPP if the driver has not got it, or does not switch it."""
    names = list(_all(ifname))
    if feature not in names:
        raise OSError(errno.EOPNOTSUPP, f"this kernel knows no {feature}")
    number, blocks = names.index(feature), (len(names) + 31) // 32
    words = [0] * (2 * blocks)  # struct ethtool_set_features_block: valid, requested
    words[number // 32 * 2] = 1 << number % 32
    words[number // 32 * 2 + 1] = int(on) << number % 32
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        _ask(asker, ifname, struct.pack(f"=II{2 * blocks}I", _SFEATURES, blocks, *words))
    if features(ifname)[feature] != on:
        raise OSError(errno.EOPNOTSUPP, f"{feature} stays as it is")


def _all(ifname: str) -> dict[str, tuple[bool, bool]]:
    """Each feature's name → (can be changed, is active), in the kernel's order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        info = _ask(asker, ifname, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _ETH_SS_FEATURES, 0))
        (count,) = struct.unpack_from("=I", info, 16)
        head = struct.pack("=III", _GSTRINGS, _ETH_SS_FEATURES, count)
        names = _ask(asker, ifname, head + bytes(count * _NAME))[12:]
        blocks = (count + 31) // 32
        states = _ask(asker, ifname, struct.pack("=II", _GFEATURES, blocks) + bytes(blocks * 16))
    found = {}
    for number in range(count):
        name = names[number * _NAME : (number + 1) * _NAME].rstrip(b"\0").decode()
        # struct ethtool_get_features_block: available, requested, active, never_changed
        available, _, active = struct.unpack_from("=III", states, 8 + number // 32 * 16)
        found[name or f"bit {number}"] = bool(available >> number % 32 & 1), bool(active >> number % 32 & 1)
    return found


def _ask(asker: socket.socket, ifname: str, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    ioctl(asker, SIOCETHTOOL, struct.pack("=16sQ16x", ifname.encode(), ctypes.addressof(buffer)))
    return buffer.raw
