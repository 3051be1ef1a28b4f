"""A seccomp filter (seccomp(2)) for QEMU: it refuses ioctls on a tap's fd that QEMU never makes.

Whoever has a macvtap's fd may set the link's MAC with SIOCSIFHWADDR, without a capability, and so receive its
neighbours' frames. QEMU gets queues that are set up, and makes only TUNGETIFF, TUNGETFEATURES, TUNSETOFFLOAD,
TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETVNETBE, TUNSETSNDBUF, TUNSETQUEUE and TUNSETSTEERINGEBPF. Everything that is not
refused here is allowed: QEMU's own -sandbox refuses other calls.

On architectures but x86_64 and aarch64 there is no filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from cni.kernel import bpf
from cni.kernel.netns import libc

_PR_SET_SECCOMP = 22  # linux/prctl.h
_SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_X32 = 0x40000000  # __X32_SYSCALL_BIT, asm/unistd.h
# struct seccomp_data; a load is of the machine's byte order, and the machines of _MACHINES are little-endian.
_AT_NUMBER, _AT_ARCH, _AT_COMMAND = 0, 4, 16 + 8

_MACHINES = {"x86_64": (0xC000003E, 16), "aarch64": (0xC00000B7, 29)}
"""Machine → AUDIT_ARCH_* (linux/audit.h) and the number of ioctl(2)."""

REFUSED = {
    "SIOCSIFHWADDR": 0x8924,
    "TUNSETNOCSUM": 0x400454C8,
    "TUNSETDEBUG": 0x400454C9,
    "TUNSETIFF": 0x400454CA,
    "TUNSETPERSIST": 0x400454CB,
    "TUNSETOWNER": 0x400454CC,
    "TUNSETLINK": 0x400454CD,
    "TUNSETGROUP": 0x400454CE,
    "TUNSETTXFILTER": 0x400454D1,
    "TUNATTACHFILTER": 0x401054D5,
    "TUNDETACHFILTER": 0x401054D6,
    "TUNSETIFINDEX": 0x400454DA,
    "TUNSETFILTEREBPF": 0x800454E1,
    "TUNSETCARRIER": 0x400454E2,
}
"""linux/if_tun.h, linux/sockios.h. They fail with EPERM."""


def supported() -> bool:
    """Whether there is a filter for the architecture of this process."""
    return os.uname().machine in _MACHINES and struct.calcsize("P") == 8


def program(machine: str) -> list[bpf.Instruction]:
    """The filter. A call of another architecture, which has other numbers, kills the process."""
    arch, ioctl = _MACHINES[machine]
    made: list[bpf.Instruction] = [
        (bpf.BPF_LD_W_ABS, 0, 0, _AT_ARCH),
        (bpf.BPF_JEQ_K, 1, 0, arch),
        (bpf.BPF_RET_K, 0, 0, _KILL_PROCESS),
        (bpf.BPF_LD_W_ABS, 0, 0, _AT_NUMBER),
        (bpf.BPF_JGE_K, 0, 1, _X32),
        (bpf.BPF_RET_K, 0, 0, _ERRNO | errno.ENOSYS),
        (bpf.BPF_JEQ_K, 1, 0, ioctl),
        (bpf.BPF_RET_K, 0, 0, _ALLOW),
        (bpf.BPF_LD_W_ABS, 0, 0, _AT_COMMAND),  # the kernel takes the lower half only, too
    ]
    made += [(bpf.BPF_JEQ_K, len(REFUSED) - at, 0, each) for at, each in enumerate(REFUSED.values())]
    return [*made, (bpf.BPF_RET_K, 0, 0, _ALLOW), (bpf.BPF_RET_K, 0, 0, _ERRNO | errno.EPERM)]


def install() -> None:
    """Set the filter, for ever, also for programs that are executed. Needs no_new_privs. Raises OSError."""
    code = bpf.assemble(program(os.uname().machine))
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(bpf.program(held, len(code)))
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), filter_, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl PR_SET_SECCOMP: {os.strerror(number)}")
