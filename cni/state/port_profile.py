"""What the port of a VM lets pass. Pure data: a record keeps it, cni/port carries it out."""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_pton  # ipaddress takes 4 ms to import

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


@dataclass(frozen=True)
class Port:
    """A profile. out is what the guest sends, into what it receives."""

    mac_spoof_check: bool = False
    """Whether the guest may send only from its MACs, and receives only what is for them, broadcast and multicast."""
    macs: tuple[str, ...] = ()
    """The guest's further MACs, beside the attachment's."""
    ip_spoof_check: bool = False
    """Whether ARP, neighbour discovery, IPv4 and IPv6 may have only the guest's addresses as their source."""
    addresses: tuple[str, ...] = ()
    """The guest's further addresses, or prefixes of them, beside the attachment's."""
    dhcp_server: bool = True
    """Whether the guest may answer DHCP requests."""
    router_advertisements: bool = True
    """Whether the guest may announce itself as a router, or redirect hosts."""
    trunk: tuple[str, ...] | None = None
    """The VLAN ids that tagged frames may have, "100" or "200-210"; (): no tagged frames; None: as tags."""
    broadcast: int | None = None
    """How many broadcast and multicast frames the guest may send a second."""
    out_rate: int | None = None
    """Bit/s."""
    in_rate: int | None = None
    out_burst: int | None = None
    """Bytes; None: a default that goes with the rate."""
    in_burst: int | None = None

    @property
    def filters(self) -> bool:
        """Whether frames have to be filtered, and not only limited."""
        return bool(
            self.mac_spoof_check
            or self.ip_spoof_check
            or not self.dhcp_server
            or not self.router_advertisements
            or self.trunk is not None
            or self.broadcast
        )

    def fields(self) -> dict[str, Any]:
        """What restricts, by the names of the configuration; rates are in bit/s, bursts in bytes."""
        rate = {
            "out": self.out_rate,
            "in": self.in_rate,
            "outBurst": self.out_burst,
            "inBurst": self.in_burst,
        }
        found: dict[str, Any] = {
            "macSpoofCheck": self.mac_spoof_check or None,
            "macs": list(self.macs) if self._uses_macs and self.macs else None,
            "ipSpoofCheck": self.ip_spoof_check or None,
            "addresses": list(self.addresses) if self.ip_spoof_check and self.addresses else None,
            "dhcpServer": None if self.dhcp_server else False,
            "routerAdvertisements": None if self.router_advertisements else False,
            "trunk": None if self.tags is None else list(self.tags),
            "broadcast": self.broadcast,
            "rate": {name: value for name, value in rate.items() if value is not None} or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def wider_than(self, other: Port) -> list[str]:
        """The fields of the configuration by which this profile lets pass what the other does not, or more of it."""
        tags, others = self.tags, other.tags
        wider = {
            "macSpoofCheck": other.mac_spoof_check and not self.mac_spoof_check,
            "macs": self._uses_macs and other._uses_macs and not set(self.macs) <= set(other.macs),
            "ipSpoofCheck": other.ip_spoof_check and not self.ip_spoof_check,
            "addresses": other.ip_spoof_check and not are_within(self.addresses, other.addresses),
            "dhcpServer": self.dhcp_server and not other.dhcp_server,
            "routerAdvertisements": self.router_advertisements and not other.router_advertisements,
            "trunk": others is not None and (tags is None or vlans(tags) & ~vlans(others)),
            "broadcast": _is_more(self.broadcast, other.broadcast),
            "rate.out": _is_more(self.out_rate, other.out_rate),
            "rate.in": _is_more(self.in_rate, other.in_rate),
        }
        return [name for name, is_wider in wider.items() if is_wider]

    @property
    def _uses_macs(self) -> bool:
        return self.mac_spoof_check or self.ip_spoof_check

    @property
    def tags(self) -> tuple[str, ...] | None:
        """The trunk; without one, no tagged frames where the content of frames is checked; None: any."""
        return () if self.trunk is None and self.protocols else self.trunk

    @property
    def protocols(self) -> bool:
        """Whether anything above Ethernet is checked."""
        return self.ip_spoof_check or not self.dhcp_server or not self.router_advertisements


def vlans(trunk: Iterable[str]) -> int:
    """The VLAN ids of a trunk, as a number with the bit of each set. A range that ends before it begins has none."""
    bits = 0
    for each in trunk:
        first, _, last = each.partition("-")
        low, high = int(first), int(last or first)
        bits |= (1 << max(low, high + 1)) - (1 << low)
    return bits


def _is_more(rate: int | None, bound: int | None) -> bool:
    return bound is not None and (rate is None or rate > bound)


def burst_of(rate: int) -> int:
    """Bytes that may pass at once at a rate in bit/s: 20 ms of it, and at least the largest frame of a guest."""
    return max(rate // 8 // 50, 1 << 16)


def prefix(text: str) -> tuple[bytes, bytes]:
    """Address and mask of "10.1.0.100", "10.1.0.0/24" or "2001:db8::/64". Raises OSError or ValueError."""
    address, slash, length = text.partition("/")
    packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    bits = 8 * len(packed)
    ones = int(length) if slash else bits
    mask = (1 << bits) - (1 << bits - ones)  # of a length that is too large: ValueError
    return (int.from_bytes(packed) & mask).to_bytes(len(packed)), mask.to_bytes(len(packed))


def are_within(inner: Iterable[str], outer: Iterable[str]) -> bool:
    """Whether each address or prefix is one of the others, or within one. Raises as prefix()."""
    bounds = [prefix(each) for each in outer]
    return all(any(_is_within(prefix(each), bound) for bound in bounds) for each in inner)


def _is_within(inner: tuple[bytes, bytes], outer: tuple[bytes, bytes]) -> bool:
    (address, mask), (base, cover) = inner, outer
    return len(address) == len(base) and all(
        a & c == b and m & c == c for a, m, b, c in zip(address, mask, base, cover, strict=True)
    )
