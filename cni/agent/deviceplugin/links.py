"""The links of the host's network namespace, kept current by rtnetlink events."""

from __future__ import annotations

import socket

from cni.kernel.rtnl import (
    EVENTS_LOST,
    IFF_LOWER_UP,
    IFF_RUNNING,
    IFF_UP,
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_ROUTE,
    RTM_NEWLINK,
    RTNLGRP_LINK,
    SOL_NETLINK,
    Link,
    Rtnl,
    link_events,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

_BUFFER = 1 << 20
"""Bytes: pods start and end many at a time, and each causes events of a veth here."""


def _essence(link: Link) -> tuple[object, ...]:
    """The fields that an offer, a device's health or its NUMA node may depend on."""
    flags = link.flags & (IFF_UP | IFF_RUNNING | IFF_LOWER_UP)
    return link.name, flags, link.kind, link.lower, link.lower_nsid, link.master


class Links:
    """The links as of the last take(). Readable (fileno) when there are new events."""

    def __init__(self) -> None:
        self._by_index: dict[int, Link] = {}
        self._stale = False
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._events.bind((0, 0))  # an unbound socket has port 0, the kernel's own, and receives no multicast
        self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_LINK)
        try:
            self._list()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """For poll()."""
        return self._events.fileno()

    def by_name(self) -> dict[str, Link]:
        """The links, by name."""
        return {link.name: link for link in self._by_index.values()}

    def close(self) -> None:
        """Close the netlink socket."""
        self._events.close()

    def take(self, sources: Collection[str] = ()) -> bool:
        """Apply the events that have arrived; whether an offer may depend on one of them.

        A veth, which every pod has, counts only if it is one of sources; a link's promiscuity, which every ADD changes,
        does not count. Raises OSError if events were lost and the links cannot be listed now.
        """
        news = self._stale
        while True:
            try:
                events = [*link_events(self._events.recv(1 << 16))]
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in EVENTS_LOST:
                    raise
                self._stale = news = True
                continue
            for kind, link in events:
                known = self._by_index.get(link.index)
                names = {link.name, known.name} if known else {link.name}
                if link.kind != "veth" or not names.isdisjoint(sources):
                    news |= kind != RTM_NEWLINK or known is None or _essence(known) != _essence(link)
                if kind == RTM_NEWLINK and link.name:  # a wireless driver sends events without a name
                    self._by_index[link.index] = link
                elif link.name:
                    self._by_index.pop(link.index, None)
        if self._stale:
            self._list()
        return news

    def _list(self) -> None:
        """List all links anew; a change during the listing arrives as an event."""
        with Rtnl() as host:
            self._by_index = {link.index: link for link in host.links()}
        self._stale = False
