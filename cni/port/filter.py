"""What a guest may send and receive: rules of nf_tables at the hooks of its link.

A macvtap has its rules in the pod's network namespace: what the guest writes to the fd passes the link's hook egress,
what it will read passes the hook ingress. A tap on a bridge has them in the host's, at the bridge's port, where the
directions are the other way round. Each link has a table of its own, and each check in it a chain whose last rule
counts and drops what the check refuses: the chain's name has the reason.

Offsets count from the Ethernet header. The checks of ARP and IP exist a second time for tagged frames, four bytes
further on, where the profile lets tagged frames pass. Without a trunk, a profile that checks more than MACs lets no
tagged frame pass, because its content would not be checked. Two tags are never one VLAN's frame.

What makes a packet a server's, or a router's, cannot be hidden behind the extension headers of IPv6 (RFC 7113): a guest
that may not be one sends no routing and destination options, and nothing behind hop-by-hop options but MLD. Nor can ARP
and IP be hidden in SNAP (RFC 1042), which some systems and routers accept beside an ethertype.
"""

from __future__ import annotations

from contextlib import suppress

from cni.dataclass import dataclass
from cni.kernel import nft
from cni.kernel.nft import (
    AT_LEAST,
    AT_MOST,
    DIFFERENT,
    DROP,
    GOTO,
    JUMP,
    RETURN,
    compare,
    field,
    load,
    masked,
    verdict,
)
from cni.kernel.rtnl import mac_bytes
from cni.state.port_profile import burst_of, prefix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cni.kernel.nft import Netlink
    from cni.state.port_profile import Port

    Chains = dict[str, list[bytes]]

_ARP, _IPV4, _IPV6, _RARP = b"\x08\x06", b"\x08\x00", b"\x86\xdd", b"\x80\x35"
_TAGS = (b"\x81\x00", b"\x88\xa8", b"\x91\x00", b"\x92\x00")
_GROUP = b"\x01"  # the bit of the first byte of a MAC that makes it a broadcast or multicast address
_CHECK = "check-"
"""Before a reason, which alone may be a keyword of nft(8): its own listing would be no ruleset then."""
_TAGGED = "-tagged"
_TABLE = "vmtap-port-"
_ADDRESS = "-address"  # the second half of a check
_PRIORITY = -1
"""Before the tables of others."""


def table(ifname: str) -> str:
    """The name of a link's table."""
    return f"{_TABLE}{ifname}"


def install(
    netlink: Netlink, ifname: str, port: Port, mac: str, addresses: Iterable[str], *, reverse: bool = False
) -> None:
    """Put the profile in force at the link, in place of an earlier one, in one transaction.

    addresses: the attachment's, with or without a prefix length. reverse: the link is the bridge's port of a tap.
    Raises OSError.
    """
    name = table(ifname)
    sent, received = _hooks(reverse)
    messages = [
        nft.new_table(name),
        nft.base_chain(name, "out", sent, ifname, _PRIORITY),
        nft.base_chain(name, "in", received, ifname, _PRIORITY),
    ]
    made = chains(port, mac, addresses, policed="out" if reverse else "in")
    messages += [nft.chain(name, each) for each in made if each not in ("out", "in")]
    messages += [nft.rule(name, each, rule) for each, rules in made.items() for rule in rules]
    try:
        nft.change(netlink, messages)
    except FileExistsError:  # of an earlier link of that name, or an earlier profile
        nft.change(netlink, [messages[0], nft.delete_table(name), *messages])


def _hooks(reverse: bool) -> tuple[int, int]:
    """The hooks of what the guest sends, and of what it receives."""
    return (nft.INGRESS, nft.EGRESS) if reverse else (nft.EGRESS, nft.INGRESS)


