"""Notices that the filters or limits of an attachment's link are gone or others, and puts them back (agent/drift.py).

The kernel reports when tables, chains or rules of nf_tables are removed, whether by NET_ADMIN in the pod or by a
firewall of the node that flushes the ruleset. What is added, and a queueing discipline that changes, is found when the
record is looked at. A macvtap's name is part of its filters: on Linux 6.16 and later, a link that is renamed loses them
(nf_tables_api.c, nf_tables_netdev_event).
"""

from __future__ import annotations

import errno
import socket
import struct
import sys

from cni.kernel import bpf, nft
from cni.kernel.rtnl import (
    IFLA_IFNAME,
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_LISTEN_ALL_NSID,
    RTM_SETLINK,
    SOL_NETLINK,
    link_message,
    text,
)
from cni.port import guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import Link, Rtnl
    from cni.state.record import Record

INTACT = "filters"
_MOST = 4096
_AT_TYPE, _AT_PORT = 4, 12  # nlmsghdr.nlmsg_type, nlmsg_pid
_AT_TABLE = 16 + 4 + 4  # behind struct nfgenmsg and the attribute's head: the table's name comes first
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h


def events() -> socket.socket | None:
    """A socket with an event for what others remove of vmtap's tables, in every network namespace with an id.

    None on a kernel without nf_tables, which has no filters either. Raises OSError.
    """
    try:
        events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, nft.NETLINK_NETFILTER
        )
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return None
    prefix = [struct.unpack("!I", each)[0] for each in (b"vmta", b"p-po")]
    bpf.attach(
        events,
        bpf.assemble(
            (
                # NFT_MSG_DELTABLE, DELCHAIN, DELRULE; the subsystem is the other byte.
                (bpf.BPF_LD_B_ABS, 0, 0, _AT_TYPE + (0 if sys.byteorder == "little" else 1)),
                (bpf.BPF_JEQ_K, 2, 0, 2),
                (bpf.BPF_JEQ_K, 1, 0, 5),
                (bpf.BPF_JEQ_K, 0, 7, 8),
                (bpf.BPF_LD_B_ABS, 0, 0, _AT_PORT + (3 if sys.byteorder == "little" else 0)),
                (bpf.BPF_JEQ_K, 5, 0, nft.OWN_PORT),
                (bpf.BPF_LD_W_ABS, 0, 0, _AT_TABLE),
                (bpf.BPF_JEQ_K, 0, 3, prefix[0]),
                (bpf.BPF_LD_W_ABS, 0, 0, _AT_TABLE + 4),
                (bpf.BPF_JEQ_K, 0, 1, prefix[1]),
                (bpf.BPF_RET_K, 0, 0, 1),
                (bpf.BPF_RET_K, 0, 0, 0),
            )
        ),
    )
    events.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    events.bind((0, 0))
    events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    return events


def is_removed(removals: socket.socket | None) -> bool:
    """Whether filters may have been removed since the last call. Reads a bounded number of events. Raises OSError."""
    found = False
    if removals is None:
        return found
    for _ in range(_MOST):
        try:
            found |= bool(removals.recv(1))
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            found = True
    return found


def found(record: Record, link: Link) -> str:
    """INTACT, or what is there instead. link: as it is now. Raises OSError."""
    if _is_renamed(record, link):
        return f"renamed to {link.name}"
    with guard.reached(record) as own:
        return INTACT if own is None or guard.is_intact(record, own) else "other filters"


def put_back(record: Record, pod: Rtnl, link: Link) -> None:
    """Put the record's filters and limits in force, if it has any, and the name that they go by.

    pod: of the pod's network namespace; link: as it is now. Raises OSError, CniError 100.
    """
    if record.port is None:
        return
    if _is_renamed(record, link):
        pod.do(link_message(RTM_SETLINK, text(IFLA_IFNAME, record.ifname), index=link.index))
    with guard.reached(record) as own:
        if own and not guard.is_intact(record, own):
            guard.put(record, own)


def _is_renamed(record: Record, link: Link) -> bool:
    return record.device == "macvtap" and link.name != record.ifname
