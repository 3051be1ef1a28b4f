"""Raw route netlink: the few messages that an ADD or a DEL sends.

The project has its own because a request then costs one send and one receive, and imports nothing but C modules
(pyroute2 takes 160 ms to import; iproute.py uses it for what is not on the way of a macvtap). Must not decide anything:
it encodes, sends, and raises OSError with the kernel's extended ACK.

Longer than other modules, because a quarter of it is numbers of linux/rtnetlink.h, linux/if_link.h and linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from _socket import AF_NETLINK, AF_UNSPEC, SOCK_CLOEXEC, SOCK_RAW, socket
from functools import lru_cache

from cni.dataclass import dataclass
from cni.kernel import netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol, Self

    class DeleteLink(Protocol):
        """How to delete a link: see delete_link."""

        def __call__(
            self, host: Rtnl, index: int, nsid: int | None, yield_turn: Callable[[], None] = ...
        ) -> None: ...


NETLINK_ROUTE = 0
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_LISTEN_ALL_NSID = 8
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_ECHO = 0x8
NLM_F_DUMP_INTR = 0x10
NLM_F_ACK_TLVS = 0x200
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_SETLINK = 19
RTM_GETADDR = 22
RTM_NEWNSID = 88
RTM_DELNSID = 89
RTM_GETNSID = 90
RTMGRP_LINK = 1
RTNLGRP_LINK = 1
RTNLGRP_NSID = 28
NETNSA_NSID = 1
NETNSA_FD = 3
NETNSA_NSID_NOT_ASSIGNED = -1

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINK = 5
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_IFALIAS = 20
IFLA_STATS64 = 23
IFLA_GROUP = 27
IFLA_NET_NS_FD = 28
IFLA_EXT_MASK = 29
IFLA_PROMISCUITY = 30
IFLA_LINK_NETNSID = 37
IFLA_TARGET_NETNSID = 46
IFLA_PROP_LIST = 52
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
IFLA_MACVLAN_MODE = 1
IFLA_MACVLAN_FLAGS = 2
IFLA_MACVLAN_BC_QUEUE_LEN = 7
MACVLAN_FLAG_NOPROMISC = 1

RTEXT_FILTER_SKIP_STATS = 0x8

IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFF_RUNNING = 0x40
IFF_NOARP = 0x80
IFF_PROMISC = 0x100
IFF_ALLMULTI = 0x200
IFF_LOWER_UP = 0x10000

ARPHRD_ETHER = 1

EVENTS_LOST = (errno.ENOBUFS, errno.EPROTO)
"""Errors of an event socket and its datagrams after which what they announce has to be listed."""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTR = struct.Struct("=HH")  # struct nlattr
_MAX_ERRNO = 4095  # linux/err.h
_LEAST = {
    NLMSG_ERROR: 4,
    NLMSG_DONE: 4,
    RTM_NEWLINK: _IFINFO.size,
    RTM_DELLINK: _IFINFO.size,
    RTM_NEWNSID: 4,
    RTM_DELNSID: 4,
}
"""Message type → the bytes that its body has at least."""
_ANSWER_BYTES = 1 << 15
"""More than any single message of the kernel's (NLMSG_GOODSIZE is a page, or 8 KiB)."""
_DUMP_BYTES = 1 << 16
_DUMP_TRIES = 5
_PAUSES = (0.01, 0.03, 0.09)
"""Seconds to wait for memory after each ENOBUFS but the last."""


@dataclass(frozen=True)
class Link:
    """A network device as RTM_NEWLINK describes it.

    mode: the macvlan mode's number; lower: the lower device's index in the network namespace of id lower_nsid (None: in
    the link's own).
    """

    index: int
    name: str
    arphrd: int
    flags: int
    mac: str
    mtu: int
    kind: str | None = None
    mode: int | None = None
    alias: str = ""
    lower: int | None = None
    lower_nsid: int | None = None
    master: int | None = None
    promiscuity: int = 0
    group: int = 0
    altnames: tuple[str, ...] = ()
    """Further names (ip-link(8), altname), by which the kernel finds the link too."""