def is_intact(
    netlink: Netlink, ifname: str, port: Port, mac: str, addresses: Iterable[str], *, reverse: bool = False
) -> bool:
    """Whether the link's table has the rules of install(), and no others, at the link's hooks. Raises OSError."""
    sent, received = _hooks(reverse)
    if nft.hooks(netlink, table(ifname)) != {"out": (sent, ifname), "in": (received, ifname)}:
        return False
    made = chains(port, mac, addresses, policed="out" if reverse else "in")
    wanted = {chain: [nft.expressions(rule) for rule in rules] for chain, rules in made.items()}
    found: dict[str, list[tuple[tuple[str, bytes], ...]]] = {chain: [] for chain in wanted}
    for rule in nft.rules(netlink, table(ifname)):
        found.setdefault(rule.chain, []).append(rule.expressions)
    return wanted.keys() == found.keys() and all(
        len(found[chain]) == len(rules) and all(map(nft.same, found[chain], rules))
        for chain, rules in wanted.items()
    )


def remove(netlink: Netlink, ifname: str) -> None:
    """Remove the link's table, if there is one. Raises OSError."""
    with suppress(FileNotFoundError):
        nft.change(netlink, [nft.delete_table(table(ifname))])


def tables(netlink: Netlink) -> dict[str, bytes]:
    """The links that have a table, or had one, by name, with the table's handle. Raises OSError."""
    found = nft.tables(netlink).items()
    return {name.removeprefix(_TABLE): handle for name, handle in found if name.startswith(_TABLE)}


def refused(netlink: Netlink, ifname: str) -> dict[str, int]:
    """Reason → how many frames have been refused. {} without a table. Raises OSError."""
    found: dict[str, int] = {}
    for chain, frames in nft.counts(netlink, table(ifname)):
        reason = chain.removeprefix(_CHECK).removesuffix(_TAGGED).removesuffix(_ADDRESS)
        found[reason] = found.get(reason, 0) + frames
    return found


