"""Switches the kernel's own IPv6 off on a guest's link (net/ipv6/addrconf.c, ndisc.c).

When a link comes up, the kernel sends MLD, DAD and router solicitations with the guest's MAC. While no QEMU has the
device open, frames go up the pod's stack: a router advertisement on the wire would give the pod a default route and an
address (as in CVE-2020-10749). addrgenmode none prevents the first only. disable_ipv6, set before the link is up,
prevents both.
"""

from __future__ import annotations

import os

from cni.kernel import mount

_PATH = "sys/net/ipv6/conf/{ifname}/{key}"


def keep_out(ifname: str, *, speaks: bool) -> None:
    """Switch the kernel's IPv6 off on the link; if speaks, only its acceptance of router advertisements.

    speaks: whether the link is to have addresses of the kernel's. The link is in the calling thread's network
    namespace, the one that /proc/sys/net shows. Without such a file the kernel has no IPv6. Raises OSError.
    """
    _write(ifname, "accept_ra" if speaks else "disable_ipv6", "0" if speaks else "1")


def let_in(ifname: str) -> None:
    """Switch it on: after keep_out(speaks=False), or where it is off in the pod. Raises OSError."""
    _write(ifname, "disable_ipv6", "0")


def is_on(ifname: str) -> bool:
    """Whether the kernel has IPv6 on that link."""
    try:
        with open(f"/proc/{_PATH.format(ifname=ifname, key='disable_ipv6')}", encoding="ascii") as file:
            return file.read().strip() == "0"
    except FileNotFoundError:
        return False


def _write(ifname: str, key: str, value: str) -> None:
    path = _PATH.format(ifname=ifname, key=key)
    try:
        fd = os.open(f"/proc/{path}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError:  # a container's /proc/sys is read-only
        proc = mount.detached(b"proc")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        finally:
            os.close(proc)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
