"""The kernel's netlink answers: rtnl's events, attributes and exchanges, and nft's of nf_tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from cni.kernel import gateways, last_frame, nft, rtnl
from lab.fuzz import claims
from lab.fuzz.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket


class _Answers:
    """In the place of a netlink socket: two datagrams of the same bytes arrive, and no third."""

    def __init__(self, data: bytes) -> None:
        self._left = [data, data]

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, *_: int) -> bytes:
        if not self._left:
            raise TimeoutError
        return self._left.pop(0)


def run(data: bytes) -> None:
    """Parse data as events and as the answers to each kind of question: OSError is the only exception."""
    for events in (rtnl.link_events, rtnl.nsid_events):
        try:
            for _, event in [*events(data)]:
                _event(event)
        except OSError:
            pass
    assert all(len(value) <= len(data) for value in rtnl.attributes(data).values())
    seconds = last_frame.seconds([nft.rule_of(fields) for fields in nft.parse(data)[0]])
    assert seconds is None or seconds >= 0
    questions: list[Callable[[rtnl.Rtnl], Any]] = [
        lambda host: host.link(name="eth1"),
        lambda host: host.links(),
        lambda host: host.details(7, 1),
        lambda host: host.nsids(),
        lambda host: host.look("eth1", 0),
        lambda host: host.known_nsid(0),
        lambda host: gateways.macs(host, 7),
    ]
    for ask in questions:
        host = object.__new__(rtnl.Rtnl)
        host._socket = cast("socket", _Answers(data))
        host._sequence = 0
        try:
            found = ask(host)
        except OSError:
            continue
        if isinstance(found, rtnl.Link):
            _event(found)


def _event(found: rtnl.Link | int) -> None:
    if isinstance(found, rtnl.Link):
        claims.typed(found)
        (found.name + found.alias).encode()


TARGET = Target(run, words=("eth1", "macvtap", "veth", "last", "\x10\0", "\x13\0", "\2\0"), most_bytes=2048)
