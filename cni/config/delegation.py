"""Which IPAM plugin a network config delegates to, and which it cannot."""

from __future__ import annotations

from cni import spec
from cni.config import schema
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_ON_THE_LINK = ("dhcp",)
"""IPAM plugins that send and receive on the link in the pod."""


def ipam(fields: Mapping[str, Any], *, strict: bool) -> Mapping[str, Any] | None:
    """The field ipam; None without a type. fields: of a valid network config, with the defaults.

    A plugin that needs the link cannot have it where the link is the guest's: raises CniError 7 if strict, else None.
    """
    found: Mapping[str, Any] | None = fields.get("ipam")
    if not found or not found.get("type"):
        return None
    if found["type"] not in _ON_THE_LINK or fields["addressing"] == "link":
        return found
    if not strict:
        return None
    raise CniError(
        spec.INVALID_NETWORK_CONFIG,
        f"ipam.type: {schema.show(found['type'])} is refused: it sends on the link, which is the guest's; leave ipam "
        'out, and the guest sends its own DHCP requests; or set addressing to "link", for a pod without a VM',
    )
