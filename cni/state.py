"""What is attached where: one file for each attachment, in a tmpfs folder of mode 0700.

A record is written before the kernel is asked for anything, so that whatever is killed when, DEL, GC or a
reconciler can find what is left. DEL works without it. Must not touch the network.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


@dataclass(frozen=True)
class Record:
    """One attachment. Its key is (network, container_id, ifname), SPEC section 2 "attachment"."""

    network: str
    container_id: str
    ifname: str
    netns: str
    """CNI_NETNS as the runtime gave it."""
    netns_id: tuple[int, int]
    """st_dev and st_ino of the network namespace."""
    device: str
    """"macvtap" or "tap"."""
    ifindex: int
    mac: str
    """The guest's MAC; a macvtap has the same, a tap must have another."""
    mtu: int
    queues: int
    interface: str | None = None
    """The policy entry's name, if the config named one."""
    source: str | None = None
    mode: str | None = None
    ips: tuple[dict[str, Any], ...] = ()
    """As in a CNI result of 1.1.0: {"address": "10.1.0.5/24", "gateway": "10.1.0.1"}."""
    routes: tuple[dict[str, Any], ...] = ()
    dns: dict[str, Any] | None = None


def in_netns(folder: Path, netns_id: tuple[int, int]) -> list[Record]:
    """The attachments whose network namespace is netns_id, by ifname."""
    raise NotImplementedError
