"""policies.py: the file, DP_MACVTAP_CONF and what was found beside it; none of them widens another."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from cni.agent.policies import Listed, Policies, interfaces
from cni.config.mac import Derivation
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
    assert interfaces(CONF).interfaces == (Interface("a", "eth1", "ethernet", ("pepa",), 5),)
    assert interfaces('[{"name": "b", "lowerDevice": "eth2"}]').interfaces == (
        Interface("b", "eth2", "ethernet", ("bridge",), 100),
    )
    assert interfaces("[]").everything
    assert interfaces("null").everything


@pytest.mark.parametrize("conf", ["", "{", "7", "{}", '"a"', "[" * 100_000])
def test_what_is_no_list(conf: str) -> None:
    with pytest.raises(CniError) as refused:
        interfaces(conf)
    assert refused.value.code == 7
    assert refused.value.msg.startswith("DP_MACVTAP_CONF: ")


@pytest.mark.parametrize(
    ("field", "mode", "capacity"),
    [
        ('"capacity": 0', "bridge", 100),
        ('"capacity": -1', "bridge", 100),
        ('"capacity": null, "mode": null', "bridge", 100),
        ('"mode": ""', "bridge", 100),
        ('"Mode": "private", "CAPACITY": 5, "comment": "the third port", "mtu": 9000', "pepa", 5),
        ('"master": "eth9", "mode": "vepa", "capacity": 5.0', "vepa", 5),
    ],
)
def test_it_is_read_as_macvtap_cni_reads_it(field: str, mode: str, capacity: int) -> None:
    listed = interfaces(f'[{{"NAME": "a", "lowerdevice": "eth1", {field}}}]')
    assert listed == Listed((Interface("a", "eth1", "ethernet", (mode,), capacity),), ())


def test_of_entries_with_one_name_the_last_counts() -> None:
    listed = interfaces('[{"name": "a", "lowerDevice": "eth1"}, {"name": "a", "lowerDevice": "eth2"}]')
    assert [each.dev for each in listed.interfaces] == ["eth2"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("null", r"\[1\]: .*null"),
        ("7", r"\[1\]: .*7"),
        ('{"name": "b", "lowerDevice": "eth1", "mode": "passthru"}', r"\[1\]\.mode: "),
        ('{"name": "b", "lowerDevice": "eth1", "capacity": 4097}', "4096"),
        ('{"name": "b", "lowerDevice": "eth1", "capacity": "50"}', r"\[1\]\.capacity: "),
        ('{"name": "a/b", "lowerDevice": "eth1"}', r"\[1\]\.name: "),
        ('{"lowerDevice": "eth1"}', r"\[1\]\.name: is missing"),
        ('{"name": "b"}', r"\[1\]\.lowerDevice: is missing"),
        ('{"name": "b", "master": "eth1"}', r'master: is called lowerDevice; give lowerDevice: "eth1"'),
    ],
)
def test_a_bad_entry_is_left_out(entry: str, why: str) -> None:
    listed = interfaces(f'[{{"name": "a", "lowerDevice": "eth1"}}, {entry}]')
    assert [each.name for each in listed.interfaces] == ["a"]
    assert len(listed.left_out) == 1
    assert re.search(why, listed.left_out[0]), listed.left_out
    assert not listed.everything


def test_bad_entries_alone_allow_nothing(tmp_path: Path) -> None:
    """They are no empty list, which would offer every link."""
    policies = Policies(str(tmp_path / "none"), '[{"name": "a"}]', required=True)
    assert not policies.discovers
    allowed = policies()
    assert allowed is not None
    assert (allowed.interfaces, allowed.allow_unlisted) == ((), False)


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
    assert _names(policies) == ["a", "f"], "the last good one"
    assert policies.error


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
    assert policy and policy.derivation == Derivation("s", "02:ab:cd")


GOOD = "interfaces: [{name: f, source: {dev: eth1}}]"


def _gone(file: Path, how: str) -> None:
    match how:
        case "removed":
            file.unlink()
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a dangling symlink":
            file.unlink()
            file.symlink_to(file.parent / "nothing")
        case "a FIFO":
            file.unlink()
            os.mkfifo(file)
        case "writable by others":
            file.chmod(0o666)
        case "its folder is gone":
            shutil.rmtree(file.parent)
        case "its folder is a file":
            shutil.rmtree(file.parent)
            file.parent.touch()
        case "its folder is a dangling symlink":
            shutil.rmtree(file.parent)
            file.parent.symlink_to("nowhere")
        case "torn":
            file.write_text(GOOD[:-3])


HOW = (
    *("removed", "a folder", "a dangling symlink", "a FIFO", "writable by others", "torn"),
    *("its folder is gone", "its folder is a file", "its folder is a dangling symlink"),
)


@pytest.mark.parametrize("conf", [None, CONF, "[]"])
@pytest.mark.parametrize("how", HOW)
def test_a_policy_that_goes_away_stays_in_force(tmp_path: Path, how: str, conf: str | None) -> None:
    file = tmp_path / "etc/interfaces.yaml"
    file.parent.mkdir()
    file.write_text(GOOD)
    policies = Policies(str(file), conf)
    before = policies()
    assert before and not before.allow_unlisted
    _gone(file, how)
    assert policies() == before
    assert policies.error and policies.error.code == 7
    assert policies() == before, "it stays"


@pytest.mark.parametrize("how", HOW)
def test_a_bad_policy_that_goes_away_does_not_open_the_node(tmp_path: Path, how: str) -> None:
    file = tmp_path / "etc/interfaces.yaml"
    file.parent.mkdir()
    file.write_text("interfaces: 7")
    policies = Policies(str(file))
    with pytest.raises(CniError):
        policies()
    _gone(file, how)
    with pytest.raises(CniError):
        policies()


@pytest.mark.parametrize("how", HOW[1:5])
def test_a_first_policy_that_is_bad_closes(tmp_path: Path, how: str) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file))
    assert policies() is None
    file.write_text(GOOD)
    _gone(file, how)
    with pytest.raises(CniError):
        policies()


def test_the_device_plugin_needs_a_policy(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    policies = Policies(str(file), required=True)
    with pytest.raises(CniError, match="does not exist: put it there"):
        policies()
    file.write_text(GOOD)
    assert _names(policies) == ["f"]
    assert _names(Policies(str(tmp_path / "none"), CONF, required=True)) == ["a"]


def test_an_empty_file_allows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    file.write_text(GOOD)
    policies = Policies(str(file))
    assert _names(policies) == ["f"]
    file.write_text("")
    policy = policies()
    assert policy and not policy.interfaces and not policy.allow_unlisted
    assert policies.error is None


def test_a_config_map_that_is_exchanged(tmp_path: Path) -> None:
    """As the kubelet's AtomicWriter does it: a new folder, and ..data is renamed over."""

    def put(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "interfaces.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    put("..1", GOOD)
    (tmp_path / "interfaces.yaml").symlink_to("..data/interfaces.yaml")
    policies = Policies(str(tmp_path / "interfaces.yaml"))
    assert _names(policies) == ["f"]
    put("..2", GOOD.replace("name: f", "name: g"))
    shutil.rmtree(tmp_path / "..1")
    assert _names(policies) == ["g"]
    (tmp_path / "..data").unlink()
    assert _names(policies) == ["g"]
    assert policies.error
    put("..3", GOOD)
    assert _names(policies) == ["f"]
    assert policies.error is None


def test_what_is_repaired_beside_the_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file looks the same after its folder's mode, or the disk, is repaired; and one log line a fault is enough."""
    file = tmp_path / "interfaces.yaml"
    file.write_text(GOOD)
    tmp_path.chmod(0o777)
    lines: list[str] = []
    monkeypatch.setattr("cni.agent.policies.log", lambda level, msg, **_: lines.append(msg))
    monkeypatch.setattr("cni.agent.policies._AGAIN_SECONDS", 0.0)
    policies = Policies(str(file))
    for _ in range(3):
        with pytest.raises(CniError, match="others may write"):
            policies()
    assert len(lines) == 1
    tmp_path.chmod(0o700)
    assert _names(policies) == ["f"]

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.read", fail)
        os.utime(file)
        assert _names(policies) == ["f"]
        assert "cannot be read" in str(policies.error)
    assert _names(policies) == ["f"]
    assert policies.error is None


def test_a_first_file_that_is_bad_is_no_leave_for_anything(tmp_path: Path) -> None:
    (tmp_path / "interfaces.yaml").write_text("interfaces: 7")
    policies = Policies(str(tmp_path / "interfaces.yaml"), CONF)
    policies.discovered(["eth1"])
    with pytest.raises(CniError):
        policies()
