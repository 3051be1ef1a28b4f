"""Socket filters in classic BPF (linux/filter.h): the kernel drops the messages that a socket does not want."""

from __future__ import annotations

import ctypes
import socket
import struct

SO_ATTACH_FILTER = 26  # asm-generic/socket.h

# linux/bpf_common.h. A load is big-endian, whatever the machine is.
BPF_LD_W_ABS = 0x20
BPF_LD_H_ABS = 0x28
BPF_JEQ_K = 0x15
BPF_RET_K = 0x06
_LOADS = {2: BPF_LD_H_ABS, 4: BPF_LD_W_ABS}

_WHOLE_MESSAGE = 0xFFFFFFFF
_DROP = 0


def keep_only(receiver: socket.socket, *fields: tuple[int, bytes]) -> None:
    """Drop each message that lacks one of the fields: (offset, the 2 or 4 bytes expected there). Raises OSError."""
    program = []
    for number, (offset, expected) in enumerate(fields):
        to_drop = (
            2 * (len(fields) - number) - 1
        )  # instructions to skip: the other fields and the first return
        program.append((_LOADS[len(expected)], 0, 0, offset))
        program.append((BPF_JEQ_K, 0, to_drop, int.from_bytes(expected)))
    program.append((BPF_RET_K, 0, 0, _WHOLE_MESSAGE))
    program.append((BPF_RET_K, 0, 0, _DROP))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    held = ctypes.create_string_buffer(code, len(code))
    receiver.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(held))
    )
