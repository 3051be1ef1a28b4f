"""Filters in classic BPF (linux/filter.h). Of a socket: the kernel drops the messages that the socket does not want."""

from __future__ import annotations

import ctypes
import struct
from _socket import SOL_SOCKET  # socket is slow to import, and the launcher needs only assemble()

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

Instruction = tuple[int, int, int, int]
"""Code, instructions to skip if a comparison holds, if it does not, and the operand."""
INSTRUCTION = struct.Struct("=HBBI")
"""One struct sock_filter."""

SO_ATTACH_FILTER = 26  # asm-generic/socket.h

# linux/bpf_common.h. A load is big-endian, whatever the machine is.
BPF_LD_W_ABS = 0x20
BPF_LD_H_ABS = 0x28
BPF_LD_B_ABS = 0x30
BPF_JEQ_K = 0x15
BPF_JGE_K = 0x35
BPF_RET_K = 0x06
_LOADS = {2: BPF_LD_H_ABS, 4: BPF_LD_W_ABS}

_WHOLE_MESSAGE = 0xFFFFFFFF
_DROP = 0


def keep_only(receiver: socket.socket, *fields: tuple[int, bytes]) -> None:
    """Drop each message that lacks one of the fields: (offset, the 2 or 4 bytes expected there). Raises OSError."""
    made: list[Instruction] = []
    for number, (offset, expected) in enumerate(fields):
        to_drop = (
            2 * (len(fields) - number) - 1
        )  # instructions to skip: the other fields and the first return
        made.append((_LOADS[len(expected)], 0, 0, offset))
        made.append((BPF_JEQ_K, 0, to_drop, int.from_bytes(expected)))
    made.append((BPF_RET_K, 0, 0, _WHOLE_MESSAGE))
    made.append((BPF_RET_K, 0, 0, _DROP))
    attach(receiver, assemble(made))


def assemble(made: Iterable[Instruction]) -> bytes:
    """The struct sock_filter of each instruction."""
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in made)


def attach(receiver: socket.socket, code: bytes) -> None:
    """Set the socket's filter, in the place of an earlier one. code: assemble()'s. Raises OSError."""
    held = ctypes.create_string_buffer(code, len(code))
    receiver.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, program(held, len(code)))


def program(held: ctypes.Array[ctypes.c_char], size: int) -> bytes:
    """The struct sock_fprog of the instructions in held, of that many bytes; valid as long as held lives."""
    return struct.pack("HP", size // INSTRUCTION.size, ctypes.addressof(held))
