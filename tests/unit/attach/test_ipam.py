"""ipam.py: a delegate is found where it may be, told everything, and believed only as far as the spec does."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from cni.attach.ipam import OUTPUT_LIMIT, Delegate
from cni.errors import CniError
from cni.kernel import execute
from cni.spec import DECODING_FAILURE, DELEGATE_FAILED, INVALID_ENVIRONMENT, INVALID_NETWORK_CONFIG
from tests.fakeipam import FakeIpam
from tests.hanging import deadline_after, living
from tests.waiting import until

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
    assert made.run("ADD") == {}
    assert (tmp_path / "config").read_bytes() == b'{"name": "wire"}'
    seen = (tmp_path / "env").read_text().splitlines()
    assert {"CNI_COMMAND=ADD", "VMTAP_DELEGATED=1", f"OUT={tmp_path}"} <= set(seen)


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


@pytest.mark.parametrize("child", ["sleep 3600", "setsid sleep 3600", "(trap '' TERM; setsid sleep 3600 &)"])
def test_one_that_hangs_is_killed_with_its_children(
    delegate: Callable[..., Delegate], tmp_path: Path, child: str
) -> None:
    made = delegate(f'{child} & touch "$OUT/hangs"; wait; sleep 3600', seconds=0.2)
    with (
        deadline_after(tmp_path / "hangs"),
        pytest.raises(CniError, match=r"did not finish ADD in 0\.2 s") as refused,
    ):
        made.run("ADD")
    assert refused.value.code == DELEGATE_FAILED
    until(lambda: living(tmp_path), "what it started lives on", lambda pids: not pids)


@pytest.mark.parametrize("shim", [True, False])
def test_one_that_ends_before_its_children(
    delegate: Callable[..., Delegate], tmp_path: Path, *, shim: bool
) -> None:
    """They keep its pipes open, which delays nobody. Where no shim was built, one in its own session lives on."""
    made = delegate('setsid sleep 3600 & (setsid sleep 3600 &) ; sleep 3600 & echo "{}"', seconds=3600)
    with mock.patch.object(execute, "_SHIM", execute._SHIM if shim else "/nonexistent"):
        assert made.run("ADD") == {}
    left = until(lambda: living(tmp_path), "what it started lives on", lambda pids: shim <= (not pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def test_one_whose_supervisor_is_killed(delegate: Callable[..., Delegate], tmp_path: Path) -> None:
    """It ends with it, or it could lease an address after its DEL. What it has started itself may live on."""
    made = delegate("kill -KILL $PPID; exec sleep 3600", seconds=3600)
    with pytest.raises(CniError, match="failed ADD") as refused:
        made.run("ADD")
    assert refused.value.code == DELEGATE_FAILED
    until(lambda: living(tmp_path), "it lives on", lambda pids: not pids)


def test_one_that_is_no_program(delegate: Callable[..., Delegate], tmp_path: Path) -> None:
    made = delegate("")
    (tmp_path / "fake").write_text("#!/nonexistent\n")
    with pytest.raises(CniError, match="cannot be executed") as refused:
        made.run("ADD")
    assert refused.value.code == DELEGATE_FAILED


def test_one_that_prints_without_end_is_killed(
    delegate: Callable[..., Delegate], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it prints is not kept beyond the limit, and of its stderr less."""
    tracemalloc.start()
    try:
        with pytest.raises(CniError, match="printed more than 256 KiB for ADD and was killed") as refused:
            delegate("yes >&2 & sleep 0.1; exec yes", seconds=3600).run("ADD")
        assert tracemalloc.get_traced_memory()[1] < 8 * OUTPUT_LIMIT
    finally:
        tracemalloc.stop()
    assert refused.value.code == DELEGATE_FAILED
    assert len(capfd.readouterr().err) <= 1 << 14
    until(lambda: living(tmp_path), "what it started lives on", lambda pids: not pids)


def test_its_stderr_is_passed_on_without_escapes(
    delegate: Callable[..., Delegate], capfd: pytest.CaptureFixture[str]
) -> None:
    delegate(r"printf 'a\033[2Jb\377\n' >&2; echo '{}'").run("ADD")
    assert capfd.readouterr().err == "a\\u001b[2Jb\\xff\n"


@pytest.mark.parametrize("how", ["vmtap", "macvtap", "symlink", "hard link", "another folder's"])
def test_it_is_not_vmtap_itself(tmp_path: Path, how: str) -> None:
    own, other = tmp_path / "bin/vmtap", tmp_path / "other"
    own.parent.mkdir()
    other.mkdir()
    own.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    own.chmod(0o755)
    match how:
        case "symlink":
            (own.parent / "other").symlink_to(own)
        case "hard link":
            (own.parent / "other").hardlink_to(own)
        case "another folder's":
            (other / "other").hardlink_to(own)
    type = how if "vtap" in how or how == "vmtap" else "other"
    made = Delegate(type, b"", {"CNI_PATH": f"{other}:{own.parent}"}, 1)
    for command in ("ADD", "CHECK", "STATUS"):
        with pytest.raises(CniError, match="is vmtap itself; give an IPAM plugin") as refused:
            made.run(command)
        assert refused.value.code == INVALID_NETWORK_CONFIG
    assert made.run("DEL") is made.run("GC") is None
    assert not (tmp_path / "ran").exists()


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
