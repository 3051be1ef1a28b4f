"""A file is written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cni.state import files

if TYPE_CHECKING:
    from pathlib import Path


def test_the_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"two"):
        files.replace(str(path), data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace(str(path), b"data")
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_set_even_on_a_temporary_file_that_was_left(tmp_path: Path) -> None:
    path, left = tmp_path / "file", tmp_path / "half"
    left.write_bytes(b"a longer text of a process that was killed")
    left.chmod(0o600)
    files.replace(str(path), b"new", temporary=str(left), mode=0o400)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o400
    assert list(tmp_path.iterdir()) == [path]
