"""vf_choice.py on an embedded switch with modes: no emulated NIC has one, so kernel/vf.py is faked (see tests/hw)."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError
from cni.kernel import vf
from cni.kernel.rtnl import Link, Rtnl
from cni.kernel.vf_settings import VfSettings
from cni.lower import vf_choice
from cni.state.record import Record, VfLink, VirtualFunction, boot_id
from cni.state.store import Store

if TYPE_CHECKING:
    from pathlib import Path

PF = Link(index=7, name="pf0", arphrd=1, flags=0, mac="02:00:00:00:00:01", mtu=1500)
RECORD = Record(
    network="wire",
    container_id="c1",
    ifname="net1",
    netns="/run/netns/c1",
    netns_id=(4, 1),
    nsid=1,
    device="macvtap",
    ifindex=0x10000000,
    mac="02:00:00:00:00:02",
    mtu=1500,
    queues=1,
    boot_id=boot_id(),
    source="pf0",
    mode="bridge",
    vf=VirtualFunction(
        pci="0000:01:10.0",
        number=0,
        driver="igbvf",
        before=VfSettings(),
        made=VfSettings(),
        link=VfLink("02:00:00:00:00:03", 1500, 0, "", ipv6=True, pinned=False),
    ),
)


class Switch:
    """The fake: an embedded switch that is in one mode and takes each."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, mode: int | None, refusal: OSError | None = None
    ) -> None:
        self.mode = mode
        self.refusal = refusal
        monkeypatch.setattr(vf, "switch_mode", lambda _host, _pf: self.mode)
        monkeypatch.setattr(vf, "set_switch_mode", self.set)

    def set(self, _host: Rtnl, _pf: int, mode: int) -> None:
        if self.refusal:
            raise self.refusal
        self.mode = mode


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "state")
    made.prepare()
    return made


def _check(store: Store, mode: str) -> None:
    with Rtnl() as host:
        vf_choice.check_switch(host, store, PF, mode)


@pytest.mark.parametrize("mode", ["bridge", "vepa"])
def test_the_first_one_sets_the_mode(store: Store, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    switch = Switch(monkeypatch, 1 - vf.SWITCH_MODES[mode])
    _check(store, mode)
    assert switch.mode == vf.SWITCH_MODES[mode]


def test_another_mode_than_the_others_need_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Switch(monkeypatch, vf.SWITCH_MODES["bridge"])
    store.save(replace(RECORD, source="pf1", container_id="elsewhere"))
    store.save(RECORD)
    with pytest.raises(CniError, match="is in mode bridge for net1 of container c1") as refused:
        _check(store, "vepa")
    assert refused.value.code == 102
    assert switch.mode == vf.SWITCH_MODES["bridge"]
    _check(store, "bridge")


def test_a_switch_without_modes_is_a_bridge(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Switch(monkeypatch, None, OSError(errno.EOPNOTSUPP, "Operation not supported"))
    _check(store, "bridge")
    with pytest.raises(CniError, match="cannot put its embedded switch into it") as refused:
        _check(store, "vepa")
    assert refused.value.code == 7


def test_a_vf_that_has_the_mac_is_named_by_its_pod(store: Store) -> None:
    store.save(replace(RECORD, args="K8S_POD_NAMESPACE=prod;K8S_POD_NAME=virt-launcher-db-x7k2p"))
    assert vf_choice.of_whom(store, "pf0", 0) == " of pod prod/virt-launcher-db-x7k2p (VM db)"
    assert vf_choice.of_whom(store, "pf0", 1) == vf_choice.of_whom(store, "pf1", 0) == ""
