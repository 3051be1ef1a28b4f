"""Raw nf_tables: tables of the family netdev, their chains and rules, in one transaction each.

A rule is bytes: the expressions of linux/netfilter/nf_tables.h that the functions here encode. Offsets count from the
Ethernet header; the kernel puts a tag that the NIC has stripped back into what a rule loads (nft_payload.c). The
calling thread must be in the link's network namespace when a socket is opened, and needs CAP_NET_ADMIN there. All
functions that send raise OSError: among others EPROTONOSUPPORT, EOPNOTSUPP or ENOENT if the kernel has no nf_tables, or
no such hook or expression. The kernel answers before send returns.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
import time
from _socket import AF_NETLINK, MSG_DONTWAIT, SOCK_CLOEXEC, SOCK_RAW, htons, socket
from contextlib import contextmanager, suppress
from functools import lru_cache
from queue import SimpleQueue

from cni.dataclass import dataclass
from cni.kernel.rtnl import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attr,
    attributes,
    nest,
    text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Message = tuple[int, int, bytes]
    """Type, flags beside NLM_F_REQUEST and NLM_F_ACK, attributes."""

NETLINK_NETFILTER = 12
_NFPROTO_NETDEV = 5
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES, linux/netfilter/nfnetlink.h
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
# linux/netfilter/nf_tables.h
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE = 0, 1, 2, 3, 4, 6, 7
_TABLE_NAME = _CHAIN_TABLE = _RULE_TABLE = 1
_TABLE_FLAGS, _TABLE_HANDLE = 2, 4
_DORMANT = b"\1"
_CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
INGRESS, EGRESS = 0, 1
OWN_PORT = 0x76
"""The high byte of the port id of vmtap's sockets, which the kernel puts into the events of what they change."""
_RULE_CHAIN, _RULE_EXPRESSIONS = 2, 4
_LIST_ELEMENT = 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_REGISTER_VERDICT, _REGISTER = 0, 1  # NFT_REG_VERDICT, NFT_REG_1: 16 bytes
DROP, JUMP, GOTO, RETURN = 0, -3, -4, -5
EQUAL, DIFFERENT, BELOW, AT_MOST, ABOVE, AT_LEAST = range(6)  # NFT_CMP_*
_LIMIT_FRAMES, _LIMIT_BYTES, _LIMIT_OVER = 0, 1, 1
_ANSWER_BYTES = 1 << 16
_MOST_ANSWERS = 256
"""Of one dump, of up to 32 KiB each: more than any table of vmtap's, to which a pod may add rules without end."""
_FREED_SECONDS = 0.1
_closing: SimpleQueue[tuple[float, Netlink]] = SimpleQueue()
_closers: list[threading.Thread] = []
_lock = threading.Lock()
_HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr and struct nfgenmsg
_ERROR = struct.Struct("=IHHIIi")  # struct nlmsghdr and struct nlmsgerr
_COUNTER = text(_EXPRESSION_NAME, "counter")
_COUNTER_PACKETS = 2


_kept = lru_cache(maxsize=1024)
"""For what most rules consist of."""


@dataclass(frozen=True)
class Rule:
    """A rule as the kernel lists it."""

    chain: str
    expressions: tuple[tuple[str, bytes], ...]
    """The name and the attributes of each."""


@_kept
def load(offset: int, length: int) -> bytes:
    """Load bytes of the frame; one that is too short for them does not match the rule."""
    return expression("payload", _u32(1, _REGISTER), _u32(2, 0), _u32(3, offset), _u32(4, length))


@_kept
def compare(operation: int, value: bytes) -> bytes:
    """Go on with the rule only if the loaded bytes compare so with the value."""
    return expression("cmp", _u32(1, _REGISTER), _u32(2, operation), attr(3, attr(_DATA_VALUE, value)))


@_kept
def masked(mask: bytes) -> bytes:
    """Replace the loaded bytes by their conjunction with the mask."""
    return expression(
        "bitwise",
        _u32(1, _REGISTER),
        _u32(2, _REGISTER),
        _u32(3, len(mask)),
        attr(4, attr(_DATA_VALUE, mask)),
        attr(5, attr(_DATA_VALUE, bytes(len(mask)))),
    )


@_kept
def field(offset: int, value: bytes, operation: int = EQUAL, mask: bytes = b"") -> bytes:
    """Go on only if the frame's bytes at the offset, after the mask if there is one, compare so with the value."""
    return load(offset, len(value)) + (masked(mask) if mask else b"") + compare(operation, value)


@_kept
def verdict(code: int, chain: str = "") -> bytes:
    """End the rule: DROP, RETURN, JUMP to the chain, or GOTO it, which returns where this one would."""
    inner = attr(_VERDICT_CODE, struct.pack("!i", code)) + (text(_VERDICT_CHAIN, chain) if chain else b"")
    return expression("immediate", _u32(1, _REGISTER_VERDICT), attr(2, attr(_DATA_VERDICT, inner)))


