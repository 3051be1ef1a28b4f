"""Keeps the pod's own kernel out of the guest's wire (net/ipv6/addrconf.c, ndisc.c).

A link that comes up makes the kernel send MLD, DAD and router solicitations with the guest's MAC. And while no
QEMU has the device open, frames go up the pod's stack: a router advertisement on the wire would give the pod a
default route and an address (CVE-2020-10749 is of this kind). addrgenmode none stops the first only; both are
stopped by disable_ipv6, set before the link is up.
"""

from __future__ import annotations

import os

from cni.kernel import mount

_PATH = "sys/net/ipv6/conf/{ifname}/{key}"


def keep_out(ifname: str, *, speaks: bool) -> None:
    """No IPv6 of the kernel's on that link; if it speaks (addresses are put on it), no router's advertisement.

    The link is in the calling thread's namespace: /proc/sys/net is that of the thread that opens it. No such file
    means no IPv6 there. Raises OSError.
    """
    _write(ifname, "accept_ra" if speaks else "disable_ipv6", "0" if speaks else "1")


def let_in(ifname: str) -> None:
    """Undo keep_out() on a link that does not speak."""
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
