"""CNI results: dataclasses of version 1.1.0, converted from and to every version (SPEC section 5).

0.3.x and 0.4.0 have no mtu, socketPath and pciID of an interface, and name the family of each address. 0.1.0 and 0.2.0
have no interfaces, at most one address of each family, and at least one address. Must not decide what is in a result.
"""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_pton  # ipaddress takes 4 ms to import, and 10 µs for an address

from cni import spec
from cni.config import schema
from cni.dataclass import dataclass, replace
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.config.netconf import NetConf

FIRST = ("0.1.0", "0.2.0")
"""Versions whose results are ip4 and ip6."""
RICH = ("1.0.0", "1.1.0")
"""Versions whose results have every field. (1.0.0's text leaves out some; the reference implementation has them.)"""

MOST = 500
"""Interfaces, addresses, routes or resolver settings of a result: each costs some 10 µs."""


@dataclass(frozen=True)
class Interface:
    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""
    """CNI_NETNS verbatim, "" for an interface on the host."""
    socket_path: str = ""
    pci_id: str = ""


@dataclass(frozen=True)
class IP:
    address: str
    """With prefix length: 10.1.0.5/24."""
    gateway: str = ""
    interface: int | None = None
    """Index into the result's interfaces."""


@dataclass(frozen=True)
class Route:
    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


@dataclass(frozen=True)
class DNS:
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_NO_DNS = DNS()