def chains(port: Port, mac: str, addresses: Iterable[str], *, policed: str = "in") -> Chains:
    """The rules of each chain. policed: the direction, of "in" and "out", whose rate is limited here."""
    macs = [mac_bytes(each) for each in (mac, *port.macs)]
    trunk = port.tags
    made: Chains = {"out": [], "in": []}
    if port.mac_spoof_check:
        _check(made, "out", "source-mac", *(_pass(field(6, each)) for each in macs))
        _check(made, "in", "other-mac", _pass(_group()), *(_pass(field(0, each)) for each in macs))
    if trunk is not None:
        _check(made, "out", "tag-sent", *_tags(trunk))
        _check(made, "in", "tag-received", *_tags(trunk))
    if port.broadcast:
        _refuse(made, "broadcast", _group() + nft.over(port.broadcast, port.broadcast, frames=True))
    if port.protocols:
        leased = (each.partition("/")[0] for each in addresses)
        own = _Own(macs, [prefix(each) for each in (*leased, *port.addresses)])
        for at, suffix in ((14, ""), (18, _TAGGED))[: 2 if trunk else 1]:
            _protocols(made, port, own, at, suffix)
    rate, burst = (port.in_rate, port.in_burst) if policed == "in" else (port.out_rate, port.out_burst)
    if rate:
        _refuse(made, "rate", nft.over(rate // 8, burst or burst_of(rate)), direction=policed)
    return made


@dataclass(frozen=True)
class _Own:
    """What a guest may have as its source."""

    macs: list[bytes]
    prefixes: list[tuple[bytes, bytes]]
    """Address and mask."""

    def ipv4(self, at: int) -> list[bytes]:
        """Match the addresses."""
        return self._inside(at, 4)

    def ipv6(self, at: int) -> list[bytes]:
        """Match the addresses, and those of any prefix that end with the EUI-64 of a MAC (RFC 4291, appendix A)."""
        ends = (bytes([mac[0] ^ 2, *mac[1:3], 0xFF, 0xFE, *mac[3:]]) for mac in self.macs)
        return [*self._inside(at, 16), *(field(at + 8, each) for each in ends)]

    def _inside(self, at: int, size: int) -> list[bytes]:
        return [
            field(at, address, mask=mask if 0 in mask else b"")
            for address, mask in self.prefixes
            if len(address) == size
        ]


def _protocols(made: Chains, port: Port, own: _Own, at: int, suffix: str) -> None:
    """The checks of ARP and IP in frames whose payload begins at that offset."""
    arp, rarp, ipv4, ipv6 = (field(at - 2, kind) for kind in (_ARP, _RARP, _IPV4, _IPV6))
    if port.ip_spoof_check:
        addresses = f"{_CHECK}arp{_ADDRESS}{suffix}"
        made[f"{_CHECK}arp{suffix}"] = [
            _drop(field(at + 2, b"\x08\x00\x06\x04", DIFFERENT)),  # of Ethernet and IPv4 only
            *(field(at + 8, mac) + verdict(GOTO, addresses) for mac in own.macs),
            _drop(),
        ]
        probe = field(at + 14, bytes(4))  # from no address, for its own (RFC 5227)
        passing = [*map(_pass, own.ipv4(at + 14)), *(_pass(probe, each) for each in own.ipv4(at + 24))]
        made[addresses] = [*passing, _drop()]
        made["out"].append(arp + verdict(JUMP, f"{_CHECK}arp{suffix}"))
        asking = field(at + 7, b"\x03")  # a reverse request: QEMU announces a guest so (net/announce.c)
        _check(
            made,
            "out",
            f"rarp{suffix}",
            *(_pass(asking, field(at + 8, mac), field(at + 14, bytes(4))) for mac in own.macs),
            when=rarp,
        )
        _check(
            made,
            "out",
            f"ipv4{suffix}",
            *map(_pass, own.ipv4(at + 12)),
            _pass(field(at + 12, bytes(4)), *_udp4(at), field(at + 20, b"\x00\x44\x00\x43")),  # DHCP
            when=ipv4,
        )
        nowhere = field(at + 8, bytes(16))
        probe = nowhere + _icmpv6(at, 135)  # duplicate address detection; for others' it would take them away
        reports = (nowhere + _behind_options(at, kind) for kind in (131, 143))  # MLD, which precedes it
        _check(
            made,
            "out",
            f"ipv6{suffix}",
            *map(_pass, own.ipv6(at + 8)),
            *(_pass(probe, each) for each in own.ipv6(at + 48)),
            *map(_pass, reports),
            when=ipv6,
        )
        _check(
            made, "out", f"neighbour{suffix}", *map(_pass, own.ipv6(at + 48)), when=ipv6 + _icmpv6(at, 136)
        )
    if not port.dhcp_server:
        _refuse(made, f"dhcp-server{suffix}", *_dhcp_server(at, ipv4, ipv6))
    if not port.router_advertisements:
        # Router advertisement and redirect, of IPv6 and of ICMP (RFC 1256, RFC 792).
        icmp = ipv4 + field(at + 9, b"\x01") + _first(at)
        rules = [
            *(ipv6 + _icmpv6(at, kind) for kind in (134, 137)),
            *(icmp + _after_ipv4(at, kind) for kind in (9, 5)),
        ]
        _refuse(made, f"router{suffix}", *rules, icmp + field(at, b"\x45", DIFFERENT))
    _refuse(made, f"hidden{suffix}", *(ipv6 + each for each in _hidden(at)), *_snap(at))


def _check(made: Chains, direction: str, reason: str, *passing: bytes, when: bytes = b"") -> None:
    """A check that refuses what no rule lets pass."""
    made[_CHECK + reason] = [*passing, _drop()]
    made[direction].append(when + verdict(JUMP, _CHECK + reason))


def _refuse(made: Chains, reason: str, *matches: bytes, direction: str = "out") -> None:
    """A check that refuses what matches."""
    made[_CHECK + reason] = [_drop(each) for each in matches]
    made[direction].append(verdict(JUMP, _CHECK + reason))


def _pass(*matches: bytes) -> bytes:
    return b"".join(matches) + verdict(RETURN)


def _drop(*matches: bytes) -> bytes:
    return b"".join(matches) + nft.counter() + verdict(DROP)


def _group() -> bytes:
    return field(0, _GROUP, mask=_GROUP)


def _tags(trunk: Iterable[str]) -> Iterator[bytes]:
    untagged = b"".join(compare(DIFFERENT, each) for each in _TAGS)
    yield _pass(load(12, 2), untagged)
    for each in trunk:
        first, _, last = each.partition("-")
        low, high = (int(number).to_bytes(2) for number in (first, last or first))
        vlan = load(14, 2) + masked(b"\x0f\xff") + compare(AT_LEAST, low) + compare(AT_MOST, high)
        yield _pass(field(12, _TAGS[0]), vlan, load(16, 2), untagged)


def _icmpv6(at: int, kind: int) -> bytes:
    return field(at + 6, b"\x3a") + field(at + 40, bytes([kind]))


def _behind_options(at: int, kind: int) -> bytes:
    """ICMPv6 behind eight bytes of hop-by-hop options."""
    return field(at + 6, b"\x00") + field(at + 40, b"\x3a\x00") + field(at + 48, bytes([kind]))


def _first(at: int) -> bytes:
    """The packet is no later fragment, which has no header of its protocol."""
    return field(at + 6, b"\x00\x00", mask=b"\x1f\xff")


def _after_ipv4(at: int, kind: int) -> bytes:
    """The header behind an IPv4 header without options begins so."""
    return field(at, b"\x45") + field(at + 20, bytes([kind]))


def _udp4(at: int) -> tuple[bytes, ...]:
    """UDP behind an IPv4 header without options."""
    return field(at, b"\x45"), field(at + 9, b"\x11"), _first(at)


def _dhcp_server(at: int, ipv4: bytes, ipv6: bytes) -> Iterator[bytes]:
    """From a server's port or to a client's: clients take an answer from any port.

    And all UDP behind IPv4 options, which would hide the ports.
    """
    udp = ipv4 + field(at + 9, b"\x11") + _first(at)
    for where, number in ((at + 20, b"\x00\x43"), (at + 22, b"\x00\x44")):
        yield udp + field(at, b"\x45") + field(where, number)
    yield udp + field(at, b"\x45", DIFFERENT)
    for where, number in ((at + 40, b"\x02\x23"), (at + 42, b"\x02\x22")):
        yield ipv6 + field(at + 6, b"\x11") + field(where, number)


def _hidden(at: int) -> Iterator[bytes]:
    """What may hide an announcement or answer behind extension headers of IPv6."""
    for header in (b"\x2b", b"\x3c"):  # routing, destination options
        yield field(at + 6, header)
    options = field(at + 6, b"\x00")
    yield options + field(at + 40, b"\x3a\x00", DIFFERENT)
    yield options + load(at + 48, 1) + compare(nft.BELOW, b"\x82")
    yield options + load(at + 48, 1) + compare(nft.ABOVE, b"\x84") + compare(DIFFERENT, b"\x8f")
    fragment = field(at + 6, b"\x2c") + field(at + 42, b"\x00\x00", mask=b"\xff\xf8")
    for header in (b"\x00", b"\x2b", b"\x2c", b"\x3c"):
        yield fragment + field(at + 40, header)
    icmp = fragment + field(at + 40, b"\x3a")  # RFC 6980: of ICMPv6 only echoes are in fragments
    yield icmp + load(at + 48, 1) + compare(nft.BELOW, b"\x80")
    yield icmp + load(at + 48, 1) + compare(nft.ABOVE, b"\x81")
    for where, number in ((at + 48, b"\x02\x23"), (at + 50, b"\x02\x22")):
        yield fragment + field(at + 40, b"\x11") + field(where, number)


def _snap(at: int) -> Iterator[bytes]:
    """ARP or IP in LLC instead of behind an ethertype: SNAP of RFC 1042 or of a bridge tunnel, or IP's SAP."""
    length = load(at - 2, 2) + compare(nft.BELOW, b"\x06\x00")
    for organisation in (bytes(3), b"\x00\x00\xf8"):
        yield length + field(at, b"\xaa") + field(at + 3, organisation)
    yield length + field(at, b"\x06")
