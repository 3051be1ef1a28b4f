"""A program in a pod: who runs this becomes a process as a container runtime makes it for an unprivileged user.

    inpod.py NETNS BROKER_FOLDER UID PATH,PATH… PROGRAM ARGS

Its own user, mount and network namespaces, no capability, and a /dev without taps. The broker's folder is mounted,
read-only, where a pod would have it; PATHs stay readable even below folders that are root's alone. Imports nothing
that is not Python's: it runs before anything is set up.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The project."""
MOUNTED = "/mnt/vmtap"
"""The broker's folder, in the pod."""

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def argv(netns: Path, folder: Path, program: list[str], *, uid: int = 107) -> list[str]:
    """The command line that runs the program so."""
    needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    paths = ",".join(str(path) for path in needed)
    return [sys.executable, __file__, str(netns), str(folder), str(uid), paths, *program]


def main() -> None:
    netns, folder, uid, paths, *program = sys.argv[1:]
    with open(netns, "rb") as namespace:
        _call("setns", namespace.fileno(), CLONE_NEWNET)
    _call("unshare", CLONE_NEWNS)
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _keep([Path(path) for path in paths.split(",")])
    _call("mount", b"none", b"/mnt", b"tmpfs", 0, None)
    os.mkdir(MOUNTED)
    _bind(folder, MOUNTED)
    _call("mount", None, MOUNTED.encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)
    _dev()
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    _call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self stays root's
    _call("unshare", CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{uid} {uid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    os.execv(program[0], program)  # noqa: S606 - who is not root loses every capability here


def _dev() -> None:
    """What a container has: no tap, no /dev/net/tun, no /dev/vhost-net."""
    names = ("null", "zero", "full", "random", "urandom")
    kept = {name: os.open(f"/dev/{name}", os.O_PATH) for name in names}
    _call("mount", b"none", b"/dev", b"tmpfs", 0, b"mode=755")
    for name, fd in kept.items():
        Path(f"/dev/{name}").touch()
        _bind(f"/proc/self/fd/{fd}", f"/dev/{name}")
        os.close(fd)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")


def _keep(paths: list[Path]) -> None:
    """Where a folder above a path is root's alone, another one that has nothing but the path takes its place."""
    held = {path: os.open(path, os.O_PATH) for path in paths}
    closed = {
        path: next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 1), None)
        for path in paths
    }
    for folder in {folder for folder in closed.values() if folder}:
        _call("mount", b"none", bytes(folder), b"tmpfs", 0, b"mode=755")
    for path, fd in held.items():
        if closed[path]:
            path.mkdir(parents=True, exist_ok=True)
            _bind(f"/proc/self/fd/{fd}", str(path))
        os.close(fd)


def _bind(source: str, target: str) -> None:
    _call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
