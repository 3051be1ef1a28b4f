"""What a frame is, in a few words for people. Pure.

A guest chooses every byte: nothing of a frame becomes text but as a number or an address.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

_TAGS = (0x8100, 0x88A8, 0x9100)
_MOST_TAGS = 4
_SHORTEST_ETHERTYPE = 0x0600  # below, the field is a length (IEEE 802.3)
_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_ETHERTYPES = {
    _ARP: "ARP",
    _IPV4: "IPv4",
    _IPV6: "IPv6",
    0x8035: "RARP",
    0x88CC: "LLDP",
    0x8863: "PPPoE",
    0x8864: "PPPoE",
}
_PROTOCOLS = {
    1: "ICMP",
    2: "IGMP",
    6: "TCP",
    17: "UDP",
    47: "GRE",
    50: "ESP",
    58: "ICMPv6",
    112: "VRRP",
    132: "SCTP",
}
_ICMP, _ICMPV6 = 1, 58
_WITH_PORTS = (6, 17, 132)
_KINDS = {
    (_ICMP, 0): "echo reply", (_ICMP, 3): "unreachable", (_ICMP, 5): "redirect", (_ICMP, 8): "echo request",
    (_ICMP, 11): "time exceeded", (_ICMPV6, 1): "unreachable", (_ICMPV6, 128): "echo request",
    (_ICMPV6, 129): "echo reply", (_ICMPV6, 133): "router solicitation", (_ICMPV6, 134): "router advertisement",
    (_ICMPV6, 135): "neighbour solicitation", (_ICMPV6, 136): "neighbour advertisement", (_ICMPV6, 137): "redirect",
    (_ICMPV6, 143): "MLD report",
}  # fmt: skip
_FRAGMENT = 0x1FFF
_DHCP = ({67, 68}, {546, 547})


@dataclass(frozen=True)
class Seen:
    """vlans: the id of each tag, the outer one first. ethertype: behind the tags; below 0x600 it is a length.

    info: more words about ARP, IPv4 and IPv6; else "".
    """

    source: str
    destination: str
    vlans: tuple[int, ...]
    ethertype: int
    info: str

    @property
    def protocol(self) -> str:
        """The ethertype's name, or else its number."""
        if self.ethertype < _SHORTEST_ETHERTYPE:
            return "802.3"
        return _ETHERTYPES.get(self.ethertype) or f"0x{self.ethertype:04x}"


def seen(frame: bytes) -> Seen:
    """What the frame, or its beginning, is. What is cut off is not described."""
    at = 12
    vlans: list[int] = []
    while (ethertype := int.from_bytes(frame[at : at + 2])) in _TAGS and len(vlans) < _MOST_TAGS:
        vlans.append(int.from_bytes(frame[at + 2 : at + 4]) & 0xFFF)
        at += 4
    body = frame[at + 2 :]
    try:
        info = {_ARP: _arp, _IPV4: _ipv4, _IPV6: _ipv6}.get(ethertype, lambda _: "")(body)
    except (IndexError, ValueError):  # too short
        info = ""
    return Seen(frame[6:12].hex(":"), frame[:6].hex(":"), tuple(vlans), ethertype, info)


def _arp(body: bytes) -> str:
    sender, target = ipaddress.IPv4Address(body[14:18]), ipaddress.IPv4Address(body[24:28])
    match int.from_bytes(body[6:8]):
        case 1:
            return f"who has {target}? tell {sender}"
        case 2:
            return f"{sender} is at {body[8:14].hex(':')}"
    return ""


def _ipv4(body: bytes) -> str:
    source, destination = ipaddress.IPv4Address(body[12:16]), ipaddress.IPv4Address(body[16:20])
    inner = b"" if int.from_bytes(body[6:8]) & _FRAGMENT else body[(body[0] & 0x0F) * 4 :]
    return _ip(str(source), str(destination), body[9], inner)


def _ipv6(body: bytes) -> str:
    source, destination = ipaddress.IPv6Address(body[8:24]), ipaddress.IPv6Address(body[24:40])
    return _ip(str(source), str(destination), body[6], body[40:])


def _ip(source: str, destination: str, protocol: int, body: bytes) -> str:
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    if protocol in _WITH_PORTS and len(body) >= 4:
        ports = int.from_bytes(body[:2]), int.from_bytes(body[2:4])
        if protocol == 17 and any(set(ports) <= each for each in _DHCP):
            name = "DHCP"
        return f"{source} port {ports[0]} > {destination} port {ports[1]} {name}"
    kind = _KINDS.get((protocol, body[0])) if body else None
    return f"{source} > {destination} {name}" + (f" {kind}" if kind else "")
