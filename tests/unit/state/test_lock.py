"""lock.py: exclusion between threads and processes, and nothing left by a killed holder."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from cni.state import lock
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from pathlib import Path


def test_threads_exclude_each_other_by_name_only(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    order: list[str] = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with lock.held(file, "a"):
            order.append("second")

    with lock.held(file, "a"):
        thread = threading.Thread(target=second)
        thread.start()
        assert begun.wait(LIMIT)
        with lock.held(file, "b"):
            order.append("another name")
        thread.join(0.2)
        order.append("first")
    thread.join(LIMIT)
    assert order == ["another name", "first", "second"]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    script = (
        "import sys; from cni.state import lock\n"
        "with lock.held(sys.argv[1], 'a'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        with lock.held(file, "a"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_who_does_not_wait_is_told(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    with lock.held(file, "a", wait=False):
        with lock.held(file, "b", wait=False):
            pass
        with pytest.raises(BlockingIOError), lock.held(file, "a", wait=False):
            raise AssertionError("two holders")
    with lock.held(file, "a", wait=False):
        pass


def test_the_file_is_private(tmp_path: Path) -> None:
    with lock.held(str(tmp_path / "lock"), "a"):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_one_who_only_asks_takes_nothing(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    assert not lock.is_held(file, "a")
    assert not list(tmp_path.iterdir())
    with lock.held(file, "a"):
        assert lock.is_held(file, "a")
        assert not lock.is_held(file, "b")
    assert not lock.is_held(file, "a")
