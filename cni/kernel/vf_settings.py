"""The settings of a virtual function that its PF's driver reports and changes (IFLA_VF_* of linux/if_link.h).

Pure data: a record keeps it, kernel/vf.py reads and writes it in the kernel.
"""

from __future__ import annotations

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8


@dataclass(frozen=True)
class VfSettings:
    """Settings of one VF. None: the driver does not report it, or it is not to be changed."""

    mac: str | None = None
    """"02:00:00:00:00:01"."""
    vlan: tuple[int, int, int] | None = None
    """VLAN id (0: no VLAN), priority (802.1p), and the tag's ethertype."""
    spoofchk: int | None = None
    """0 or 1."""
    trust: int | None = None
    """0 or 1."""
    rate: tuple[int, int] | None = None
    """Least and most, in Mbit/s; 0: no limit."""
    link_state: int | None = None
    """0: as the PF's, 1: always up, 2: always down."""

    def given(self) -> dict[str, Any]:
        """The settings that are not None, by name, in the order in which the kernel is asked for them."""
        return {name: value for name, value in vars(self).items() if value is not None}
