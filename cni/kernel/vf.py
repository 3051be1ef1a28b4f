"""The settings of a PF's virtual functions (rtnetlink's IFLA_VF_*), and the mode of its embedded switch.

Must not decide anything.

Layouts: linux/if_link.h, linux/if_bridge.h; net/core/rtnetlink.c.
"""

from __future__ import annotations

import errno
import struct

from cni.kernel.rtnl import (
    RTEXT_FILTER_SKIP_STATS,
    RTM_GETLINK,
    RTM_SETLINK,
    attr,
    attributes,
    link_message,
    mac_bytes,
    nest,
)
from cni.kernel.vf_settings import ETH_P_8021Q, VfSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cni.kernel.rtnl import Rtnl

SWITCH_MODES = {"bridge": 0, "vepa": 1}
"""BRIDGE_MODE_VEB, BRIDGE_MODE_VEPA."""

_RTEXT_FILTER_VF = 0x1
_AF_BRIDGE = 7
_IFLA_VFINFO_LIST = 22
_IFLA_AF_SPEC = 26
_IFLA_VF_INFO = 1
_MAC, _VLAN, _SPOOFCHK, _LINK_STATE, _RATE, _TRUST, _VLAN_LIST = 1, 2, 4, 5, 6, 9, 12  # IFLA_VF_*
_IFLA_VF_VLAN_INFO = 1
_IFLA_BRIDGE_FLAGS, _IFLA_BRIDGE_MODE = 0, 1
_BRIDGE_FLAGS_SELF = 2
_UNKNOWN = 0xFFFFFFFF
"""What the kernel presets; it stays where a driver does not report the setting."""
_PLAIN = {"spoofchk": _SPOOFCHK, "trust": _TRUST, "link_state": _LINK_STATE}


def settings(host: Rtnl, pf: int) -> dict[int, VfSettings]:
    """The settings of each VF of the PF with that interface index, by the VF's number. Raises OSError."""
    found = host.details(pf, _RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS).get(_IFLA_VFINFO_LIST, b"")
    return dict(_decode(attributes(each)) for each in _each(found))


def change(host: Rtnl, pf: int, vf: int, wanted: VfSettings) -> dict[str, OSError]:
    """Change each setting that wanted gives, one by one; the refusals by the setting's name."""
    given = wanted.given()
    if not given:
        return {}
    outcomes = host.talk(
        *(
            link_message(
                RTM_SETLINK,
                nest(_IFLA_VFINFO_LIST, nest(_IFLA_VF_INFO, _encode(vf, name, value))),
                index=pf,
            )
            for name, value in given.items()
        )
    )
    return {name: said for name, said in zip(given, outcomes, strict=True) if isinstance(said, OSError)}


def switch_mode(host: Rtnl, pf: int) -> int | None:
    """A value of SWITCH_MODES; None: the driver does not report one. Raises OSError."""
    kind, _, body = link_message(RTM_GETLINK, family=_AF_BRIDGE)
    for answer in host.dump(kind, body):
        if struct.unpack_from("=i", answer, 4) == (pf,):
            mode = attributes(attributes(answer[16:]).get(_IFLA_AF_SPEC, b"")).get(_IFLA_BRIDGE_MODE)
            if mode:
                return int(struct.unpack_from("=H", mode)[0])
    return None


def set_switch_mode(host: Rtnl, pf: int, mode: int) -> None:
    """Raises OSError: EOPNOTSUPP where the driver knows no mode, or not this one."""
    host.do(
        link_message(
            RTM_SETLINK,
            nest(
                _IFLA_AF_SPEC,
                attr(_IFLA_BRIDGE_FLAGS, struct.pack("=H", _BRIDGE_FLAGS_SELF)),
                attr(_IFLA_BRIDGE_MODE, struct.pack("=H", mode)),
            ),
            index=pf,
            family=_AF_BRIDGE,
        )
    )


def _each(data: bytes) -> list[bytes]:
    """The payloads of a list, whose attributes are all of one kind."""
    found = []
    at = 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("=H", data, at)
        found.append(data[at + 4 : at + length])
        at += max(4, (length + 3) & ~3)
    return found


def _decode(info: dict[int, bytes]) -> tuple[int, VfSettings]:
    number, mac = struct.unpack_from("=I6s", info[_MAC])
    found: dict[str, Any] = {"mac": mac.hex(":")}
    _, vlan, priority = struct.unpack_from("=III", info[_VLAN])
    protocol = ETH_P_8021Q
    for each in _each(info.get(_VLAN_LIST, b""))[:1]:
        (protocol,) = struct.unpack_from("!H", each, 12)
    found["vlan"] = (vlan, priority, protocol if vlan else ETH_P_8021Q)
    if _RATE in info:
        found["rate"] = struct.unpack_from("=II", info[_RATE], 4)
    for name, kind in _PLAIN.items():
        if kind in info and (value := struct.unpack_from("=I", info[kind], 4)[0]) != _UNKNOWN:
            found[name] = value
    return number, VfSettings(**found)


def _encode(vf: int, name: str, value: Any) -> bytes:
    if name == "mac":
        return attr(_MAC, struct.pack("=I32s", vf, mac_bytes(value)))
    if name == "vlan" and value[2] == ETH_P_8021Q:
        return attr(_VLAN, struct.pack("=III", vf, *value[:2]))
    if name == "vlan":
        info = struct.pack("=III", vf, *value[:2]) + struct.pack("!Hxx", value[2])
        return nest(_VLAN_LIST, attr(_IFLA_VF_VLAN_INFO, info))
    if name == "rate":
        return attr(_RATE, struct.pack("=III", vf, *value))
    if name in _PLAIN:
        return attr(_PLAIN[name], struct.pack("=II", vf, value))
    raise OSError(errno.EINVAL, f"no setting {name!r}")