def attr(kind: int, payload: bytes) -> bytes:
    """One struct nlattr, padded to four bytes."""
    return _ATTR.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attr(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute, host byte order."""
    return attr(kind, struct.pack("=I", value))


def s32(kind: int, value: int) -> bytes:
    """A signed 32-bit attribute, host byte order."""
    return attr(kind, struct.pack("=i", value))


def nest(kind: int, *attrs: bytes) -> bytes:
    """A nested attribute."""
    return attr(kind | NLA_F_NESTED, b"".join(attrs))


def mac_bytes(mac: str) -> bytes:
    """ "02:00:00:00:00:01" as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def link_message(
    kind: int,
    *attrs: bytes,
    index: int = 0,
    flags: int = 0,
    change: int = 0,
    nlm: int = NLM_F_ACK,
    family: int = AF_UNSPEC,
) -> tuple[int, int, bytes]:
    """An RTM_*LINK message: (type, nlmsg flags, ifinfomsg and attributes)."""
    return kind, nlm, _IFINFO.pack(family, 0, index, flags, change) + b"".join(attrs)


_NO_STATS = u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
"""To sum up a link's counters costs the kernel more than the rest, and some NICs must ask their firmware."""


class Rtnl:
    """A NETLINK_ROUTE socket of the calling thread's network namespace. Not for sharing between threads."""

    def __init__(self) -> None:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def talk(self, *messages: tuple[int, int, bytes]) -> list[OSError | Link | int | None]:
        """Send messages as one datagram; the kernel carries out all of them, in order, before send returns.

        Returns the outcome of each, in order: OSError if refused, the Link or nsid that was asked for, None for an ACK.
        """
        first = sequence = self._sequence + 1
        datagram = b""
        for kind, nlm, body in messages:
            datagram += _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | nlm, sequence, 0) + body
            sequence += 1
        self._sequence = sequence - 1
        self._send(datagram)
        outcomes: dict[int, OSError | Link | int | None] = {}
        while len(outcomes) < len(messages):
            for kind, nlm, sequence, body in _messages(self._socket.recv(_ANSWER_BYTES)):
                # Of an earlier talk(), or the ACK after an answer.
                if not first <= sequence <= self._sequence or sequence in outcomes:
                    continue
                if kind == NLMSG_ERROR:
                    outcomes[sequence] = _error(nlm, body)
                elif kind == RTM_NEWLINK:
                    outcomes[sequence] = _link_again(body)
                else:
                    outcomes[sequence] = _nsid(body) if kind == RTM_NEWNSID else None
        return [outcomes[number] for number in range(first, first + len(messages))]

    def do(self, *messages: tuple[int, int, bytes]) -> None:
        """talk(), but raises the first OSError among the outcomes."""
        for outcome in self.talk(*messages):
            if isinstance(outcome, OSError):
                raise outcome

    def link(self, *, name: str | None = None, index: int = 0, nsid: int | None = None) -> Link | None:
        """The link of that name or index, in this namespace or the one of id nsid; None if there is none.

        Raises OSError, EINVAL if no namespace has the id.
        """
        attrs = [] if name is None else [text(IFLA_IFNAME, name)]
        if nsid is not None:
            attrs.append(s32(IFLA_TARGET_NETNSID, nsid))
        (outcome,) = self.talk(link_message(RTM_GETLINK, _NO_STATS, *attrs, index=index, nlm=0))
        return _found(outcome)

    def details(self, index: int, mask: int, nsid: int | None = None) -> dict[int, bytes]:
        """Every attribute of the link of that index, as link(). mask: IFLA_EXT_MASK. Raises OSError."""
        where = b"" if nsid is None else s32(IFLA_TARGET_NETNSID, nsid)
        kind, _, body = link_message(RTM_GETLINK, u32(IFLA_EXT_MASK, mask), where, index=index, nlm=0)
        return attributes(self.ask(kind, body)[16:])

    def ask(self, kind: int, body: bytes, *, surely: bool = True) -> bytes:
        """The body of the one message that answers a request. Raises OSError.

        surely: whether the kernel always answers, to the sender alone; if not, OSError EPROTO: it has not.
        """
        self._sequence += 1
        flags = NLM_F_REQUEST | (0 if surely else NLM_F_ACK | NLM_F_ECHO)
        self._send(_HEADER.pack(16 + len(body), kind, flags, self._sequence, 0) + body)
        found = None
        while True:
            for answer, flags, sequence, payload in _messages(self._socket.recv(_DUMP_BYTES)):
                if sequence == self._sequence and answer == NLMSG_ERROR:
                    error = _error(flags, payload)
                    if error or found is None:
                        raise error or OSError(errno.EPROTO, "an ACK and no answer")
                    return found
                if sequence == self._sequence:
                    if surely:
                        return payload
                    found = payload

    def links(self, *, nsid: int | None = None) -> list[Link]:
        """Every link of this namespace, or of the one of id nsid. Slow: no request that succeeds calls it.

        Raises OSError: EAGAIN if links kept changing during the dump, EINVAL if no namespace has the id.
        """
        where = b"" if nsid is None else s32(IFLA_TARGET_NETNSID, nsid)
        return [_link(body) for body in self.dump(RTM_GETLINK, _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + where)]

    def nsids(self) -> list[int]:
        """The ids by which this namespace refers to others."""
        return [_nsid(body) for body in self.dump(RTM_GETNSID, bytes(4))]

    def known_nsid(self, netns: int) -> int | None:
        """This namespace's id for the namespace of fd netns; None if it has none yet."""
        (outcome,) = self.talk((RTM_GETNSID, 0, bytes(4) + u32(NETNSA_FD, netns)))
        if isinstance(outcome, OSError):
            raise outcome
        return outcome if isinstance(outcome, int) and outcome >= 0 else None

    def nsid(self, netns: int) -> int:
        """This namespace's id for the namespace of fd netns; assigned now if it has none yet."""
        return self.look(None, netns)[1]

    def look(self, name: str | None, netns: int) -> tuple[Link | None, int]:
        """link(name=name), if there is a name, and nsid(netns), with one message. Raises OSError."""
        fd = u32(NETNSA_FD, netns)
        asked = (RTM_GETNSID, 0, bytes(4) + fd)
        if name is None:
            (nsid,), link = self.talk(asked), None
        else:
            nsid, link = self.talk(
                asked, link_message(RTM_GETLINK, _NO_STATS, text(IFLA_IFNAME, name), nlm=0)
            )
        # A pod that has a veth of another plugin's has an id already.
        if nsid == NETNSA_NSID_NOT_ASSIGNED:
            new = (RTM_NEWNSID, NLM_F_ACK, bytes(4) + s32(NETNSA_NSID, -1) + fd)
            _, nsid = self.talk(new, asked)  # the first may be refused, EEXIST: another process was quicker
        if isinstance(nsid, OSError):
            raise nsid
        if not isinstance(nsid, int):
            raise _unreadable()
        return _found(link), nsid

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of a dump's messages. Raises OSError: EAGAIN if the list kept changing (NLM_F_DUMP_INTR)."""
        for _ in range(_DUMP_TRIES):
            self._sequence += 1
            header = _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
            self._send(header + body)
            found: list[bytes] = []
            interrupted = done = False
            while not done:
                for answer, nlm, sequence, payload in _messages(self._socket.recv(_DUMP_BYTES)):
                    if sequence != self._sequence:
                        continue
                    interrupted |= bool(nlm & NLM_F_DUMP_INTR)
                    if answer == NLMSG_DONE:
                        done = True
                        (status,) = struct.unpack_from("=i", payload)
                        if status < 0:
                            raise _os_error(status)
                    elif answer == kind - 2:  # RTM_NEW*, linux/rtnetlink.h
                        found.append(payload)
                    elif answer == NLMSG_ERROR and (error := _error(nlm, payload)):
                        raise error
            if not interrupted:
                return found
        raise OSError(errno.EAGAIN, "what was listed kept changing while it was read")

    def _send(self, data: bytes) -> None:
        """Send one datagram. After ENOBUFS, by which the kernel has not read it, tries again a few times."""
        for pause in _PAUSES:
            try:
                self._socket.send(data)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                time.sleep(pause)
        self._socket.send(data)


