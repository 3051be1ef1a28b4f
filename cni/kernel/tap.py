"""Make a persistent tap in the pod's network namespace, by ioctl: rtnetlink cannot make one (drivers/net/tun.c).

Must not decide anything. iproute.py makes a tap a port of a Linux bridge.
"""

from __future__ import annotations

import errno
import os
import struct
from fcntl import ioctl

from cni.kernel import tapdev

TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
TUNSETGROUP = 0x400454CE
TUNSETIFINDEX = 0x400454DA

IFF_TUN_EXCL = 0x8000


def create(
    pod_netns: int, *, ifname: str, ifindex: int, queues: int, owner: int | None, group: int | None
) -> None:
    """Make the tap, down. owner, group: numeric ids that may open it; None: whoever has CAP_NET_ADMIN.

    With more than one queue it gets IFF_MULTI_QUEUE, which each later open must ask for, too. Raises OSError; EEXIST: a
    link has the name.
    """
    fd = tapdev.open_node(tapdev.TUN, pod_netns)
    try:
        ioctl(fd, TUNSETIFINDEX, struct.pack("=i", ifindex))
        flags = tapdev.flags(queues) | IFF_TUN_EXCL
        try:
            ioctl(fd, tapdev.TUNSETIFF, tapdev.ifreq(ifname, flags))
        except OSError as error:
            if error.errno == errno.EBUSY:  # with IFF_TUN_EXCL this means EEXIST
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            raise
        if owner is not None:
            ioctl(fd, TUNSETOWNER, owner)
        if group is not None:
            ioctl(fd, TUNSETGROUP, group)
        ioctl(fd, TUNSETPERSIST, 1)
    finally:
        os.close(fd)
