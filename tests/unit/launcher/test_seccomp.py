"""The filter, by what the kernel answers to a process that has it; and that QEMU's own ioctls get through."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cni.launcher import qemu, seccomp
from cni.launcher.__main__ import has_sandbox
from tests.waiting import LIMIT

pytestmark = pytest.mark.skipif(not seccomp.supported(), reason="no filter for this architecture")

ALLOWED = {
    "TUNGETFEATURES": 0x800454CF,
    "TUNSETOFFLOAD": 0x400454D0,
    "TUNGETIFF": 0x800454D2,
    "TUNGETSNDBUF": 0x800454D3,
    "TUNSETSNDBUF": 0x400454D4,
    "TUNGETVNETHDRSZ": 0x800454D7,
    "TUNSETVNETHDRSZ": 0x400454D8,
    "TUNSETQUEUE": 0x400454D9,
    "TUNSETVNETLE": 0x400454DC,
    "TUNSETVNETBE": 0x400454DE,
    "TUNSETSTEERINGEBPF": 0x800454E0,
    "SIOCGIFHWADDR": 0x8927,
    "TCGETS": 0x5401,
    "VHOST_SET_OWNER": 0xAF01,
}
"""QEMU's own (net/tap-linux.c, hw/virtio/vhost-backend.c)."""

HEAD = """
import ctypes, errno, json, mmap, os, sys
from cni.launcher import privilege
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/null", os.O_RDWR)
privilege.drop(privilege.User(107, 107))
"""
IOCTLS = """
found = {}
for name, number in json.loads(sys.argv[1]).items():
    for high in (0, 1 << 32):  # the kernel ignores the upper half
        libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
        assert libc.ioctl(fd, number | high, None) < 0
        found[name] = found.get(name, []) + [errno.errorcode[ctypes.get_errno()]]
print(json.dumps(found))
"""
COMPAT = """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20 (getpid of i386); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
X32 = """
number = ctypes.c_long(0x40000000 | 514)  # ioctl of x32
assert libc.syscall(number, fd, ctypes.c_ulong(0x8924), None) < 0
assert ctypes.get_errno() == errno.ENOSYS
"""


def run(text: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + text, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def test_which_ioctls_are_refused() -> None:
    done = run(IOCTLS, json.dumps(seccomp.REFUSED | ALLOWED))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        **{name: ["EPERM", "EPERM"] for name in seccomp.REFUSED},
        **{name: ["ENOTTY", "ENOTTY"] for name in ALLOWED},
    }


def test_other_architectures() -> None:
    if "x86_64" not in subprocess.check_output(["uname", "-m"], text=True):
        pytest.skip("machine code of x86_64")
    assert run(COMPAT).returncode in (-signal.SIGSYS, -signal.SIGSEGV)
    assert run(X32).returncode == 0


@pytest.mark.parametrize("machine", seccomp._MACHINES)
def test_every_jump_ends_in_the_program(machine: str) -> None:
    program = seccomp.program(machine)
    for at, (code, yes, no, _) in enumerate(program):
        assert code == 0x06 or at + 1 + max(yes, no) < len(program)
    refusals = [at for at, (_, yes, _, k) in enumerate(program) if k in seccomp.REFUSED.values()]
    assert len(refusals) == len(seccomp.REFUSED)
    assert {at + 1 + program[at][1] for at in refusals} == {len(program) - 1}
    assert struct.calcsize("=HBBI") == 8


def test_which_qemu_gets_a_sandbox(tmp_path: Path) -> None:
    real = "/usr/bin/qemu-system-x86_64"
    said = subprocess.run([real, "-sandbox", "x"], capture_output=True, text=True, check=False).stderr
    assert has_sandbox(real) == ("not enabled" not in said)
    (tmp_path / "wrapper").write_text("#!/bin/sh\n")
    (tmp_path / "empty").touch()
    for name in ("wrapper", "empty", "nothing"):
        assert not has_sandbox(str(tmp_path / name))
    assert qemu.command(["q"], [], sandboxed=True) == ["q", "-sandbox", "on"]
    assert qemu.command(["q", "-sandbox", "off"], [], sandboxed=True) == ["q", "-sandbox", "off"]
