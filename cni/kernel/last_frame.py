"""When a link has last sent a frame: a rule of nf_tables in the link's network namespace notes it.

The link has a table of its own, whose only rule is the statement `last` at the hook egress (Linux 5.16): the kernel
notes the time and lets the frame pass (net/netfilter/nft_last.c). No process wakes up for it. CAP_NET_ADMIN is needed
in the network namespace, and the calling thread must be in it. All functions raise OSError: among others
EPROTONOSUPPORT or EOPNOTSUPP if the kernel has no nf_tables or no such hook. The kernel answers before send returns.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from cni.kernel.rtnl import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    attr,
    attributes,
    nest,
    text,
)

_NETLINK_NETFILTER = 12
_NFPROTO_NETDEV = 5
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES, linux/netfilter/nfnetlink.h
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
# linux/netfilter/nf_tables.h
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _GETRULE = 0, 2, 3, 6, 7
_TABLE_NAME = _CHAIN_TABLE = _RULE_TABLE = 1
_CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
_EGRESS = 1
_RULE_CHAIN, _RULE_EXPRESSIONS = 2, 4
_LIST_ELEMENT = 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_LAST_SET, _LAST_MILLISECONDS = 1, 2
_CHAIN = "sent"
_ANSWER_BYTES = 1 << 15
_HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr and struct nfgenmsg


def watch(ifname: str) -> float | None:
    """Have the kernel note each frame that the link sends, and return the seconds since the last one noted.

    None: no frame has been noted, because the link has sent none or was not watched.
    """
    table = text(_TABLE_NAME, _table(ifname))
    hook = nest(
        _CHAIN_HOOK,
        attr(_HOOK_NUMBER, struct.pack("!I", _EGRESS)),
        attr(_HOOK_PRIORITY, struct.pack("!i", 0)),
        text(_HOOK_DEVICE, ifname),
    )
    last = nest(_LIST_ELEMENT, text(_EXPRESSION_NAME, "last"), nest(_EXPRESSION_DATA))
    try:
        _change(
            (_NEWTABLE, NLM_F_CREATE, table),
            (
                _NEWCHAIN,
                NLM_F_CREATE | NLM_F_EXCL,
                table + text(_CHAIN_NAME, _CHAIN) + hook + text(_CHAIN_TYPE, "filter"),
            ),
            (_NEWRULE, NLM_F_CREATE, table + text(_RULE_CHAIN, _CHAIN) + nest(_RULE_EXPRESSIONS, last)),
        )
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
        return _seconds(table)
    return None


def forget(ifname: str) -> None:
    """Remove the link's table, if there is one."""
    try:
        _change((_DELTABLE, 0, text(_TABLE_NAME, _table(ifname))))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _table(ifname: str) -> str:
    return f"vmtap-{ifname}"


def _seconds(table: bytes) -> float | None:
    with _open() as netlink:
        rule = table + text(_RULE_CHAIN, _CHAIN)
        netlink.send(_message(_SUBSYSTEM << 8 | _GETRULE, NLM_F_DUMP, rule))
        return parse(netlink.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT))


def parse(answer: bytes) -> float | None:
    """The seconds since the last frame, in the kernel's answer to a list of the table's rules; None without one."""
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _SUBSYSTEM << 8 | _NEWRULE:
        return None  # the end of a list without rules: another process has removed it
    expression = attributes(answer[_HEADER.size :]).get(_RULE_EXPRESSIONS, b"")
    for kind in (_LIST_ELEMENT, _EXPRESSION_DATA):
        expression = attributes(expression).get(kind, b"")
    found = attributes(expression)
    if not any(found.get(_LAST_SET, b"")):
        return None
    return int.from_bytes(found.get(_LAST_MILLISECONDS, b"")[:8]) / 1000


def _change(*messages: tuple[int, int, bytes]) -> None:
    """Carry out messages (type, flags, attributes) in one transaction."""
    batch = [_message(_BATCH_BEGIN, 0, b"", family=0, resource=_SUBSYSTEM)]
    batch += [_message(_SUBSYSTEM << 8 | kind, NLM_F_ACK | flags, body) for kind, flags, body in messages]
    batch.append(_message(_BATCH_END, 0, b"", family=0, resource=_SUBSYSTEM))
    with _open() as netlink:
        netlink.send(b"".join(batch))
        for _ in messages:  # the kernel answers each of them, also if another has failed
            answer = netlink.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT)
            _, kind, _, _, _, number = struct.unpack_from("=IHHIIi", answer)
            if kind == NLMSG_ERROR and number:
                raise OSError(-number, os.strerror(-number))


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)


def _message(kind: int, flags: int, body: bytes, family: int = _NFPROTO_NETDEV, resource: int = 0) -> bytes:
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, NLM_F_REQUEST | flags, 1, 0, family, 0, socket.htons(resource)) + body
