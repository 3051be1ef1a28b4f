"""vf.py against a real driver: what is set is read back, with ip(8) as the second opinion."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import vf
from cni.kernel.rtnl import Rtnl
from cni.kernel.vf_settings import ETH_P_8021AD, ETH_P_8021Q, VfSettings

if TYPE_CHECKING:
    from lab.hw import Root
    from tests.hw.nic import Nic


def _index(host: Rtnl, name: str) -> int:
    link = host.link(name=name)
    assert link
    return link.index


def test_every_setting_that_the_driver_has(node: Root, bare: Nic) -> None:
    bare.make_vfs(2)
    node.wait_until_up(bare.pf)  # making them resets the NIC, and this one limits no rate without a carrier
    wanted = VfSettings(
        mac="02:00:00:00:00:21", vlan=(100, 3, ETH_P_8021Q), spoofchk=0, trust=1, rate=(0, 200)
    )
    with Rtnl() as host:
        pf = _index(host, bare.pf)
        before = vf.settings(host, pf)
        assert vf.change(host, pf, 1, wanted) == {}
        after = vf.settings(host, pf)
    assert after == {0: before[0], 1: replace(before[1], **wanted.given())}
    seen = bare.settings()[1]
    assert (seen["address"], seen["vlan_list"]) == (wanted.mac, [{"vlan": 100, "qos": 3}])
    assert (seen["spoofchk"], seen["trust"], seen["rate"]["max_tx"]) == (False, True, 200)


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("vlan", (100, 0, ETH_P_8021AD), errno.EPROTONOSUPPORT),
        ("rate", (10, 100), errno.EINVAL),
        ("link_state", 1, errno.EOPNOTSUPP),
    ],
)
def test_a_setting_that_the_driver_has_not_is_refused_by_itself(
    bare: Nic, name: str, value: Any, number: int
) -> None:
    bare.make_vfs(1)
    with Rtnl() as host:
        pf = _index(host, bare.pf)
        refused = vf.change(host, pf, 0, VfSettings(**{name: value, "trust": 1}))
        assert vf.settings(host, pf)[0].trust == 1
    assert {name: said.errno for name, said in refused.items()} == {name: number}


def test_a_nic_without_switch_modes_says_so(bare: Nic) -> None:
    with Rtnl() as host:
        pf = _index(host, bare.pf)
        assert vf.switch_mode(host, pf) is None
        with pytest.raises(OSError, match="not supported") as refused:
            vf.set_switch_mode(host, pf, vf.SWITCH_MODES["vepa"])
    assert refused.value.errno == errno.EOPNOTSUPP