@dataclass(frozen=True)
class Result:
    interfaces: tuple[Interface, ...] = ()
    ips: tuple[IP, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: DNS = _NO_DNS


def needs_ip(version: str) -> bool:
    """Whether each result of this version must have an address."""
    return version in FIRST


def require_address(conf: NetConf) -> None:
    """Raise CniError 1 if the config's version needs an address in each result, and none can come."""
    if conf.ipam is None and conf.prev_result is None and needs_ip(conf.cni_version):
        raise CniError(
            spec.INCOMPATIBLE_VERSION,
            f"cniVersion {conf.cni_version} has no result without an IP address: raise it, or set ipam",
        )


def parse(raw: Mapping[str, Any], version: str, *, where: str = "prevResult") -> Result:
    """The result in a document. version: of a document without a cniVersion; where: the document's name in errors.

    Raises CniError 6.
    """
    version = _version(raw, version, where)
    if version in FIRST:
        return _parse_first(raw, where)
    interfaces = tuple(_interface(each, at) for each, at in _objects(raw, "interfaces", where))
    ips = []
    for each, at in _objects(raw, "ips", where):
        ip = _ip(each, at, "address")
        if ip.interface is not None and ip.interface >= len(interfaces):
            raise _refusal(f"{at}.interface", ip.interface, f"an index into the {len(interfaces)} interfaces")
        family = each.get("version")
        if version not in RICH and family not in (None, _family(ip.address)):
            raise _refusal(f"{at}.version", family, f'"{_family(ip.address)}", which is what the address is')
        ips.append(ip)
    routes = tuple(_route(each, at) for each, at in _objects(raw, "routes", where))
    return Result(interfaces, tuple(ips), routes, parse_dns(raw.get("dns"), where=f"{where}.dns"))


def parse_dns(raw: object, *, where: str = "dns") -> DNS:
    if raw is None:
        return DNS()
    if not isinstance(raw, dict):
        raise _refusal(where, raw, "an object")
    return DNS(
        nameservers=_strings(raw, "nameservers", where),
        domain=_string(raw, "domain", where),
        search=_strings(raw, "search", where),
        options=_strings(raw, "options", where),
    )


def render(result: Result, version: str) -> dict[str, Any]:
    """The result as a document of this version. Fields that the version does not have are left out.

    Raises CniError 1 if the version needs an address and the result has none.
    """
    document: dict[str, Any] = {"cniVersion": version}
    rich = version in RICH
    if version in FIRST:
        document |= _render_first(result)
    else:
        document |= _filled(
            interfaces=[_render_interface(each, rich) for each in result.interfaces],
            ips=[_render_ip(each, rich) for each in result.ips],
            routes=[_render_route(each) for each in result.routes],
        )
    dns = result.dns
    if dns != _NO_DNS:
        document["dns"] = _filled(
            nameservers=[*dns.nameservers], domain=dns.domain, search=[*dns.search], options=[*dns.options]
        )
    return document


def extend(previous: Mapping[str, Any] | None, own: Result, version: str) -> dict[str, Any]:
    """The result of a plugin in a chain: prevResult, with the own interfaces, addresses and routes after its own.

    Unknown keys of prevResult are kept. Own resolver settings replace those of prevResult.
    """
    if previous is None:
        return render(own, version)
    before = parse(previous, version)
    if _version(previous, version, "prevResult") != version:
        previous = render(before, version)
    shift = len(before.interfaces)
    ours = render(
        replace(
            own,
            ips=tuple(
                ip if ip.interface is None else replace(ip, interface=ip.interface + shift) for ip in own.ips
            ),
        ),
        version,
    )
    joined: dict[str, Any] = {
        key: [*(previous.get(key) or ()), *ours.get(key, ())]
        for key in ("interfaces", "ips", "routes")
        if key in ours
    }
    return {**previous, **ours, **joined}


def _version(raw: Mapping[str, Any], version: str, where: str) -> str:
    own = raw.get("cniVersion")
    if own in (None, ""):
        return version
    if own not in spec.VERSIONS:
        raise _refusal(f"{where}.cniVersion", own, f"one of {', '.join(spec.VERSIONS)}")
    return str(own)


def _parse_first(raw: Mapping[str, Any], where: str) -> Result:
    ips: list[IP] = []
    routes: list[Route] = []
    for key, family in (("ip4", "4"), ("ip6", "6")):
        each, at = raw.get(key), f"{where}.{key}"
        if each is None:
            continue
        if not isinstance(each, dict):
            raise _refusal(at, each, "an object")
        ip = _ip(each, at, "ip")
        if _family(ip.address) != family:
            raise _refusal(f"{at}.ip", ip.address, f"an IPv{family} address")
        ips.append(replace(ip, interface=None))
        routes += (_route(route, place) for route, place in _objects(each, "routes", at))
    return Result(ips=tuple(ips), routes=tuple(routes), dns=parse_dns(raw.get("dns"), where=f"{where}.dns"))


def _render_first(result: Result) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for family in ("4", "6"):
        ips = [ip for ip in result.ips if _family(ip.address) == family]
        if ips:
            routes = [
                {"dst": route.dst} | _filled(gw=route.gw)
                for route in result.routes
                if _family(route.dst) == family
            ]
            document[f"ip{family}"] = {"ip": ips[0].address} | _filled(gateway=ips[0].gateway, routes=routes)
    if not document:
        message = "CNI before 0.3.0 has no result without an IP address; raise cniVersion or set ipam"
        raise CniError(spec.INCOMPATIBLE_VERSION, message)
    return document


def _interface(raw: dict[str, Any], at: str) -> Interface:
    return Interface(
        name=_string(raw, "name", at),
        mac=_string(raw, "mac", at),
        mtu=_integer(raw, "mtu", at) or 0,
        sandbox=_string(raw, "sandbox", at),
        socket_path=_string(raw, "socketPath", at),
        pci_id=_string(raw, "pciID", at),
    )


def _render_interface(each: Interface, rich: bool) -> dict[str, Any]:
    document = {"name": each.name} | _filled(mac=each.mac, sandbox=each.sandbox)
    if rich:
        document |= _filled(mtu=each.mtu, socketPath=each.socket_path, pciID=each.pci_id)
    return document


def _ip(raw: dict[str, Any], at: str, key: str) -> IP:
    address = _network(raw, key, at)
    return IP(address, _address(raw, "gateway", at), _integer(raw, "interface", at))


def _render_ip(each: IP, rich: bool) -> dict[str, Any]:
    document = {"address": each.address} | _filled(gateway=each.gateway)
    if each.interface is not None:
        document["interface"] = each.interface
    return document if rich else {"version": _family(each.address)} | document


def _route(raw: dict[str, Any], at: str) -> Route:
    return Route(
        dst=_network(raw, "dst", at),
        gw=_address(raw, "gw", at),
        mtu=_integer(raw, "mtu", at) or 0,
        advmss=_integer(raw, "advmss", at) or 0,
        priority=_integer(raw, "priority", at) or 0,
        table=_integer(raw, "table", at),
        scope=_integer(raw, "scope", at),
    )


def _render_route(each: Route) -> dict[str, Any]:
    # Versions before 1.1.0 have dst and gw only, but a route without its table would be a different route.
    document = {"dst": each.dst} | _filled(
        gw=each.gw, mtu=each.mtu, advmss=each.advmss, priority=each.priority
    )
    # 0 is a valid table and a valid scope.
    return document | {
        key: value for key, value in (("table", each.table), ("scope", each.scope)) if value is not None
    }


def _filled(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def _objects(raw: Mapping[str, Any], key: str, where: str) -> list[tuple[dict[str, Any], str]]:
    """The members of a list of objects, each with its path in the document. null, as Go writes it, is an empty list."""
    values = raw.get(key)
    if values is None:
        return []
    if not isinstance(values, list):
        raise _refusal(f"{where}.{key}", values, "a list of objects")
    if len(values) > MOST:
        raise _refusal(f"{where}.{key}", values, f"at most {MOST} of them")
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise _refusal(f"{where}.{key}[{index}]", value, "an object")
    return [(value, f"{where}.{key}[{index}]") for index, value in enumerate(values)]


def _strings(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = raw.get(key)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _refusal(f"{where}.{key}", values, "a list of strings")
    if len(values) > MOST:
        raise _refusal(f"{where}.{key}", values, f"at most {MOST} of them")
    return tuple(values)


def _string(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _refusal(f"{where}.{key}", value, "a string")
    return value


def _integer(raw: Mapping[str, Any], key: str, where: str) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**32:
        raise _refusal(f"{where}.{key}", value, "an unsigned integer of 32 bits")
    return value


def _network(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not _is_network(value):
        raise _refusal(
            f"{where}.{key}", value, "an address with prefix length, such as 10.1.0.5/24 or fd00::5/64"
        )
    return value


def _address(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = _string(raw, key, where)
    if value and ("/" in value or not _is_network(f"{value}/0")):
        raise _refusal(f"{where}.{key}", value, "an address, such as 10.1.0.1 or fd00::1")
    return value


def _family(address: str) -> str:
    return "6" if ":" in address else "4"


def _is_network(text: str) -> bool:
    """Whether it is an address with a prefix length in decimal; a netmask or an IPv6 zone is not allowed."""
    address, _, length = text.partition("/")
    family = AF_INET6 if ":" in address else AF_INET
    # inet_pton takes a NUL for the end.
    if not (length.isascii() and length.isdecimal() and len(length) <= 3) or "\0" in address:
        return False
    if int(length) > (128 if family == AF_INET6 else 32):
        return False
    try:
        inet_pton(family, address)
    except (OSError, UnicodeEncodeError):
        return False
    return True


def _refusal(where: str, value: object, wanted: str) -> CniError:
    return CniError(spec.DECODING_FAILURE, f"{where}: {schema.show(value)} is not allowed; give {wanted}")
