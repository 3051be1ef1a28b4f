"""The folder of the node's state and of the agent's sockets, by the environment."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "/run/vmtap"


def named(env: Mapping[str, str]) -> str | None:
    """The folder that VMTAP_RUN names, or else its deprecated alias VMTAP_STATE; None if neither is set."""
    return env.get("VMTAP_RUN") or env.get("VMTAP_STATE") or None
