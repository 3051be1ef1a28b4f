"""Make a macvtap: one message creates it in the pod's network namespace, a second gives it its alias and sets it up.

The messages are sent one by one. In one send the kernel would carry out the second although it refuses the first, on a
link that was there before. And the pod's IPv6 is switched off between the two (ipv6.py). Must not decide what to make.

Sources: drivers/net/macvlan.c, macvtap.c; net/core/rtnetlink.c.
"""

from __future__ import annotations

import struct

from cni.kernel.rtnl import (
    IFF_ALLMULTI,
    IFF_NOARP,
    IFF_PROMISC,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_GROUP,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINKINFO,
    IFLA_MACVLAN_BC_QUEUE_LEN,
    IFLA_MACVLAN_FLAGS,
    IFLA_MACVLAN_MODE,
    IFLA_MTU,
    IFLA_NET_NS_FD,
    MACVLAN_FLAG_NOPROMISC,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_NEWLINK,
    RTM_SETLINK,
    attr,
    link_message,
    mac_bytes,
    nest,
    text,
    u32,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import Link, Rtnl

MODES = {"pepa": 1, "vepa": 2, "bridge": 4, "passthru": 8}
"""enum macvlan_mode (linux/if_link.h). pepa is the kernel's private."""


def create(
    host: Rtnl,
    *,
    netns: int,
    lower: Link,
    ifname: str,
    ifindex: int,
    mode: str,
    mac: str,
    mtu: int,
    bcqueuelen: int | None,
    promisc: bool = False,
    allmulti: bool = False,
    group: int = 0,
) -> None:
    """Make the link in the network namespace of fd netns, down. promisc and allmulti count for passthru only.

    allmulti of a passthru link is set while the link is down: set later, the kernel would set it on the lower device as
    well, and never reset it (macvlan_stop). host is a socket of the lower device's namespace: sent by the pod's, with
    the host's as IFLA_LINK_NETNSID, kernels before 6.15 would make the link in the host's namespace and move it. Raises
    OSError: EEXIST, EBUSY, EINVAL, ENODEV (attach/kernel_errors.py explains them).
    """
    data = [u32(IFLA_MACVLAN_MODE, MODES[mode])]
    if mode == "passthru" and not promisc:
        # Otherwise the kernel makes the lower device promiscuous, and a trusted VF receives the other VFs' frames.
        data.append(attr(IFLA_MACVLAN_FLAGS, struct.pack("=H", MACVLAN_FLAG_NOPROMISC)))
    if bcqueuelen is not None:
        data.append(u32(IFLA_MACVLAN_BC_QUEUE_LEN, bcqueuelen))
    flags = IFF_ALLMULTI if mode == "passthru" and allmulti else 0
    host.do(
        link_message(
            RTM_NEWLINK,
            text(IFLA_IFNAME, ifname),
            u32(IFLA_LINK, lower.index),
            u32(IFLA_NET_NS_FD, netns),
            attr(IFLA_ADDRESS, mac_bytes(mac)),
            u32(IFLA_MTU, mtu),
            u32(IFLA_GROUP, group),
            nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "macvtap"), nest(IFLA_INFO_DATA, *data)),
            index=ifindex,
            flags=flags,
            change=flags,
            nlm=NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        )
    )


def set_mode(pod: Rtnl, ifindex: int, mode: str) -> None:
    """Change the link's mode between vepa, pepa and bridge. Its queues and their fds stay.

    pod is a socket of the link's own namespace: with IFLA_TARGET_NETNSID, Linux 6.18 refuses the change (ENODEV).
    Raises OSError: ENODEV if the link is gone.
    """
    data = nest(IFLA_INFO_DATA, u32(IFLA_MACVLAN_MODE, MODES[mode]))
    pod.do(
        link_message(RTM_NEWLINK, nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "macvtap"), data), index=ifindex)
    )


def bring_up(pod: Rtnl, ifindex: int, alias: str, *, promisc: bool, allmulti: bool, speaks: bool) -> None:
    """Give the link its alias and set it up. speaks: whether the pod's kernel may use the link.

    A link that the kernel may not use gets IFF_NOARP: while no QEMU has the device open, the kernel would answer ARP
    requests for the pod's other addresses with the guest's MAC. Raises OSError; EADDRINUSE: another link on the lower
    device has the MAC.
    """
    flags = IFF_UP | (IFF_PROMISC if promisc else 0) | (IFF_ALLMULTI if allmulti else 0)
    flags |= 0 if speaks else IFF_NOARP
    pod.do(  # the kernel sets the alias before the flags (do_setlink)
        link_message(
            RTM_SETLINK,
            text(IFLA_IFALIAS, alias),
            index=ifindex,
            flags=flags,
            change=IFF_UP | IFF_PROMISC | IFF_ALLMULTI | IFF_NOARP,
        )
    )
