"""Make a persistent tap in the pod's namespace (drivers/net/tun.c). rtnetlink cannot make one: ioctls do.

Must not decide anything; joining a tap to a Linux bridge is iproute.py's.
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
    """Make the tap, down, owned by owner and group (numeric; None: anybody with CAP_NET_ADMIN).

    With more than one queue it is IFF_MULTI_QUEUE, which every later open must ask for too. Raises OSError
    (EEXIST: a link of that name is there).
    """
    fd = tapdev.open_node(tapdev.TUN, pod_netns)
    try:
        ioctl(fd, TUNSETIFINDEX, struct.pack("=i", ifindex))
        flags = tapdev.flags(queues) | IFF_TUN_EXCL
        try:
            ioctl(fd, tapdev.TUNSETIFF, tapdev.ifreq(ifname, flags))
        except OSError as error:
            if error.errno == errno.EBUSY:  # IFF_TUN_EXCL's word for EEXIST
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            raise
        if owner is not None:
            ioctl(fd, TUNSETOWNER, owner)
        if group is not None:
            ioctl(fd, TUNSETGROUP, group)
        ioctl(fd, TUNSETPERSIST, 1)
    finally:
        os.close(fd)
