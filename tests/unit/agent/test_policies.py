"""policies.py: the file, DP_MACVTAP_CONF and what was found beside it; none of them widens another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cni.agent.policies import Policies, interfaces
from cni.config.mac import PLAIN, Derivation
from cni.config.policy import Interface
from cni.errors import CniError

if TYPE_CHECKING:
    from pathlib import Path

CONF = json.dumps([{"name": "a", "lowerDevice": "eth1", "mode": "private", "capacity": 5}])


def _names(policies: Policies) -> list[str]:
    policy = policies()
    assert policy
    return [entry.name for entry in policy.interfaces]


def test_what_the_variable_says() -> None:
    assert interfaces(CONF) == (Interface("a", "eth1", "ethernet", ("pepa",), 5),)
    assert interfaces('[{"name": "b", "lowerDevice": "eth2"}]') == (
        Interface("b", "eth2", "ethernet", ("bridge",), 100),
    )
    assert interfaces("[]") == ()


@pytest.mark.parametrize(
    ("conf", "why"),
    [
        ("", "Expecting value"),
        ("null", "not allowed"),
        ('[{"name": "a", "lowerDevice": "eth1", "mode": "passthru"}]', "mode"),
        ('[{"name": "a", "lowerDevice": "eth1", "capacity": 0}]', "capacity"),
        ('[{"name": "a", "lowerDevice": "eth1", "capacity": 4097}]', "4096"),
        ('[{"name": "a/b", "lowerDevice": "eth1"}]', "name"),
        ('[{"name": "a", "lowerdevice": "eth1"}]', "lowerDevice"),
        (json.dumps(2 * json.loads(CONF)), "twice"),
        ("[" * 100_000, "DP_MACVTAP_CONF"),
    ],
)
def test_what_it_may_not_say(conf: str, why: str) -> None:
    with pytest.raises(CniError, match=why) as refused:
        interfaces(conf)
    assert refused.value.code == 7
    assert refused.value.msg.startswith("DP_MACVTAP_CONF: ")


def test_without_it_there_is_the_file_only(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file))
    assert policies() is None
    assert not policies.discovers
    file.write_text("interfaces: [{name: f, source: {dev: eth1}}]")
    assert _names(policies) == ["f"]


def test_what_it_names_restricts_like_a_file(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file), CONF)
    policy = policies()
    assert policy
    assert not policy.allow_unlisted
    assert _names(policies) == ["a"]
    file.write_text(
        "{interfaces: [{name: a, source: {dev: eth9}}, {name: f, source: {dev: eth1}}], allowUnlisted: true}"
    )
    policy = policies()
    assert policy
    assert [(entry.name, entry.dev) for entry in policy.interfaces] == [("a", "eth9"), ("f", "eth1")]
    assert policy.allow_unlisted, "the file's word"
    file.write_text("interfaces: 7")
    assert _names(policies) == ["a", "f"], "the last good one"
    file.unlink()
    assert _names(policies) == ["a"]


def test_what_is_found_widens_nothing_that_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file), "[]")
    assert policies.discovers
    assert policies() is None
    policies.discovered(["eth1", "eth2"])
    policy = policies()
    assert policy
    assert policy.allow_unlisted, "nothing was named: as without a file"
    assert policy.interfaces[0] == Interface("eth1", "eth1", "ethernet", None, None)
    file.write_text(
        "interfaces: [{name: mine, source: {dev: eth1}, modes: [vepa]}, {name: eth2, source: {dev: eth7}}]"
    )
    policies.discovered(["eth1", "eth2", "eth3"])
    assert _names(policies) == ["mine", "eth2", "eth3"]
    policy = policies()
    assert policy
    assert not policy.allow_unlisted
    policies.discovered([])
    assert _names(policies) == ["mine", "eth2"]


@pytest.mark.parametrize("conf", [None, CONF, "[]"])
def test_the_files_derivation_of_macs_stays(tmp_path: Path, conf: str | None) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file), conf)
    file.write_text("{macSeed: s, macPrefix: '02:ab:cd'}")
    policies.discovered(["eth7"] if policies.discovers else [])
    policy = policies()
    assert policy
    assert policy.derivation == Derivation("s", "02:ab:cd")
    file.unlink()
    policy = policies()
    assert policy is None or policy.derivation == PLAIN


def test_a_first_file_that_is_bad_is_no_leave_for_anything(tmp_path: Path) -> None:
    (tmp_path / "interfaces.yaml").write_text("interfaces: 7")
    policies = Policies(str(tmp_path / "interfaces.yaml"), CONF)
    policies.discovered(["eth1"])
    with pytest.raises(CniError):
        policies()