@_kept
def counter() -> bytes:
    """Count the frames that get here."""
    return expression("counter")


@_kept
def over(rate: int, burst: int, *, frames: bool = False) -> bytes:
    """Go on only with what exceeds the rate, in bytes a second, or frames a second; burst is in bytes or frames."""
    return expression(
        "limit",
        attr(1, struct.pack("!Q", rate)),
        attr(2, struct.pack("!Q", 1)),
        _u32(3, burst),
        _u32(4, _LIMIT_FRAMES if frames else _LIMIT_BYTES),
        _u32(5, _LIMIT_OVER),
    )


def expression(name: str, *body: bytes) -> bytes:
    """One element of a rule."""
    return nest(_LIST_ELEMENT, text(_EXPRESSION_NAME, name), nest(_EXPRESSION_DATA, *body))


def new_table(table: str) -> Message:
    """Make the table, unless it is there."""
    return _NEWTABLE, NLM_F_CREATE, text(_TABLE_NAME, table)


def delete_table(table: str) -> Message:
    """Delete the table and all in it; ENOENT without one."""
    return _DELTABLE, 0, text(_TABLE_NAME, table)


def delete_this_table(handle: bytes) -> Message:
    """Delete the table of that handle, and no later one of its name; ENOENT without one."""
    return _DELTABLE, 0, attr(_TABLE_HANDLE, handle)


def base_chain(table: str, chain: str, hook: int, ifname: str, priority: int) -> Message:
    """Make a chain whose rules see each frame of the link at the hook. EEXIST if the chain is there."""
    hooked = nest(
        _CHAIN_HOOK, _u32(_HOOK_NUMBER, hook), attr(_HOOK_PRIORITY, struct.pack("!i", priority)),
        text(_HOOK_DEVICE, ifname),
    )  # fmt: skip
    named = text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, chain)
    return _NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, named + hooked + text(_CHAIN_TYPE, "filter")


def chain(table: str, chain: str) -> Message:
    """Make a chain that others jump to."""
    return _NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, chain)


def rule(table: str, chain: str, *expressions: bytes) -> Message:
    """Append a rule to the chain."""
    head = text(_RULE_TABLE, table) + text(_RULE_CHAIN, chain)
    return _NEWRULE, NLM_F_CREATE | 0x800, head + nest(_RULE_EXPRESSIONS, *expressions)


class Netlink(socket):
    """A socket of nf_tables."""

    has_deleted = False
    """Whether something was deleted by it."""


