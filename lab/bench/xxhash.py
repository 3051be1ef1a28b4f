"""XXH64 with seed 0, of inputs below 32 bytes: longer ones begin with another loop (doc/xxhash_spec.md of xxHash)."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def xxh64(data: bytes) -> int:
    """The hash. Raises ValueError for 32 bytes and more."""
    if len(data) >= 32:
        raise ValueError(f"{len(data)} bytes: only inputs below 32 bytes are hashed")
    value = _P5 + len(data)
    while len(data) >= 8:
        value ^= _rotate(int.from_bytes(data[:8], "little") * _P2, 31) * _P1 & _MASK
        value = _rotate(value, 27) * _P1 + _P4 & _MASK
        data = data[8:]
    if len(data) >= 4:
        value ^= int.from_bytes(data[:4], "little") * _P1 & _MASK
        value = _rotate(value, 23) * _P2 + _P3 & _MASK
        data = data[4:]
    for byte in data:
        value = _rotate(value ^ byte * _P5 & _MASK, 11) * _P1 & _MASK
    value = (value ^ value >> 33) * _P2 & _MASK
    value = (value ^ value >> 29) * _P3 & _MASK
    return value ^ value >> 32


def _rotate(value: int, bits: int) -> int:
    value &= _MASK
    return (value << bits | value >> 64 - bits) & _MASK
