"""The port by which a tap in a pod is on a Linux bridge of the host: its names, its MAC, its state, its removal.

A tap cannot be a port of a bridge in another network namespace, so a veth pair carries the frames: its host end is the
bridge's port, its pod end and the tap redirect to each other. kernel/iproute.py makes the pair, with pyroute2; what is
done more often is here, over raw netlink. Source of the numbers: linux/if_link.h.
"""

from __future__ import annotations

import re

from cni.kernel.rtnl import IFLA_LINKINFO, RTEXT_FILTER_SKIP_STATS, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.rtnl import DeleteLink, Rtnl

_IFLA_INFO_SLAVE_DATA = 5
_IFLA_BRPORT_ISOLATED = 33
_HOST_END = re.compile(r"vth([0-9a-f]{8})")


def veth_names(ifindex: int) -> tuple[str, str]:
    """The names of the pair's host end and pod end, for the tap of that interface index (unique on the host)."""
    return f"vth{ifindex:08x}", f"vtp{ifindex:08x}"


def tap_of(name: str) -> int | None:
    """The interface index of the tap whose host end has that name; None if it is no host end's name."""
    match = _HOST_END.fullmatch(name)
    return int(match[1], 16) if match else None


def host_mac(ifindex: int) -> str:
    """The MAC of the pair's host end.

    A bridge without a MAC of its own takes the lowest of its ports' (net/bridge/br_stp_if.c), so a low one here would
    change the host's address. This one is above those of NICs, and above nearly all that a kernel generates.
    """
    return f"fe:ff:{(ifindex | 1 << 31).to_bytes(4).hex(':')}"


def state(host: Rtnl, ifindex: int) -> tuple[int | None, bool]:
    """(the bridge's interface index, whether the port is isolated) of the tap of that index.

    (None, False) if there is no host end, or it is no port. Raises OSError.
    """
    link = host.link(name=veth_names(ifindex)[0])
    if link is None or link.master is None:
        return None, False
    info = attributes(host.details(link.index, RTEXT_FILTER_SKIP_STATS).get(IFLA_LINKINFO, b""))
    port = attributes(info.get(_IFLA_INFO_SLAVE_DATA, b""))
    return link.master, port.get(_IFLA_BRPORT_ISOLATED) == b"\1"


def remove(host: Rtnl, ifindex: int, alias: str, delete_link: DeleteLink) -> None:
    """Delete the veth pair of the tap of that index, if it has that alias or none yet. Raises OSError.

    Deleting one end of a pair deletes the other.
    """
    link = host.link(name=veth_names(ifindex)[0])
    if link and link.kind == "veth" and link.alias in (alias, ""):
        delete_link(host, link.index, None)
