"""CNI results of other plugins, as prevResult and as a delegate prints them: result.parse, render and extend."""

from __future__ import annotations

import json

from cni import spec
from cni.attach import result
from cni.errors import CniError
from lab.fuzz import claims
from lab.fuzz.targets import Target

_OWN = result.Result(
    interfaces=(result.Interface("net1", mac="02:00:00:00:00:01", sandbox="/run/netns/a"),),
    ips=(result.IP("10.1.0.5/24", "10.1.0.1", 0),),
)


def run(data: bytes) -> None:
    """Parse the document in data as a result of the oldest version and of each later form, and convert it."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(document, dict):
        return
    for version in ("0.2.0", "0.4.0", "1.1.0"):
        try:
            parsed = result.parse(document, version)
        except CniError as error:
            claims.refused(error, (spec.DECODING_FAILURE,))
            continue
        claims.typed(parsed)
        for kind in (parsed.interfaces, parsed.ips, parsed.routes, (parsed.dns,)):
            for each in kind:
                claims.typed(each)
        full = result.render(parsed, "1.1.0")
        assert result.parse(full, "1.1.0") == parsed
        for other in spec.VERSIONS:
            _converted(document, parsed, other)


def _converted(document: dict[str, object], parsed: result.Result, version: str) -> None:
    """What render and extend make for a version is a result of that version."""
    try:
        rendered = result.render(parsed, version)
    except CniError as error:
        claims.refused(error, (spec.INCOMPATIBLE_VERSION,))
        return
    again = result.parse(rendered, version)
    assert result.render(again, version) == rendered
    if version in result.FIRST:
        return
    try:
        chained = result.parse(result.extend(document, _OWN, version), version)
    except CniError as error:
        claims.refused(error, (spec.DECODING_FAILURE,))
        return
    assert chained.interfaces[-1].name == "net1"
    assert chained.ips[-1].interface == len(chained.interfaces) - 1


_WORDS = (
    *("cniVersion", "interfaces", "ips", "routes", "dns", "ip4", "ip6", "name", "mac", "sandbox", "mtu"),
    *("socketPath", "pciID", "address", "gateway", "interface", "version", "ip", "dst", "gw", "advmss"),
    *("priority", "table", "scope", "nameservers", "domain", "search", "options", *spec.VERSIONS),
    *("10.1.0.5/24", "10.1.0.1", "fd00::5/64", "fd00::1", "0.0.0.0/0", "::/0", "4", "6", "fe80::1%eth0"),
)
TARGET = Target(run, words=_WORDS, json=True)
