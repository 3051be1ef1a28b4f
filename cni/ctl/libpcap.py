"""Filters of frames in the language of pcap-filter(7), compiled by libpcap, which need not be there without a filter.

Loaded by ctypes, under the names that distributions give it. Must not open a device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from cni.errors import CniError
from cni.kernel import bpf
from cni.spec import INVALID_ENVIRONMENT

_NAMES = ("libpcap.so.1", "libpcap.so.0.8")  # upstream's, Debian's
_DLT_EN10MB = 1
_NETMASK_UNKNOWN = 0xFFFFFFFF
_MOST = 1000
"""Characters: libpcap's optimizer takes minutes for the longest filters that the kernel accepts."""
_LD_ABS, _LD_CLASS_MODE = 0x20, 0xE7
_NEGATIVE = 1 << 31
"""Loads from here on read what the kernel knows of a frame (linux/filter.h), which pcap_offline_filter() does not."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Header(ctypes.Structure):
    """struct pcap_pkthdr; a filter does not read the time."""

    _fields_ = (
        ("seconds", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("kept", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Filter:
    """A compiled filter. code: for a packet socket; it returns how many bytes of a frame to keep."""

    code: bytes
    _library: ctypes.CDLL
    _program: _Program

    def matches(self, frame: bytes, size: int) -> bool:
        """Whether the frame matches. frame: the frame or its beginning, with its tags; size: the whole frame's."""
        header = _Header(0, 0, len(frame), size)
        return bool(
            self._library.pcap_offline_filter(ctypes.byref(self._program), ctypes.byref(header), frame)
        )


def compiled(text: str, snap: int) -> Filter:
    """The filter of Ethernet frames, of which snap bytes are kept. It is never freed.

    Raises CniError 4 if the filter is wrong or too long, or if there is no libpcap.
    """
    if len(text) > _MOST:
        raise CniError(
            INVALID_ENVIRONMENT, f"FILTER has {len(text)} characters: at most {_MOST} are compiled"
        )
    library = _loaded()
    handle = library.pcap_open_dead(_DLT_EN10MB, snap)
    if not handle:
        raise MemoryError
    program = _Program()
    try:
        if library.pcap_compile(
            handle, ctypes.byref(program), text.encode(errors="surrogateescape"), 1, _NETMASK_UNKNOWN
        ):
            why = library.pcap_geterr(handle).decode(errors="replace")
            raise CniError(INVALID_ENVIRONMENT, f"FILTER {text!r} is refused (pcap-filter(7)): {why}")
    finally:
        library.pcap_close(handle)
    code = ctypes.string_at(program.instructions, program.length * bpf.INSTRUCTION.size)
    for operation, _, _, operand in bpf.INSTRUCTION.iter_unpack(code):
        if operation & _LD_CLASS_MODE == _LD_ABS and operand >= _NEGATIVE:
            raise CniError(
                INVALID_ENVIRONMENT,
                f"FILTER {text!r} looks at more than the frame, as inbound and outbound do: use --direction",
            )
    return Filter(code, library, program)


def _loaded() -> ctypes.CDLL:
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_compile.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint32,
        )
        library.pcap_geterr.argtypes = library.pcap_close.argtypes = (ctypes.c_void_p,)
        library.pcap_geterr.restype = ctypes.c_char_p
        return library
    raise CniError(
        INVALID_ENVIRONMENT,
        "FILTER needs libpcap, which is not there: install it (Debian: libpcap0.8), or capture without FILTER and "
        "filter where the capture is read",
    )
