"""Turns root into an unprivileged user. If a step fails, QEMU is not started.

Whatever needs privileges is opened before the first step. The steps, in this order:

 1. fds: QEMU's become 3, 4, 5 … and are inherited; the launcher's own follow, close-on-exec; stdin, stdout and
    stderr stay; all others are closed, inherited ones included.
 2. umask 077: files that QEMU creates (sockets, dumps) are for its user only.
 3. no supplementary groups (setgroups).
 4. no capability in the bounding set.
 5. group, then user: real, effective and saved.
 6. no capability in the effective, permitted and inheritable sets, whatever the securebits are, and therefore none in
    the ambient set (capabilities(7)).
 7. no_new_privs: executing a set-uid file restores no privilege.
 8. a seccomp filter: the ioctls of a tap's fd that QEMU never makes are refused (seccomp.py).
 9. /proc/self/status is read and must confirm all of this.

A launcher that was not started as root keeps its user; its fds come from the node agent. It also keeps supplementary
groups and bounding set, since it lacks the capabilities to change them: steps 3 and 4 are left out, and 9 skips them.
With no_new_privs the bounding set cannot restore anything.

The environment is reduced at exec, to what environment() returns. Must not run beside other threads: capabilities are
per thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import grp
import os
import pwd
from contextlib import suppress

from cni import spec
from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.kernel.netns import libc
from cni.launcher import NOT_PERMITTED, seccomp
from cni.launcher.qemu import FIRST_FD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38

_LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_HIGHEST_ID = 2**32 - 2  # 2**32 - 1 means "unchanged" to setresuid(2)

_KEPT = ("PATH", "TERM", "LANG", "LANGUAGE", "TZ", "TMPDIR")


@dataclass(frozen=True)
class User:
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


def parse_user(text: str) -> User:
    """Parse NAME|UID[:GROUP|GID]; without a group, the user's primary one. Raises CniError if one is 0 or unknown."""
    name, colon, group = text.partition(":")
    uid, gid = _number(name), _number(group)
    try:
        if uid is None or not colon:
            entry = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
            uid, gid = entry.pw_uid, gid if colon else entry.pw_gid
        if gid is None:
            gid = grp.getgrnam(group).gr_gid
    except (KeyError, OverflowError):
        hint = f"--user {name}:GID" if uid is not None and not colon else "--user UID:GID"
        raise CniError(
            spec.INVALID_ENVIRONMENT, f"--user {text!r}: no such user or group here; give numbers: {hint}"
        ) from None
    if not (0 < uid <= _HIGHEST_ID and 0 < gid <= _HIGHEST_ID):
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f"--user {text!r} is {uid}:{gid}; both must be from 1 to {_HIGHEST_ID}: QEMU never runs as root",
        )
    return User(uid, gid)


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """QEMU's environment: of the inherited one only PATH, terminal, locale, time zone and TMPDIR."""
    return {key: value for key, value in inherited.items() if key in _KEPT or key.startswith("LC_")}


def place(for_qemu: Sequence[int], ours: Sequence[int] = ()) -> list[int]:
    """Step 1: renumber for_qemu to FIRST_FD, FIRST_FD + 1, …, then ours; close all others. The new numbers of ours."""
    every = [*for_qemu, *ours]
    end = FIRST_FD + len(every)
    # First move all above the target numbers, so that none is overwritten before it has moved.
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end) for fd in every]
    for number, fd in enumerate(parked, FIRST_FD):
        os.dup2(fd, number, inheritable=number < FIRST_FD + len(for_qemu))
    for open_fd in map(int, os.listdir("/proc/self/fd")):
        if open_fd >= end:
            with suppress(OSError):  # the fd of the listing itself is closed by now
                os.close(open_fd)
    return list(range(FIRST_FD + len(for_qemu), end))


def drop(user: User) -> None:
    """Steps 2 to 9, irreversible. user: the caller's own unless that is root. Raises CniError NOT_PERMITTED."""
    root = os.geteuid() == 0
    try:
        os.umask(0o077)
        if root:
            os.setgroups([])
            for capability in _bounding_set():
                prctl(PR_CAPBSET_DROP, capability)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        _clear_capabilities()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if seccomp.supported():
            seccomp.install()
        with open("/proc/self/status") as status:
            kept = excess(status, user, was_root=root)
    except OSError as error:
        raise CniError(
            NOT_PERMITTED,
            f"cannot become {user}: the launcher needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP to drop privileges, "
            "and a kernel with seccomp filters",
            reason(error),
        ) from error
    if kept:
        raise CniError(
            NOT_PERMITTED, f"still privileged after becoming {user}; nothing was started", "; ".join(kept)
        )


def excess(status: Iterable[str], user: User, *, was_root: bool = True) -> list[str]:
    """The lines of /proc/PID/status that are missing, or differ from those of an unprivileged process of that user."""
    wanted = {
        "Uid": [str(user.uid)] * 4,
        "Gid": [str(user.gid)] * 4,
        **{key: ["0" * 16] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
        "NoNewPrivs": ["1"],
    }
    if seccomp.supported():
        wanted["Seccomp"] = ["2"]
    if was_root:
        wanted |= {"Groups": [], "CapBnd": ["0" * 16]}
    found = {key: value.split() for key, _, value in (line.partition(":") for line in status)}
    return [
        f"{key}: {' '.join(found.get(key, ['?']))}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]


def prctl(option: int, argument: int) -> int:
    """prctl(2) for the calling thread. Raises OSError."""
    result: int = libc.prctl(option, *map(ctypes.c_ulong, (argument, 0, 0, 0)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option} {argument}: {os.strerror(number)}")
    return result


def _bounding_set() -> list[int]:
    held = []
    for capability in range(64):
        try:
            if prctl(PR_CAPBSET_READ, capability):
                held.append(capability)
        except OSError:  # EINVAL: the kernel has no more capabilities
            break
    return held


def _clear_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else None
