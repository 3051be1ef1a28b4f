"""Which processes have which attachments' devices open, in whatever namespaces they are.

The path of a device node proves nothing: the launcher opens one that has no path. Its number alone proves nothing
either: the kernel reuses it when its link is gone, while an old fd still shows it. So each candidate fd is duplicated
by pidfd_getfd(2), which makes no further queue, and examined:

- A macvtap's fd has the link's device number, and TUNGETIFF succeeds on it (ENOLINK: its link is gone). No two live
  links have one number.
- A tap's fd reports its interface and its network namespace (TUNGETIFF, TUNGETDEVNETNS).

Must not open a device.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from fcntl import ioctl
from itertools import pairwise

from cni.kernel import netns
from cni.kernel.tapdev import TUN, TUNGETIFF
from cni.names import escaped
from cni.state.record import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Device = tuple[int, int]
    Tap = tuple[tuple[int, int], str]

TUNGETDEVNETNS = 0x54E3
_SYS_PIDFD_GETFD = 438  # one on every architecture
_NO_FILES = ("socket:", "pipe:", "anon_inode:")


@dataclass(frozen=True)
class Holder:
    """A process. vm: QEMU's -name, if it has one. queues: how many fds of the device it has open.

    broker: whether the agent gave them to it; if it has closed them all, the agent still counts it.
    """

    pid: int
    uid: int
    program: str
    vm: str | None
    queues: int
    broker: bool = False


def find(macvtaps: Mapping[Device, str], taps: Mapping[Tap, str]) -> dict[str, list[Holder]]:
    """The holders by attachment id. macvtaps: (major, minor) → id; taps: (namespace identity, name) → id."""
    found: dict[str, list[Holder]] = {}
    if not macvtaps and not taps:
        return found
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if pid == os.getpid():
            continue
        with suppress(OSError):  # it has ended
            for name, queues in Counter(_held(pid, macvtaps, taps)).items():
                found.setdefault(name, []).append(_holder(pid, queues))
    return found


def sees_others() -> bool:
    """Whether this process may look at the fds of other users' processes (CAP_SYS_PTRACE, linux/capability.h)."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        (held,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return bool(held >> 19 & 1)


def may_hold(pid: int) -> bool:
    """Whether the process has the device of any tap or macvtap open."""
    macvtap = _macvtap_major()
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{number}")
                major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
                if stat.S_ISCHR(status.st_mode) and ((major, minor) == TUN or major == macvtap):
                    return True
    return False


def _macvtap_major() -> int | None:
    with open("/proc/devices", encoding="ascii") as file:
        numbers = [int(line.split()[0]) for line in file if line.split()[1:] == ["macvtap"]]
    return numbers[0] if numbers else None


def with_given(path: str, found: list[Holder]) -> tuple[Holder, ...]:
    """The holders, and those that the agent's broker has recorded in the file (agent/holders.py)."""
    try:
        with open(path, "rb") as file:
            boot, given = json.loads(file.read())
        starts = dict(given) if boot == boot_id() else {}
    except (OSError, ValueError, TypeError):
        return tuple(found)
    by_pid = {holder.pid: holder for holder in found}
    for pid, start in starts.items():
        with suppress(OSError):  # it has ended
            if _start(pid) == start:
                by_pid[pid] = replace(by_pid.get(pid) or _holder(pid, 0), broker=True)
    return tuple(by_pid.values())


def _start(pid: int) -> int:
    """The start time of the process, in clock ticks since boot (proc(5), field 22 of stat)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def _held(pid: int, macvtaps: Mapping[Device, str], taps: Mapping[Tap, str]) -> Iterator[str]:
    """The device behind each fd of the process."""
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        with suppress(OSError):
            if os.readlink(f"{folder}/{number}").startswith(_NO_FILES):
                continue
            status = os.stat(f"{folder}/{number}")
            device = os.major(status.st_rdev), os.minor(status.st_rdev)
            if stat.S_ISCHR(status.st_mode) and (device in macvtaps or device == TUN):
                fd = _borrow(pid, int(number))
                try:
                    name = _tap(fd, taps) if device == TUN else _macvtap(fd, macvtaps[device])
                finally:
                    os.close(fd)
                if name:
                    yield name


def _macvtap(fd: int, name: str) -> str:
    ioctl(fd, TUNGETIFF, bytes(40))
    return name


def _tap(fd: int, taps: Mapping[Tap, str]) -> str | None:
    ifname = ioctl(fd, TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode()
    namespace = ioctl(fd, TUNGETDEVNETNS)
    try:
        return taps.get((netns.identity(namespace), ifname))
    finally:
        os.close(namespace)


def _borrow(pid: int, number: int) -> int:
    process = os.pidfd_open(pid)
    try:
        fd: int = netns.libc.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), process, number, 0)
    finally:
        os.close(process)
    if fd < 0:
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))
    return fd


def _holder(pid: int, queues: int) -> Holder:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read().decode(errors="replace").split("\0")
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        program = os.path.basename(words[0]) or file.read().strip()
    vm = _vm_name(words)
    return Holder(pid, os.stat(f"/proc/{pid}").st_uid, escaped(program), vm and escaped(vm), queues)


def _vm_name(words: list[str]) -> str | None:
    """The name in QEMU's -name NAME, or in -name guest=NAME,… of libvirt; None without it."""
    for option, value in pairwise(words):
        if option in ("-name", "--name"):
            named = [part.removeprefix("guest=") for part in value.split(",") if part.startswith("guest=")]
            return (named or [value.partition(",")[0]])[0]
    return None
