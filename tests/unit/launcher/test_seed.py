"""The seed, read back from the image in the memfd."""

from __future__ import annotations

import json
import os
from io import BytesIO
from typing import Any

import pycdlib
import pytest
import yaml

from cni.launcher import seed
from tests.unit.launcher.attached import MAC, record

IPS = ({"address": "10.1.0.5/24", "gateway": "10.1.0.1"}, {"address": "fd00::5/64", "gateway": "fd00::1"})


def card(**fields: Any) -> dict[str, Any]:
    config = seed.network_config([record(**fields)])
    assert config["version"] == 2
    entry: dict[str, Any] = config["ethernets"]["net1"]
    return entry


def test_the_image_is_cidata_with_the_three_files() -> None:
    fd = seed.make([record(ips=IPS)])
    with open(fd, "rb") as image:
        iso = pycdlib.PyCdlib()
        iso.open_fp(image)
        label = iso.pvd.volume_identifier.decode().rstrip()
        read: dict[str, set[bytes]] = {}
        for facade in (iso.get_rock_ridge_facade(), iso.get_joliet_facade()):
            for name in ("meta-data", "user-data", "network-config"):
                content = BytesIO()
                facade.get_file_from_iso_fp(content, f"/{name}")
                read.setdefault(name, set()).add(content.getvalue())
        iso.close()
    assert label == "cidata"
    assert read == {name: {content} for name, content in seed.files([record(ips=IPS)]).items()}


def test_the_image_can_be_read_only() -> None:
    fd = seed.make([record()])
    try:
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        with pytest.raises(PermissionError):  # sealed: not even by opening it again
            os.truncate(f"/proc/self/fd/{fd}", 0)
    finally:
        os.close(fd)


def test_the_files_are_yaml() -> None:
    files = seed.files([record(ips=IPS, dns={"search": ["bücher.example"]})])
    assert yaml.safe_load(files["network-config"]) == json.loads(files["network-config"])
    assert yaml.safe_load(files["meta-data"])["instance-id"].startswith("vmtap-")
    assert files["user-data"].startswith(b"#cloud-config\n")
    assert yaml.safe_load(files["user-data"]) == {}


def test_another_address_makes_another_instance() -> None:
    """cloud-init looks at network-config again for a new instance-id only."""
    first, again, other = (
        seed.files([record(ips=[{"address": address}])])["meta-data"]
        for address in ("10.0.0.1/8", "10.0.0.1/8", "10.0.0.2/8")
    )
    assert first == again != other


def test_addresses_turn_dhcp_off() -> None:
    assert card(ips=IPS, mtu=9000) == {
        "match": {"macaddress": MAC},
        "set-name": "net1",
        "mtu": 9000,
        "dhcp4": False,
        "dhcp6": False,
        "addresses": ["10.1.0.5/24", "fd00::5/64"],
    }


def test_no_address_asks_dhcp_and_does_not_hold_up_the_boot() -> None:
    assert card() == {
        "match": {"macaddress": MAC},
        "set-name": "net1",
        "mtu": 1500,
        "dhcp4": True,
        "optional": True,
    }


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ({"dst": "0.0.0.0/0"}, {"to": "0.0.0.0/0", "via": "10.1.0.1"}),
        ({"dst": "::/0"}, {"to": "::/0", "via": "fd00::1"}),
        ({"dst": "10.9.0.0/16", "gw": "10.1.0.9"}, {"to": "10.9.0.0/16", "via": "10.1.0.9"}),
        ({"dst": "10.9.1.1/16", "gw": "10.1.0.9"}, {"to": "10.9.0.0/16", "via": "10.1.0.9"}),
        (
            {"dst": "10.9.0.0/16", "gw": "169.254.1.1"},
            {"to": "10.9.0.0/16", "via": "169.254.1.1", "on-link": True},
        ),
        ({"dst": "::/0", "gw": "fe80::1"}, {"to": "::/0", "via": "fe80::1"}),
        (
            {"dst": "0.0.0.0/0", "priority": 50, "mtu": 1400, "table": 7, "scope": 0, "advmss": 1360},
            {"to": "0.0.0.0/0", "via": "10.1.0.1", "metric": 50, "mtu": 1400, "table": 7},
        ),
    ],
)
def test_routes(route: dict[str, Any], expected: dict[str, Any]) -> None:
    assert card(ips=IPS, routes=[route])["routes"] == [expected]


def test_a_route_without_any_gateway_is_on_the_link() -> None:
    routes = card(ips=[{"address": "10.1.0.5/24"}], routes=[{"dst": "10.9.0.0/16"}])["routes"]
    assert routes == [{"to": "10.9.0.0/16", "scope": "link"}]


@pytest.mark.parametrize(
    ("dns", "expected"),
    [
        (None, None),
        ({}, None),
        ({"nameservers": []}, None),
        ({"nameservers": ["10.1.0.1"]}, {"addresses": ["10.1.0.1"]}),
        ({"domain": "a.example"}, {"search": ["a.example"]}),
        (
            {"nameservers": ["::1"], "domain": "a.example", "search": ["b.example"]},
            {"addresses": ["::1"], "search": ["b.example"]},
        ),
    ],
)
def test_nameservers(dns: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
    assert card(ips=IPS, dns=dns).get("nameservers") == expected


def test_each_attachment_is_found_by_its_mac() -> None:
    config = seed.network_config([record(), record(ifname="net2", mac="02:00:00:00:00:02")])
    macs = {name: entry["match"]["macaddress"] for name, entry in config["ethernets"].items()}
    assert macs == {"net1": MAC, "net2": "02:00:00:00:00:02"}
