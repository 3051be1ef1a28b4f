"""Make a macvtap: one message creates it in the pod, a second send names its owner, silences it and sets it up.

The kernel does all of a send before send(2) returns. There are two sends because a create that is refused must
not let the messages after it fall upon the link that was there before. Must not decide what to make.

Sources: drivers/net/macvlan.c, macvtap.c; net/core/rtnetlink.c.
"""

from __future__ import annotations

import errno

from cni.rtnl import (
    AF_INET6,
    IFF_ALLMULTI,
    IFF_NOARP,
    IFF_PROMISC,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_AF_SPEC,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INET6_ADDR_GEN_MODE,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINK_NETNSID,
    IFLA_LINKINFO,
    IFLA_MACVLAN_BC_QUEUE_LEN,
    IFLA_MACVLAN_MODE,
    IFLA_MTU,
    IN6_ADDR_GEN_MODE_NONE,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_NEWLINK,
    RTM_SETLINK,
    attr,
    link_message,
    mac_bytes,
    nest,
    s32,
    text,
    u32,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.rtnl import Link, Rtnl

MODES = {"pepa": 1, "vepa": 2, "bridge": 4, "passthru": 8}
"""enum macvlan_mode (linux/if_link.h); the seed's pepa is the kernel's private."""


def create(
    pod: Rtnl,
    *,
    host_nsid: int,
    lower: Link,
    ifname: str,
    ifindex: int,
    mode: str,
    mac: str,
    mtu: int,
    bcqueuelen: int | None,
) -> None:
    """Make the link, still down. pod is a socket of the pod's namespace, which knows the host's as host_nsid.

    Raises OSError: EEXIST, EBUSY, EINVAL, ENODEV (see explain).
    """
    data = [u32(IFLA_MACVLAN_MODE, MODES[mode])]
    if bcqueuelen is not None:
        data.append(u32(IFLA_MACVLAN_BC_QUEUE_LEN, bcqueuelen))
    pod.do(
        link_message(
            RTM_NEWLINK,
            text(IFLA_IFNAME, ifname),
            u32(IFLA_LINK, lower.index),
            s32(IFLA_LINK_NETNSID, host_nsid),
            attr(IFLA_ADDRESS, mac_bytes(mac)),
            u32(IFLA_MTU, mtu),
            nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "macvtap"), nest(IFLA_INFO_DATA, *data)),
            index=ifindex,
            nlm=NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        )
    )


def bring_up(pod: Rtnl, ifindex: int, alias: str, *, promisc: bool, allmulti: bool, speaks: bool) -> None:
    """Mark the link ours and set it up; unless it speaks, the pod's kernel sends nothing on it.

    Silence is two settings: no IPv6 address is generated (no DAD, MLD or router solicitation with the guest's
    MAC) and, with IFF_NOARP, no ARP request for another of the pod's addresses is answered while no QEMU has
    the device open. Raises OSError (EADDRINUSE: another link on the lower device has the MAC).
    """
    flags = IFF_UP | (IFF_PROMISC if promisc else 0) | (IFF_ALLMULTI if allmulti else 0)
    flags |= 0 if speaks else IFF_NOARP
    silence = nest(AF_INET6, attr(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE])))
    # The order matters: in one message the kernel would set the link up before it reads IFLA_AF_SPEC.
    marked, silenced, up = pod.talk(
        link_message(RTM_SETLINK, text(IFLA_IFALIAS, alias), index=ifindex),
        link_message(RTM_SETLINK, nest(IFLA_AF_SPEC, silence), index=ifindex),
        link_message(
            RTM_SETLINK,
            index=ifindex,
            flags=flags,
            change=IFF_UP | IFF_PROMISC | IFF_ALLMULTI | IFF_NOARP,
        ),
    )
    if isinstance(silenced, OSError) and silenced.errno != errno.EAFNOSUPPORT:  # that: no IPv6 here to silence
        raise silenced
    for outcome in (marked, up):
        if isinstance(outcome, OSError):
            raise outcome
