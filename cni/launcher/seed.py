"""A NoCloud seed (cloud-init) with the addresses that IPAM assigned: an ISO image in a sealed memfd.

The files are JSON, which is valid YAML, the format that cloud-init reads. Import this module only for --seed: pycdlib
takes longer to import than the rest of a start.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
from io import BytesIO

import pycdlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from cni.launcher.broker_client import Described

_ROUTE_KEYS = {"priority": "metric", "mtu": "mtu", "table": "table"}
"""Key of a CNI route (1.1.0) → key of a cloud-init route."""


def make(records: Sequence[Described]) -> int:
    """The image in a sealed memfd: a close-on-exec fd, open for reading only.

    QEMU takes an fd from an fd set only if the access mode is the one that it needs.
    """
    writable = os.memfd_create("vmtap-seed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(writable), "wb") as image:
            image.write(iso(files(records)))
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def files(records: Iterable[Described]) -> dict[str, bytes]:
    """NoCloud's three files. The instance id depends on the network config: cloud-init configures an instance once."""
    network = json.dumps(network_config(records), indent=1).encode()
    instance = {"instance-id": f"vmtap-{hashlib.sha256(network).hexdigest()[:16]}"}
    return {
        "meta-data": json.dumps(instance).encode(),
        "user-data": b"#cloud-config\n{}\n",
        "network-config": network,
    }


def iso(contents: Mapping[str, bytes]) -> bytes:
    """An ISO 9660 image of the files (name → data), labelled cidata; Rock Ridge and Joliet have the names as given."""
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, content) in enumerate(contents.items()):
        image.add_fp(
            BytesIO(content),
            len(content),
            f"/F{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
            file_mode=0o100444,
        )
    written = BytesIO()
    image.write_fp(written)
    image.close()
    return written.getvalue()


def network_config(records: Iterable[Described]) -> dict[str, Any]:
    """cloud-init's network config, version 2: one entry for each attachment, matched by MAC.

    The guest's interface is renamed to the ifname, since some renderers of cloud-init need a name. An attachment
    without addresses uses DHCPv4 and router advertisements, and the boot does not wait for it.
    """
    return {"version": 2, "ethernets": {record.ifname: _ethernet(record) for record in records}}


def _ethernet(record: Described) -> dict[str, Any]:
    card: dict[str, Any] = {
        "match": {"macaddress": record.mac},
        "set-name": record.ifname,
        "mtu": record.mtu,
    }
    if record.ips:
        card |= {"dhcp4": False, "dhcp6": False, "addresses": [ip["address"] for ip in record.ips]}
    else:
        card |= {"dhcp4": True, "optional": True}
    if record.routes:
        card["routes"] = [_route(route, record.ips) for route in record.routes]
    dns = record.dns or {}
    servers = {"addresses": dns.get("nameservers"), "search": dns.get("search") or [dns.get("domain")]}
    if dns.get("nameservers") or dns.get("search") or dns.get("domain"):
        card["nameservers"] = {key: values for key, values in servers.items() if values and values != [None]}
    return card


def _route(route: Mapping[str, Any], ips: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A cloud-init route. Without gw: the gateway of an address of that family (SPEC section 5, "routes")."""
    target = ipaddress.ip_network(route["dst"], strict=False)
    via = route.get("gw") or next(
        (ip["gateway"] for ip in ips if ip.get("gateway") and _version(ip["gateway"]) == target.version), None
    )
    entry: dict[str, Any] = {"to": str(target)}
    if via is None:
        entry["scope"] = "link"
    else:
        entry["via"] = via
        hop = ipaddress.ip_address(via)
        neighbour = hop.version == 6 and hop.is_link_local  # link-local: reachable without a route
        if not neighbour and not any(hop in ipaddress.ip_interface(ip["address"]).network for ip in ips):
            entry["on-link"] = True
    return entry | {_ROUTE_KEYS[key]: route[key] for key in _ROUTE_KEYS if key in route}


def _version(address: str) -> int:
    return ipaddress.ip_address(address).version
