"""offload.py: what a NIC without it says; and one with it, which no test machine has, faked at ethtool.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cni.errors import CniError
from cni.kernel import ethtool
from cni.lower import offload


@pytest.fixture
def nic(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """The fake: a device with features that can be switched, all off."""
    state = {offload.FEATURE: False}
    monkeypatch.setattr(ethtool, "features", lambda _: dict(state))
    monkeypatch.setattr(ethtool, "can", lambda _, feature: feature in state)
    monkeypatch.setattr(ethtool, "switch", lambda _, feature, on: state.update({feature: on}))
    return state


def test_a_device_without_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CniError, match="has no l2-fwd-offload") as refused:
        offload.switch_on(str(tmp_path), "lo")
    assert refused.value.code == 7
    assert list(tmp_path.iterdir()) == []


def test_it_is_switched_on_and_back_for_who_uninstalls(nic: dict[str, bool], tmp_path: Path) -> None:
    for _ in range(2):
        offload.switch_on(str(tmp_path), "lo")
        assert nic[offload.FEATURE]
    assert offload.restore(str(tmp_path)) == ["lo"]
    assert not nic[offload.FEATURE]
    assert offload.restore(str(tmp_path)) == []


def test_what_was_on_stays_on(nic: dict[str, bool], tmp_path: Path) -> None:
    nic[offload.FEATURE] = True
    offload.switch_on(str(tmp_path), "lo")
    assert offload.restore(str(tmp_path)) == []
    assert nic[offload.FEATURE]


def test_a_feature_that_cannot_be_had_is_refused_by_the_kernel() -> None:
    assert not ethtool.can("lo", offload.FEATURE)
    with pytest.raises(OSError, match=r"stays as it is|not supported|Invalid"):
        ethtool.switch("lo", offload.FEATURE, True)


def test_subordinates_are_counted(tmp_path: Path) -> None:
    """As sysfs shows them: class, and for a queue of a subordinate its number after it."""
    for name, shown in {"tx-0": "0", "tx-1": "0-1", "tx-2": "0-1", "tx-3": "0-2", "rx-0": ""}.items():
        (tmp_path / name).mkdir()
        if shown:
            (tmp_path / name / "traffic_class").write_text(f"{shown}\n")
    assert len(offload.subordinates(str(tmp_path))) == 2
    assert offload.taken("lo") == 0
