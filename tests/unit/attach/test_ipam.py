"""ipam.py: a delegate is found where it may be, told everything, and believed only as far as the spec does."""

from __future__ import annotations

import json
import os
import select
from typing import TYPE_CHECKING

import pytest

from cni.attach.ipam import Delegate
from cni.errors import CniError
from cni.spec import DECODING_FAILURE, DELEGATE_FAILED, INVALID_ENVIRONMENT, INVALID_NETWORK_CONFIG
from tests.fakeipam import FakeIpam
from tests.hanging import deadline_after
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def delegate(tmp_path: Path) -> Callable[..., Delegate]:
    """Makes a delegate of a shell script."""
    fake = FakeIpam(tmp_path)

    def make(script: str, *, seconds: float = 20, config: bytes = b'{"name": "wire"}') -> Delegate:
        fake.script(script)
        env = {
            "PATH": os.environ["PATH"],
            "CNI_PATH": f"/nowhere:{tmp_path}",
            "CNI_COMMAND": "x",
            "OUT": str(tmp_path),
        }
        return Delegate("fake", config, env, seconds)

    return make


def test_it_gets_the_config_and_the_environment(delegate: Callable[..., Delegate], tmp_path: Path) -> None:
    made = delegate('cat > "$OUT/config"; env > "$OUT/env"; echo "{}"')
    assert made.run("ADD", CNI_IFNAME="net7") == {}
    assert (tmp_path / "config").read_bytes() == b'{"name": "wire"}'
    seen = (tmp_path / "env").read_text().splitlines()
    assert {"CNI_COMMAND=ADD", "CNI_IFNAME=net7", f"OUT={tmp_path}"} <= set(seen)


def test_only_add_has_an_answer(delegate: Callable[..., Delegate]) -> None:
    assert delegate("echo junk").run("DEL") is None


def test_it_need_not_read_its_config(delegate: Callable[..., Delegate]) -> None:
    assert delegate('exec 0<&-; echo "{}"', config=bytes(1 << 20)).run("ADD") == {}


def test_its_error_is_passed_on(delegate: Callable[..., Delegate]) -> None:
    said = json.dumps({"code": 11, "msg": "pool is empty", "details": "10.1.0.0/24"})
    with pytest.raises(CniError, match="pool is empty") as refused:
        delegate(f"echo '{said}'; exit 1").run("ADD")
    assert (refused.value.code, refused.value.details) == (11, "10.1.0.0/24")


@pytest.mark.parametrize("said", ["junk", "", '{"code": "7"}', '{"code": true, "msg": 1}', "[]", "[" * 10000])
def test_an_error_that_is_none_is_ours(delegate: Callable[..., Delegate], said: str) -> None:
    with pytest.raises(CniError, match="no CNI error") as refused:
        delegate(f"printf '%s' '{said}'; exit 3").run("ADD")
    assert refused.value.code == DELEGATE_FAILED


@pytest.mark.parametrize("said", ["junk", "", "[]", "7", "[" * 10000])
def test_a_result_that_is_none_is_refused(delegate: Callable[..., Delegate], said: str) -> None:
    with pytest.raises(CniError, match="no CNI result") as refused:
        delegate(f"printf '%s' '{said}'").run("ADD")
    assert refused.value.code == DECODING_FAILURE


def test_one_that_hangs_is_killed_with_its_children(
    delegate: Callable[..., Delegate], tmp_path: Path
) -> None:
    made = delegate('sleep 60 & echo $! > "$OUT/child"; touch "$OUT/hangs"; wait', seconds=0.2)
    with (
        deadline_after(tmp_path / "hangs"),
        pytest.raises(CniError, match=r"did not finish ADD in 0\.2 s") as refused,
    ):
        made.run("ADD")
    assert refused.value.code == DELEGATE_FAILED
    child = int((tmp_path / "child").read_text())
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:  # gone already
        return
    try:
        assert select.select([pidfd], [], [], LIMIT)[0], "the child lives on"
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("type", ["../fake", "/bin/true", "a/b", ".", "..", "", "nul\0"])
def test_a_type_is_a_name(type: str) -> None:
    with pytest.raises(CniError, match="without a path") as refused:
        Delegate(type, b"", {"CNI_PATH": "/usr/bin"}, 1).run("ADD")
    assert refused.value.code == INVALID_NETWORK_CONFIG


def test_only_the_folders_of_cni_path_count() -> None:
    with pytest.raises(CniError, match="is not in CNI_PATH") as refused:
        Delegate("true", b"", {"CNI_PATH": "/nowhere", "PATH": "/usr/bin"}, 1).run("ADD")
    assert refused.value.code == INVALID_NETWORK_CONFIG
    with pytest.raises(CniError, match="CNI_PATH is empty") as refused:
        Delegate("true", b"", {}, 1).run("ADD")
    assert refused.value.code == INVALID_ENVIRONMENT