class Host(Rtnl):
    """A socket as Rtnl, with an fd of the calling thread's network namespace, which is the host's.

    fd: open until close(); identity: see netns.identity.
    """

    def __init__(self) -> None:
        self.fd = os.open(netns.OWN, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = netns.identity(self.fd)
        super().__init__()

    def close(self) -> None:
        """Close the socket and the fd."""
        super().close()
        os.close(self.fd)


def delete_link(
    host: Rtnl, index: int, nsid: int | None, yield_turn: Callable[[], None] | None = None
) -> None:
    """Delete the link of that index, in host's namespace or in the namespace nsid. Raises OSError.

    yield_turn: called first.

    Returns when the kernel acknowledges, after 15 to 40 ms; agent/link_deletion.py has one that returns earlier. A link
    that is gone already, alone or with its namespace, is no error.
    """
    if yield_turn:
        yield_turn()
    where = [] if nsid is None else [s32(IFLA_TARGET_NETNSID, nsid)]
    try:
        host.do(link_message(RTM_DELLINK, *where, index=index))
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL):
            raise


def nsid_events(data: bytes) -> Iterator[tuple[int, int]]:
    """The events in one datagram of the group RTNLGRP_NSID: (RTM_NEWNSID or RTM_DELNSID, the id).

    Raises OSError EPROTO if it cannot be read.
    """
    for kind, _, _, body in _messages(data):
        if kind in (RTM_NEWNSID, RTM_DELNSID):
            yield kind, _nsid(body)