@contextmanager
def opened() -> Iterator[Netlink]:
    """A socket of the calling thread's network namespace."""
    netlink = Netlink(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
    try:
        with suppress(OSError):  # another process has it: any will do
            netlink.bind((OWN_PORT << 24 | threading.get_native_id(), 0))
        yield netlink
    finally:
        if netlink.has_deleted:
            _close_later(netlink)
        else:
            netlink.close()


def _close_later(netlink: Netlink) -> None:
    """Close the socket in another thread, when the kernel has freed what was deleted.

    Until then a close would wait for that, 10 to 30 ms, and hold up what else happens in the network namespace, the
    deletion of a link too (nft_rcv_nl_event and nf_tables_netdev_event in nf_tables_api.c). No event tells of it.
    """
    _closing.put((time.monotonic() + _FREED_SECONDS, netlink))
    with _lock:
        if not _closers:
            _closers.append(threading.Thread(target=_close, name="nft close", daemon=True))
            _closers[0].start()


def _close() -> None:
    while True:
        due, netlink = _closing.get()
        time.sleep(max(0.0, due - time.monotonic()))
        netlink.close()


def change(netlink: Netlink, messages: Sequence[Message]) -> None:
    """Carry out the messages in one transaction: all or none."""
    netlink.has_deleted |= any(kind == _DELTABLE for kind, _, _ in messages)
    batch = [_batch(_BATCH_BEGIN)]
    for number, (kind, flags, body) in enumerate(messages, 1):
        # An error is answered in any case; the last message's answer comes after those of the others.
        ack = NLM_F_ACK if number == len(messages) else 0
        batch.append(_message(kind, flags | ack, number, body))
    batch.append(_batch(_BATCH_END))
    netlink.send(b"".join(batch))
    failed = 0
    while True:
        try:
            answer = netlink.recv(_ANSWER_BYTES, MSG_DONTWAIT)
        except BlockingIOError:
            break
        _, kind, _, number, _, result = _ERROR.unpack_from(answer)
        if kind == NLMSG_ERROR:
            failed = failed or -result
            if not failed and number == len(messages):
                return
    raise OSError(failed or errno.EIO, os.strerror(failed or errno.EIO))


def rules(netlink: Netlink, table: str, chain: str = "") -> list[Rule]:
    """The rules of the table, or of one chain; [] without a table."""
    named = text(_RULE_TABLE, table) + (text(_RULE_CHAIN, chain) if chain else b"")
    return [rule_of(fields) for fields in _dump(netlink, _GETRULE, named)]


def counts(netlink: Netlink, table: str) -> Iterator[tuple[str, int]]:
    """The chain of each rule with a counter, and the frames counted. Costs half of what rules() does."""
    for fields in _dump(netlink, _GETRULE, text(_RULE_TABLE, table)):
        body = fields.get(_RULE_EXPRESSIONS, b"")
        at = body.find(_COUNTER)
        if at >= 0:
            at += len(_COUNTER)
            length = int.from_bytes(body[at : at + 2], sys.byteorder)
            counted = attributes(attributes(body[at : at + length]).get(_EXPRESSION_DATA, b""))
            yield _name(fields.get(_RULE_CHAIN)), int.from_bytes(counted.get(_COUNTER_PACKETS, b"")[:8])


def hooks(netlink: Netlink, table: str) -> dict[str, tuple[int, str]]:
    """The hook and the device of each chain of the table that has them, by the chain's name; {} if it is dormant."""
    named = text(_TABLE_NAME, table)
    for fields in _dump(netlink, _GETTABLE):
        if (
            fields.get(_TABLE_NAME) == table.encode() + b"\0"
            and fields.get(_TABLE_FLAGS, b"")[-1:] == _DORMANT
        ):
            return {}
    found = {}
    for fields in _dump(netlink, _GETCHAIN, named):
        hook = attributes(fields.get(_CHAIN_HOOK, b""))
        if hook and fields.get(_CHAIN_TABLE) == table.encode() + b"\0":
            number = int.from_bytes(hook.get(_HOOK_NUMBER, b""))
            found[_name(fields.get(_CHAIN_NAME))] = number, _name(hook.get(_HOOK_DEVICE))
    return found


def tables(netlink: Netlink) -> dict[str, bytes]:
    """The handle of each table of the family netdev, by name."""
    return {
        _name(fields.get(_TABLE_NAME)): fields.get(_TABLE_HANDLE, b"") for fields in _dump(netlink, _GETTABLE)
    }


def _dump(netlink: Netlink, kind: int, body: bytes = b"") -> Iterator[dict[int, bytes]]:
    """The attributes of each object that there is."""
    netlink.send(_message(kind, NLM_F_DUMP, 1, body))
    for _ in range(_MOST_ANSWERS):
        try:
            answer = netlink.recv(_ANSWER_BYTES, MSG_DONTWAIT)
        except BlockingIOError:
            return
        found, ended = parse(answer)
        yield from found
        if ended:
            return


def parse(answer: bytes) -> tuple[list[dict[int, bytes]], bool]:
    """The attributes of each object in one answer to a dump, and whether the dump ends with it."""
    found: list[dict[int, bytes]] = []
    at = 0
    while at + _HEADER.size <= len(answer):
        length, kind = _HEADER.unpack_from(answer, at)[:2]
        if kind in (NLMSG_DONE, NLMSG_ERROR) or length < _HEADER.size:
            return found, True
        if kind >> 8 == _SUBSYSTEM:
            found.append(attributes(answer[at + _HEADER.size : at + length]))
        at += (length + 3) & ~3
    return found, False


def rule_of(fields: dict[int, bytes]) -> Rule:
    """The rule of those attributes."""
    return Rule(_name(fields.get(_RULE_CHAIN)), expressions(fields.get(_RULE_EXPRESSIONS, b"")))


def _name(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")


def expressions(data: bytes) -> tuple[tuple[str, bytes], ...]:
    """The name and the attributes of each expression of a rule."""
    found = []
    at = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 2], sys.byteorder)
        fields = attributes(data[at + 4 : at + length])
        found.append((_name(fields.get(_EXPRESSION_NAME)), fields.get(_EXPRESSION_DATA, b"")))
        at += (length + 3) & ~3 or 4
    return tuple(found)


def same(found: tuple[tuple[str, bytes], ...], made: tuple[tuple[str, bytes], ...]) -> bool:
    """Whether the kernel lists the expressions as they were made; it may add attributes, and counts."""
    return len(found) == len(made) and all(
        name == wanted and attributes(data).items() >= attributes(body).items()
        for (name, data), (wanted, body) in zip(found, made, strict=True)
    )


def _u32(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("!I", value))


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    head = _HEADER.pack(
        _HEADER.size + len(body),
        _SUBSYSTEM << 8 | kind,
        NLM_F_REQUEST | flags,
        number,
        0,
        _NFPROTO_NETDEV,
        0,
        0,
    )
    return head + body


def _batch(kind: int) -> bytes:
    """The message that begins or ends a transaction."""
    return _HEADER.pack(_HEADER.size, kind, NLM_F_REQUEST, 0, 0, 0, 0, htons(_SUBSYSTEM))
