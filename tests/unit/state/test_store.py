"""store.py: records that survive a kill whole, indexes that two attachments never share."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError
from cni.spec import IO_FAILURE
from cni.state.record import Record, alias, boot_id, identifier
from cni.state.store import IFINDEX_BASE, Store, in_netns

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD = Record(
    network="wire",
    container_id="c1",
    ifname="net1",
    netns="/run/netns/x",
    netns_id=(4, 4026532000),
    nsid=0,
    device="macvtap",
    ifindex=IFINDEX_BASE,
    mac="02:00:00:00:00:01",
    mtu=1500,
    queues=1,
    boot_id=boot_id(),
    ips=({"address": "10.1.0.5/24"},),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "state")
    made.prepare()
    return made


def _files(store: Store) -> list[str]:
    return sorted(
        str(path.relative_to(Path(store.folder)))
        for path in Path(store.folder).rglob("*")
        if not path.is_dir()
    )


def test_a_record_comes_back_as_it_went(store: Store) -> None:
    store.save(RECORD)
    assert store.load(RECORD.id) == RECORD
    assert list(store.records()) == [RECORD]
    store.forget(RECORD)
    assert store.load(RECORD.id) is None
    assert _files(store) == []


def test_the_folder_and_its_files_are_private(store: Store) -> None:
    store.save(RECORD)
    modes = {path.stat().st_mode & 0o077 for path in [Path(store.folder), *Path(store.folder).rglob("*")]}
    assert modes == {0}


def test_a_folder_that_others_may_write_is_closed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o777)
    (tmp_path / "state").chmod(0o777)
    Store(tmp_path / "state").prepare()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 1234, 1234)
    with pytest.raises(CniError, match="must be a directory of uid 0") as refused:
        Store(tmp_path / "state").prepare()
    assert refused.value.code == IO_FAILURE


def test_a_symlink_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CniError, match="must be a directory"):
        Store(tmp_path / "state").prepare()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"network": "wire"}', b"[" * 100_000],
    ids=["empty", "torn", "list", "null", "not UTF-8", "other keys", "deep"],
)
def test_what_cannot_be_understood_is_set_aside(store: Store, content: bytes) -> None:
    path = Path(store.folder) / "attachments" / f"{RECORD.id}.json"
    path.write_bytes(content)
    assert store.load(RECORD.id) is None
    assert list(store.records()) == []
    assert path.with_suffix(".bad").read_bytes() == content


def test_what_is_set_aside_is_told(store: Store) -> None:
    notes: list[str] = []
    path = Path(store.folder) / "attachments" / f"{RECORD.id}.json"
    path.write_bytes(b"torn")
    Store(store.folder, notes.append).load(RECORD.id)
    (note,) = notes
    assert str(path) in note and ".bad" in note


def test_a_record_under_anothers_name_is_set_aside(store: Store) -> None:
    store.save(RECORD)
    other = replace(RECORD, ifname="net2")
    os.rename(
        Path(store.folder) / "attachments" / f"{RECORD.id}.json",
        Path(store.folder) / "attachments" / f"{other.id}.json",
    )
    assert store.load(other.id) is None
    assert _files(store) == [f"attachments/{other.id}.bad"]


def test_another_boots_record_is_purged(store: Store) -> None:
    number = store.reserve_ifindex(RECORD.id)
    store.save(replace(RECORD, boot_id="an earlier one", ifindex=number))
    assert store.load(RECORD.id) is None
    assert _files(store) == []


def test_an_index_is_given_once_and_again_after_its_end(store: Store) -> None:
    first = store.reserve_ifindex("one")
    assert store.reserve_ifindex("one") == first >= IFINDEX_BASE
    assert list(store.reserved()) == [(first, "one")]
    os.unlink(Path(store.folder) / "ifindex" / str(first))
    os.symlink("somebody else", Path(store.folder) / "ifindex" / str(first))
    second = store.reserve_ifindex("one")
    assert second != first
    assert sorted(store.reserved()) == sorted([(first, "somebody else"), (second, "one")])
    store.forget_id("one")
    assert list(store.reserved()) == [(first, "somebody else")]


def test_a_record_is_sealed_when_its_add_is_through(store: Store) -> None:
    store.save(RECORD)
    assert not store.sealed(RECORD.id)
    store.seal(RECORD)
    assert store.sealed(RECORD.id)
    store.save(RECORD)  # another ADD of the same key
    assert not store.sealed(RECORD.id)


def test_a_record_of_another_version_is_understood(store: Store) -> None:
    path = Path(store.folder) / "attachments" / f"{RECORD.id}.json"
    older = {name: value for name, value in vars(RECORD).items() if name != "cni_path"}
    path.write_text(json.dumps({**older, "of a later version": 1}))
    assert store.load(RECORD.id) == RECORD


def test_adoption_wants_an_index_of_ours(store: Store) -> None:
    number = store.reserve_ifindex(RECORD.id)
    store.forget_id(RECORD.id)
    assert not store.adopt(replace(RECORD, ifindex=number + 1))
    assert _files(store) == []
    assert store.adopt(replace(RECORD, ifindex=number))
    assert store.sealed(RECORD.id)
    assert list(store.reserved()) == [(number, RECORD.id)]


def test_adoption_leaves_another_attachments_index(store: Store) -> None:
    number = store.reserve_ifindex(RECORD.id)
    store.release(number, RECORD.id)
    os.symlink("another", Path(store.folder) / "ifindex" / str(number))
    assert not store.adopt(replace(RECORD, ifindex=number))
    assert store.load(RECORD.id) is None


def test_the_sweep_takes_only_nodes_without_an_index(store: Store) -> None:
    kept = store.reserve_ifindex(RECORD.id)
    dev = Path(store.folder) / "dev"
    for name in (f"tap{kept}", "tap77", "tap78.new", "tap79", "else"):
        (dev / name).touch()
    os.symlink("sweep", Path(store.folder) / "ifindex" / "77")  # one that was killed
    assert sorted(store.sweep_nodes(keep=[79])) == [77, 78]
    assert sorted(path.name for path in dev.iterdir()) == sorted(["else", f"tap{kept}", "tap79"])
    assert list(store.reserved()) == [(kept, RECORD.id)]


def test_a_writing_that_was_killed_is_found(store: Store) -> None:
    assert store.unfinished() == []
    (Path(store.folder) / "attachments" / "some-id.new").touch()
    assert store.unfinished() == ["some-id"]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with no room."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k,nr_inodes=8", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_file_system_is_an_error_that_leaves_nothing(full: Path) -> None:
    store = Store(full)
    store.prepare()
    with pytest.raises(OSError, match="No space"):
        (full / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(CniError, match="full or read-only") as refused:
        store.save(replace(RECORD, config={"name": "x" * 5000}))
    assert refused.value.code == IO_FAILURE
    assert list((full / "attachments").iterdir()) == []


def test_attachments_of_a_namespace(store: Store) -> None:
    second = replace(RECORD, ifname="net0")
    other = replace(RECORD, container_id="c2", netns_id=(4, 7))
    for record in (RECORD, second, other):
        store.save(record)
    assert in_netns(Path(store.folder), RECORD.netns_id) == [second, RECORD]
    assert in_netns(Path(store.folder), (1, 1)) == []
    assert in_netns(Path(store.folder) / "nowhere", (1, 1)) == []


def test_names_fit_and_differ() -> None:
    assert alias("wire", "c1", "net1") == "vmtap/wire/c1/net1"
    long = alias("wire", "c" * 300, "net1")
    assert len(long.encode()) < 256
    assert long != alias("wire", "c" * 301, "net1")
    assert len(identifier("n" * 500, "c" * 500, "net1")) < 64
    assert identifier("a", "b.c", "d") != identifier("a.b", "c", "d")


def test_marks_of_vms_that_run_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.prepare()
    store.sweep_elsewhere(())  # without the folder
    for id in ("a-1", "a-2", "a-3"):
        assert not store.is_elsewhere(id)
        store.set_elsewhere(id, True)
        store.set_elsewhere(id, True)
    store.set_elsewhere("a-1", False)
    store.set_elsewhere("a-1", False)
    store.sweep_elsewhere({"a-2"})
    assert [store.is_elsewhere(id) for id in ("a-1", "a-2", "a-3")] == [False, True, False]
    store.forget_id("a-2")
    assert not store.is_elsewhere("a-2")
