"""A NIC's offload features by ioctl (linux/ethtool.h): ETHTOOL_GSSET_INFO, GSTRINGS, GFEATURES. Only reads."""

from __future__ import annotations

import ctypes
import socket
import struct
from fcntl import ioctl

SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES = 0x1B, 0x37, 0x3A
_ETH_SS_FEATURES = 4
_NAME = 32  # ETH_GSTRING_LEN


def features(ifname: str) -> dict[str, bool]:
    """Name → whether it is active, of a device of the calling thread's namespace. Raises OSError."""
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
        (active,) = struct.unpack_from("=I", states, 8 + number // 32 * 16 + 8)
        found[name] = bool(active >> number % 32 & 1)
    return found


def _ask(asker: socket.socket, ifname: str, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    ioctl(asker, SIOCETHTOOL, struct.pack("=16sQ16x", ifname.encode(), ctypes.addressof(buffer)))
    return buffer.raw
