"""Finds the link and the network namespace of a record in the kernel. Must not change anything."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager, suppress
from itertools import chain

from cni.errors import CniError
from cni.kernel import netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.kernel.rtnl import Link, Rtnl
    from cni.state.record import Record


def find_link(host: Rtnl, record: Record) -> Link | None:
    """The record's link, identified by index and alias; None if it is gone. Raises OSError."""
    try:
        link = host.link(index=record.ifindex, nsid=record.nsid)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: no namespace has the id
            raise
        return None
    return link if link and link.alias == record.alias else None


@contextmanager
def opened_netns(record: Record, *, search: bool = True) -> Iterator[int | None]:
    """An fd of the record's network namespace, open in the block; None if no path leads to it any more.

    search: whether to look at the paths of all namespaces, if the record's own does not lead there.
    """
    for path in chain([record.netns], namespace_paths() if search else ()):
        try:
            fd = netns.open_path(path)
        except (CniError, OSError):
            continue
        try:
            if netns.identity(fd) == record.netns_id:
                yield fd
                return
        finally:
            os.close(fd)
    yield None


def namespace_paths() -> Iterator[str]:
    """Paths of network namespaces: mounts (proc_pid_mountinfo(5)), then /proc/PID/ns/net of those without a mount."""
    seen = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            if fields[3].startswith("net:["):
                seen.add(fields[3])
                yield re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
    for name in os.listdir("/proc"):
        if name.isdecimal():
            path = f"/proc/{name}/ns/net"
            with suppress(OSError):
                if (namespace := os.readlink(path)) not in seen:
                    seen.add(namespace)
                    yield path
