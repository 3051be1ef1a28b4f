"""plan.py: the device, MAC and MTU of an ADD, decided on a real node without touching it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cni.attach import plan
from cni.config import netconf
from cni.config.policy import Functions, Grant
from cni.errors import CniError
from cni.kernel.rtnl import Rtnl
from cni.kernel.vf_settings import VfSettings
from cni.spec import INVALID_NETWORK_CONFIG, SOURCE_MISSING

if TYPE_CHECKING:
    from lab.wire import Lab


def _unlisted(source: str, *listed: str) -> Grant:
    """Of a policy with allowUnlisted, whose entries name the listed devices."""
    return Grant(None, source, None, "bridge", "ethernet", listed=frozenset(listed))


def _decide(  # noqa: PLR0917
    lab: Lab,
    source: str | None,
    mode: str | None = "bridge",
    device: str | None = None,
    type: str = "ethernet",
    grant: Grant | None = None,
    **conf: Any,
) -> plan.Plan:
    document = {"cniVersion": "1.1.0", "name": "wire", "type": "vmtap", **conf}
    parsed = netconf.parse(json.dumps(document).encode())
    with lab.node.call(Rtnl) as host:
        return plan.decide(
            host.link(name=source) if source else None,
            parsed,
            grant or Grant(None, source, device, mode, type),
            "c1",
            "net1",
            arguments={},
        )


@pytest.mark.parametrize(
    ("source", "mode", "device"),
    [
        ("eth1", "bridge", "macvtap"),
        ("eth1", "vepa", "macvtap"),
        ("eth1", "pepa", "macvtap"),
        ("br0", "bridge", "tap"),
        ("br0", "vepa", "macvtap"),
        ("br0", "pepa", "macvtap"),
        (None, None, "tap"),
    ],
)
def test_a_blank_device_follows_source_and_mode(
    lab: Lab, source: str | None, mode: str | None, device: str
) -> None:
    assert _decide(lab, source, mode).device == device


def test_a_device_that_is_named_is_taken(lab: Lab) -> None:
    assert _decide(lab, "br0", "bridge", "macvtap").device == "macvtap"
    assert _decide(lab, "br0", "pepa", "tap").device == "tap"


@pytest.mark.parametrize(
    ("grant", "said"),
    [
        ({"source": "eth1", "device": "tap"}, "is no Linux bridge"),
        ({"source": "br0", "mode": "vepa", "device": "tap"}, "mode vepa"),
        ({"source": None, "device": "macvtap"}, "needs an interface or a source"),
        ({"source": "lo"}, "is not an Ethernet device"),
        ({"source": "eth1", "mtu": 1501}, "more than the 1500 of source device 'eth1'"),
    ],
)
def test_what_cannot_be_is_refused(lab: Lab, grant: dict[str, Any], said: str) -> None:
    with pytest.raises(CniError, match=said) as refused:
        _decide(lab, **grant)
    assert refused.value.code == INVALID_NETWORK_CONFIG


@pytest.mark.parametrize("listed", ["eth1", "other"])
@pytest.mark.parametrize("source", ["eth1", "uplink"])
def test_another_name_does_not_get_round_an_entry(lab: Lab, source: str, listed: str) -> None:
    """With allowUnlisted: an entry for one of the device's names is an entry for the device."""
    lab.node.ip("link property add dev eth1 altname uplink altname other")
    with pytest.raises(CniError, match=f"'{source}' is another name of '{listed}'"):
        _decide(lab, source, grant=_unlisted(source, listed, "eth9"))


def test_an_altname_is_a_source(lab: Lab) -> None:
    lab.node.ip("link property add dev eth1 altname uplink")
    made = _decide(lab, "uplink", grant=_unlisted("uplink", "eth9")).source
    assert made is not None
    assert (made.name, made.altnames) == ("eth1", ("uplink",))


def test_an_altname_of_a_pf_is_refused(lab: Lab) -> None:
    lab.node.ip("link property add dev eth1 altname uplink")
    pool = Functions(("uplink",), None, VfSettings())
    with pytest.raises(CniError, match="'uplink' is another name of 'eth1': use that"):
        _decide(lab, "uplink", grant=Grant("vf", "uplink", None, "bridge", "sr-iov", pool))


def test_a_source_that_is_not_there_is_named(lab: Lab) -> None:
    with pytest.raises(CniError, match="'eth9' is not on this node") as refused:
        _decide(lab, "eth9")
    assert refused.value.code == SOURCE_MISSING


def test_mtu_and_mac_have_their_defaults(lab: Lab) -> None:
    lab.node.ip("link set eth1 mtu 1400")
    made = _decide(lab, "eth1")
    assert (made.mtu, _decide(lab, "eth1", mtu=1000).mtu, _decide(lab, None, None).mtu) == (1400, 1000, 1500)
    assert made.mac == _decide(lab, "eth1").mac
    assert _decide(lab, "eth1", mac="02:00:00:00:00:0A").mac == "02:00:00:00:00:0a"


def test_no_handover_on_a_device_of_another_namespace(lab: Lab) -> None:
    """The kernel puts the macvtap on the lower device of a macvlan, and the agent listens in its own namespace."""
    outer = lab.pod("outer")
    outer.ip(
        "link add nic0 up type veth peer name nic1",
        f"link add link nic0 name mv0 netns {lab.node.path} type macvlan mode bridge",
    )
    lab.node.ip("link add link eth1 name mv1 type macvlan mode bridge")
    assert [_decide(lab, source).handover for source in ("eth1", "mv1", "mv0")] == [True, True, False]