def _found(outcome: OSError | Link | int | None) -> Link | None:
    if isinstance(outcome, OSError):
        if outcome.errno == errno.ENODEV:
            return None
        raise outcome
    return outcome if isinstance(outcome, Link) else None


def link_events(data: bytes) -> Iterator[tuple[int, Link]]:
    """The events in one datagram of the group RTNLGRP_LINK: (RTM_NEWLINK or RTM_DELLINK, the link).

    Messages of other families are left out: a port that leaves its bridge sends an RTM_DELLINK of AF_BRIDGE.
    Raises OSError EPROTO if the datagram cannot be read.
    """
    for kind, _, _, body in _messages(data):
        if kind in (RTM_NEWLINK, RTM_DELLINK) and body[0] == AF_UNSPEC:
            yield kind, _link(body)


def _messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, body) of each message. Raises OSError EPROTO if one is cut short."""
    found = []
    at = 0
    while at + 16 <= len(data):
        length, kind, nlm, sequence, _ = _HEADER.unpack_from(data, at)
        if not 16 + _LEAST.get(kind, 0) <= length <= len(data) - at:
            raise _unreadable()
        found.append((kind, nlm, sequence, data[at + 16 : at + length]))
        at += (length + 3) & ~3
    return found


def _unreadable() -> OSError:
    return OSError(errno.EPROTO, "a netlink message cannot be read")


def attributes(data: bytes) -> dict[int, bytes]:
    """Kind → payload of each struct nlattr. What follows the last whole one is left out."""
    found: dict[int, bytes] = {}
    at, last, unpack = 0, len(data) - 4, _ATTR.unpack_from
    while at <= last:  # runs fifty times for each link
        length, kind = unpack(data, at)
        found[kind & NLA_TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3 or 4
    return found


def _error(nlm: int, body: bytes) -> OSError | None:
    """The outcome in a struct nlmsgerr: None for an ACK, else an OSError with the extended ACK's message, if any."""
    (number,) = struct.unpack_from("=i", body)
    if number == 0:
        return None
    said = b""
    if nlm & NLM_F_ACK_TLVS:
        said = attributes(body[20:]).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0")
    return _os_error(number, said.decode(errors="replace"))


def _os_error(number: int, text: str = "") -> OSError:
    """The OSError for a negative error number. text: the extended ACK's message, or ""."""
    if not -_MAX_ERRNO <= number < 0:
        return _unreadable()
    return OSError(-number, text or os.strerror(-number))


def _nsid(body: bytes) -> int:
    value = attributes(body[4:]).get(NETNSA_NSID, b"")
    if len(value) != 4:
        raise _unreadable()
    (number,) = struct.unpack("=i", value)
    return int(number)


def _link(body: bytes) -> Link:
    _, arphrd, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body[16:])
    info = attributes(found.get(IFLA_LINKINFO, b""))
    kind = info.get(IFLA_INFO_KIND)
    mode = None
    if kind and kind.startswith(b"macv"):
        mode = _number(attributes(info.get(IFLA_INFO_DATA, b"")), IFLA_MACVLAN_MODE)
    return Link(
        index=index,
        name=_text(found, IFLA_IFNAME),
        arphrd=arphrd,
        flags=flags,
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(found, IFLA_MTU) or 0,
        kind=_text(info, IFLA_INFO_KIND) or None,
        mode=mode,
        alias=_text(found, IFLA_IFALIAS),
        lower=_number(found, IFLA_LINK),
        lower_nsid=_number(found, IFLA_LINK_NETNSID),
        master=_number(found, IFLA_MASTER),
        promiscuity=_number(found, IFLA_PROMISCUITY) or 0,
        group=_number(found, IFLA_GROUP) or 0,
        altnames=tuple(_texts(found[IFLA_PROP_LIST])) if IFLA_PROP_LIST in found else (),
    )


_link_again = lru_cache(maxsize=64)(_link)
"""Caches parsed links by the bytes of the kernel's answer, because most sources do not change between ADDs."""


def _text(attrs: dict[int, bytes], kind: int) -> str:
    return attrs.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _texts(data: bytes) -> Iterator[str]:
    """The strings of a nest of strings, which may be of one type."""
    at = 0
    while at + 4 <= len(data):
        length, _ = _ATTR.unpack_from(data, at)
        yield data[at + 4 : at + length].rstrip(b"\0").decode(errors="replace")
        at += (length + 3) & ~3 or 4


def _number(attrs: dict[int, bytes], kind: int) -> int | None:
    value = attrs.get(kind)
    return None if value is None else int.from_bytes(value[:4], "little" if _LITTLE else "big")


_LITTLE = struct.pack("=H", 1) == b"\1\0"
