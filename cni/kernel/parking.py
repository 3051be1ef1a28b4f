"""Macvtaps that only keep minors from being given out, in a network namespace of their own.

The namespace has no path: it ends, with everything in it, when its fd is closed or the process is killed. Its macvtaps
are on a veth in it, so no device of the node is touched.
"""

from __future__ import annotations

import os

from cni.kernel import netns
from cni.kernel.rtnl import (
    IFLA_IFNAME,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINKINFO,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_NEWLINK,
    Rtnl,
    link_message,
    nest,
    text,
    u32,
)

_LOWER = "lower"
_NEW = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL


class Parking:
    """Takes minors until close(). Raises CniError 5, OSError."""

    def __init__(self) -> None:
        self._netns = netns.new()
        self._taken = 0
        try:
            with netns.entered(self._netns):
                self._links = Rtnl()
        except BaseException:
            os.close(self._netns)
            raise
        try:
            kind = nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "veth"))
            self._links.do(link_message(RTM_NEWLINK, text(IFLA_IFNAME, _LOWER), kind, nlm=_NEW))
            link = self._links.link(name=_LOWER)
            assert link is not None  # noqa: S101 - made just now
            self._lower = link.index
        except BaseException:
            self.close()
            raise

    def take(self, count: int) -> None:
        """Take the `count` lowest minors that are free. Raises OSError."""
        for _ in range(count):
            self._taken += 1
            self._links.do(
                link_message(
                    RTM_NEWLINK,
                    text(IFLA_IFNAME, f"m{self._taken}"),
                    u32(IFLA_LINK, self._lower),
                    nest(IFLA_LINKINFO, text(IFLA_INFO_KIND, "macvtap")),
                    nlm=_NEW,
                )
            )

    def close(self) -> None:
        """Give the minors back."""
        self._links.close()
        os.close(self._netns)
