"""What a source is called now that was renamed, by udev for example, while attachments were on it."""

from __future__ import annotations

from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.kernel.rtnl import Rtnl
    from cni.state.record import Record


def name_now(host: Rtnl, records: Iterable[Record], source: str) -> str | None:
    """The name of the device that has macvtaps of these records, made when it was called source; None if none has."""
    for record in records:
        if record.source != source or record.device != "macvtap" or record.vf:
            continue
        with suppress(OSError):  # the pod's namespace has ended
            link = host.link(index=record.ifindex, nsid=record.nsid)
            if link and link.lower and record.vlan:
                link = host.link(index=link.lower)
            lower = host.link(index=link.lower) if link and link.lower else None
            if lower and lower.name != source:
                return lower.name
    return None
