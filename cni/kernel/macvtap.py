"""Make a macvtap: one message creates it in the pod, a second says whose it is and sets it up.

Two sends, because the second message of one send would be carried out though the first was refused, and fall
upon the link that was there before; and because the pod's IPv6 has to be off in between (ipv6.py). Must not
decide what to make.

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
"""enum macvlan_mode (linux/if_link.h); the seed's pepa is the kernel's private."""


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
) -> None:
    """Make the link in the namespace of fd netns, still down. promisc and allmulti count for passthru only.

    There allmulti is set while the link is down, or the kernel would set it on the lower device too, and never take
    it back (macvlan_stop).

    host is a socket of the lower device's namespace: asked from the pod's, with the host's as IFLA_LINK_NETNSID,
    kernels before 6.15 would make it in the host's and move it. Raises OSError: EEXIST, EBUSY, EINVAL, ENODEV (see
    attach/kernel_errors.py).
    """
    data = [u32(IFLA_MACVLAN_MODE, MODES[mode])]
    if mode == "passthru" and not promisc:
        # By itself it would make its lower device promiscuous, and a trusted VF could hear all the others.
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
            nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "macvtap"), nest(IFLA_INFO_DATA, *data)),
            index=ifindex,
            flags=flags,
            change=flags,
            nlm=NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        )
    )


def bring_up(pod: Rtnl, ifindex: int, alias: str, *, promisc: bool, allmulti: bool, speaks: bool) -> None:
    """Mark the link ours and set it up.

    Unless it speaks, IFF_NOARP: while no QEMU has the device open, the pod's kernel would answer ARP requests
    for its other addresses with the guest's MAC. Raises OSError (EADDRINUSE: another link on the lower device
    has the MAC).
    """
    flags = IFF_UP | (IFF_PROMISC if promisc else 0) | (IFF_ALLMULTI if allmulti else 0)
    flags |= 0 if speaks else IFF_NOARP
    pod.do(  # the kernel takes the alias before the flags (do_setlink)
        link_message(
            RTM_SETLINK,
            text(IFLA_IFALIAS, alias),
            index=ifindex,
            flags=flags,
            change=IFF_UP | IFF_PROMISC | IFF_ALLMULTI | IFF_NOARP,
        )
    )
