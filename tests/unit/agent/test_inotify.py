"""inotify.py: what happens in a folder is told, whether it is there from the start, comes, goes or is replaced."""

from __future__ import annotations

import select
from contextlib import closing
from typing import TYPE_CHECKING

from cni.agent.inotify import Folders

if TYPE_CHECKING:
    from pathlib import Path


def _told(folders: Folders) -> bool:
    """Events are there when the call that caused them has returned."""
    ready = bool(select.select([folders], [], [], 0)[0])
    folders.take()
    folders.take()  # what the end of a watch has to say
    assert not select.select([folders], [], [], 0)[0], "taken"
    return ready


def test_files(tmp_path: Path) -> None:
    with closing(Folders([str(tmp_path)])) as folders:
        assert not _told(folders)
        (tmp_path / "a").write_text("1")
        assert _told(folders)
        (tmp_path / "a").write_text("2")
        assert _told(folders)
        (tmp_path / "a").chmod(0o600)
        assert _told(folders)
        (tmp_path / "a").rename(tmp_path / "b")
        assert _told(folders)
        (tmp_path / "b").unlink()
        assert _told(folders)
        (tmp_path / "c").mkdir()
        assert _told(folders)
        (tmp_path / "c" / "d").touch()
        assert not _told(folders), "not ours"


def test_a_folder_that_comes_goes_and_comes_again(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b" / "c"
    with closing(Folders([str(wanted), str(tmp_path / "else")])) as folders:
        for _ in range(3):
            (tmp_path / "a").mkdir()
            assert _told(folders)
            (wanted.parent).mkdir()
            assert _told(folders)
            wanted.mkdir()
            assert _told(folders)
            (wanted / "file").touch()
            assert _told(folders)
            (wanted / "file").unlink()
            assert _told(folders)
            wanted.rmdir()
            assert _told(folders)
            wanted.parent.rmdir()
            assert _told(folders)
            wanted.parent.parent.rmdir()
            assert _told(folders)


def test_a_folder_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "new").mkdir()
    with closing(Folders([str(tmp_path / "a")])) as folders:
        (tmp_path / "a").rename(tmp_path / "old")
        assert _told(folders)
        (tmp_path / "new").rename(tmp_path / "a")
        assert _told(folders)
        (tmp_path / "old" / "file").touch()
        assert not _told(folders)
        (tmp_path / "a" / "file").touch()
        assert _told(folders)


def test_a_file_where_the_folder_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with closing(Folders([str(tmp_path / "a" / "b")])) as folders:
        (tmp_path / "a").unlink()
        assert _told(folders)
        (tmp_path / "a").mkdir()
        assert _told(folders)
