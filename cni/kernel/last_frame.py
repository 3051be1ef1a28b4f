"""When a link has last sent a frame: a rule of nf_tables in the link's network namespace notes it.

The link has a table of its own, whose only rule is the statement `last` at the hook egress (Linux 5.16): the kernel
notes the time and lets the frame pass (net/netfilter/nft_last.c). No process wakes up for it. CAP_NET_ADMIN is needed
in the network namespace, and the calling thread must be in it. All functions raise OSError, as nft.py does.
"""

from __future__ import annotations

from contextlib import suppress

from cni.kernel import nft
from cni.kernel.rtnl import attributes

_CHAIN = "sent"
_LAST_SET, _LAST_MILLISECONDS = 1, 2  # linux/netfilter/nf_tables.h


def watch(ifname: str) -> float | None:
    """Have the kernel note each frame that the link sends, and return the seconds since the last one noted.

    None: no frame has been noted, because the link has sent none or was not watched.
    """
    table = _table(ifname)
    with nft.opened() as netlink:
        try:
            nft.change(
                netlink,
                [
                    nft.new_table(table),
                    nft.base_chain(table, _CHAIN, nft.EGRESS, ifname, 0),
                    nft.rule(table, _CHAIN, nft.expression("last")),
                ],
            )
        except FileExistsError:
            return seconds(nft.rules(netlink, table, _CHAIN))
    return None


def forget(ifname: str) -> None:
    """Remove the link's table, if there is one."""
    with nft.opened() as netlink, suppress(FileNotFoundError):
        nft.change(netlink, [nft.delete_table(_table(ifname))])


def _table(ifname: str) -> str:
    return f"vmtap-{ifname}"


def seconds(rules: list[nft.Rule]) -> float | None:
    """The seconds since the last frame, by the table's rules; None without one."""
    for rule in rules:  # none, if another process has removed it
        for name, data in rule.expressions:
            found = attributes(data)
            if name == "last" and any(found.get(_LAST_SET, b"")):
                return int.from_bytes(found.get(_LAST_MILLISECONDS, b"")[:8]) / 1000
    return None
