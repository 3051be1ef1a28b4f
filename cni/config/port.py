"""`port` of the policy and of a network config, and the capability `bandwidth` → Port.

The policy's part is in force in any case; a network config and a runtime can only narrow it. Of several rates the
smallest counts: a rate is a limit, and no promise. What would widen the policy's part is refused.
"""

from __future__ import annotations

import re

from cni import spec
from cni.config import schema
from cni.dataclass import replace
from cni.errors import CniError
from cni.state.port_profile import Port, are_within, prefix, vlans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20}
_AMOUNT = re.compile(r"([0-9]+)([kMG]|[KM]i)(?:bit|B)")
_SLOWEST, _FASTEST = 10**3, 10**11
"""Bit/s. nf_tables has no faster limit than 2^64 bytes in 10^9 seconds (nft_limit.c, nft_limit_init)."""
_BURST = 1 << 16, 1 << 28
"""Bytes: at least the largest frame of a guest, which TBF would drop else (sch_tbf.c, tbf_enqueue)."""
_SWITCHES = (
    ("macSpoofCheck", True),
    ("ipSpoofCheck", True),
    ("dhcpServer", False),
    ("routerAdvertisements", False),
)
"""Each field, and its narrower value."""


def decide(
    policy: Mapping[str, Any],
    wanted: Mapping[str, Any],
    bandwidth: Mapping[str, Any],
    *,
    free: bool,
    on_vlan: bool = False,
) -> Port | None:
    """The profile of an attachment; None if nothing is to be filtered or limited. The arguments are valid by schema.

    policy: `port` of the policy entry. wanted: that of the network config. bandwidth: runtimeConfig.bandwidth. free:
    whether there is no policy, so that the network config decides. on_vlan: whether the attachment is in one VLAN,
    whose guest must not reach another by a tag of its own. Raises CniError 7 if the config wants more.
    """
    if not (policy or wanted or bandwidth):
        return None
    narrow: dict[str, bool] = {}
    for name, strict in _SWITCHES:
        given, asked = policy.get(name), wanted.get(name)
        if asked is (not strict) and given is strict and not free:
            raise _refusal(
                name, asked, f"the policy has {schema.show(strict)}, and a network config can only narrow it"
            )
        narrow[name] = strict in (given, asked)
    out_rate, out_burst = _rate("out", policy, wanted, bandwidth)
    in_rate, in_burst = _rate("in", policy, wanted, bandwidth)
    storms = [each["broadcast"] for each in (policy, wanted) if each.get("broadcast") is not None]
    port = Port(
        mac_spoof_check=narrow["macSpoofCheck"],
        macs=_macs(policy, wanted),
        ip_spoof_check=narrow["ipSpoofCheck"],
        addresses=_addresses(policy, wanted),
        dhcp_server=not narrow["dhcpServer"],
        router_advertisements=not narrow["routerAdvertisements"],
        trunk=_trunk(policy, wanted, on_vlan),
        broadcast=min(storms, default=None),
        out_rate=out_rate,
        in_rate=in_rate,
        out_burst=out_burst,
        in_burst=in_burst,
    )
    if port.trunk is None and on_vlan and port.mac_spoof_check:
        port = replace(port, trunk=())
    return port if port.filters or port.out_rate or port.in_rate else None


def _macs(policy: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    given, asked = (
        None if each.get("macs") is None else tuple(mac.lower() for mac in each["macs"])
        for each in (policy, wanted)
    )
    if asked is None:
        return given or ()
    if policy.get("macSpoofCheck") or policy.get("ipSpoofCheck"):  # which takes IPv6 addresses from MACs
        for each in asked:
            if each not in (given or ()):
                raise _refusal("macs", each, f"the policy allows {schema.listed(given or ())}")
    return asked


def _addresses(policy: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    given, asked = policy.get("addresses") or (), wanted.get("addresses")
    for each in (*given, *(asked or ())):
        try:
            prefix(each)
        except (OSError, ValueError) as error:
            why = "it is no IPv4 or IPv6 address, alone or with a prefix length"
            raise _refusal("addresses", each, why) from error
    if asked is None:
        return tuple(given)
    if policy.get("ipSpoofCheck"):
        for each in asked:
            if not are_within([each], given):
                raise _refusal("addresses", each, f"the policy allows {schema.listed(given)}")
    return tuple(asked)


def _trunk(policy: Mapping[str, Any], wanted: Mapping[str, Any], on_vlan: bool) -> tuple[str, ...] | None:
    given, asked = _vlans(policy), _vlans(wanted)
    if given is None:
        strict = {name for name, narrow in _SWITCHES if policy.get(name) is narrow}
        if strict - {"macSpoofCheck"} or (strict and on_vlan):
            given = ()  # what the policy's other fields mean without a trunk
    if asked is None:
        return given
    if given is not None:
        for each in asked:
            if vlans((each,)) & ~vlans(given):
                raise _refusal("trunk", each, f"the policy allows {schema.listed(given)}")
    return asked


def _vlans(port: Mapping[str, Any]) -> tuple[str, ...] | None:
    if port.get("trunk") is None:
        return None
    found = tuple(map(str, port["trunk"]))
    for each in found:
        if not vlans((each,)):
            raise _refusal("trunk", each, "the range ends before it begins")
    return found


def _rate(
    direction: str, policy: Mapping[str, Any], wanted: Mapping[str, Any], bandwidth: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """The smallest rate in bit/s, and its burst in bytes. Raises CniError 7 if one is out of bounds."""
    found: list[tuple[int, int | None]] = []
    for each in (policy.get("rate") or {}, wanted.get("rate") or {}):
        burst = _amount("burst", each["burst"], *_BURST) if each.get("burst") else None
        if each.get(direction):
            found.append((_amount(direction, each[direction], _SLOWEST, _FASTEST), burst))
    side = {"out": "egress", "in": "ingress"}[direction]  # as the pod sees it (CNI conventions)
    if rate := bandwidth.get(f"{side}Rate"):
        burst = bandwidth.get(f"{side}Burst")
        found.append((_bounded(rate, _SLOWEST, _FASTEST), _bounded(burst // 8, *_BURST) if burst else None))
    return min(found, default=(None, None), key=lambda each: each[0])


def _bounded(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)


def _amount(name: str, value: str, least: int, most: int) -> int:
    """A number of bits or bytes, such as "500Mbit" or "64KiB"."""
    match = _AMOUNT.fullmatch(value)
    assert match is not None  # noqa: S101 - valid by schema
    amount = int(match[1]) * _UNITS[match[2]]
    if not least <= amount <= most:
        raise _refusal(f"rate.{name}", value, "a rate is at most 100Gbit, and a burst 64KiB to 256MiB")
    return amount


def _refusal(key: str, value: Any, reason: str) -> CniError:
    return CniError(spec.INVALID_NETWORK_CONFIG, f"port.{key}: {schema.show(value)} is refused: {reason}")
