"""Who holds an attachment, in the file and in the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.agent.holders import Holders
from cni.agent.peer import Process, start_time
from cni.errors import CniError
from cni.spec import DEVICE_BUSY
from cni.state.record import boot_id
from cni.state.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def process() -> Iterator[Process]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as made:
        yield Process(made.pid, start_time(made.pid))


@contextmanager
def holders(folder: Path) -> Iterator[Holders]:
    made = Holders(Store(folder))
    made.start()
    try:
        yield made
    finally:
        made.stop()


def noted(folder: Path, id: str = "a") -> list[int]:
    boot, entries = json.loads((folder / "holders" / id).read_text())
    assert boot == boot_id()
    return [pid for pid, _ in entries]


def test_one_at_a_time_unless_shared(tmp_path: Path) -> None:
    with holders(tmp_path) as held, process() as one, process() as two:
        assert held.add("a", "net1", one, shared=False)
        for again in (one, two):
            with pytest.raises(CniError, match="net1 is held") as caught:
                held.add("a", "net1", again, shared=False)
            assert caught.value.code == DEVICE_BUSY
        assert held.add("b", "net2", two, shared=False)
        assert held.add("a", "net1", two, shared=True)
        assert not held.add("a", "net1", two, shared=True)
        assert noted(tmp_path) == [one.pid, two.pid]
        held.remove("a", one)
        assert noted(tmp_path) == [two.pid]
        held.remove("a", two)
        assert held.add("a", "net1", one, shared=False)


@pytest.mark.parametrize(
    "text",
    [
        '["another boot", [[1, 1]]]',
        f'["{boot_id()}", [[1, 12345]]]',  # pid 1 is another process
        f'["{boot_id()}", [[4194305, 1]]]',  # no pid
        "",
        "{}",
        '["x", 5]',
    ],
)
def test_what_an_agent_left_of_the_dead_is_removed(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "holders"
    folder.mkdir()
    (folder / "a").write_text(text)
    (folder / "b.new").write_text("[")
    with holders(tmp_path):
        assert not list(folder.iterdir())


def test_a_hundred_threads_and_one_attachment(tmp_path: Path) -> None:
    with holders(tmp_path) as held, process() as one:
        won: list[int] = []

        def try_it(number: int) -> None:
            try:
                held.add("a", "net1", one, shared=False)
            except CniError:
                return
            won.append(number)

        threads = [threading.Thread(target=try_it, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_one_process_that_holds_one_attachment_after_the_other_costs_no_fds(tmp_path: Path) -> None:
    """As a VM does, whose NICs come and go while it runs."""
    with holders(tmp_path) as held, process() as one:
        for number in range(100):
            assert held.add(f"a{number}", "net1", one, shared=False)
            assert held.add(f"b{number}", "net2", one, shared=False)
            if number == 0:
                before = len(os.listdir("/proc/self/fd"))
            for id in (f"a{number}", f"b{number}"):
                (tmp_path / "holders" / id).unlink()  # as Store.forget_id does
        assert held.add("last", "net1", one, shared=False)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert noted(tmp_path, "last") == [one.pid]


def test_a_file_that_cannot_be_written_gives_nothing(tmp_path: Path) -> None:
    with holders(tmp_path) as held, process() as one:
        (tmp_path / "holders" / "a.new").mkdir()
        with pytest.raises(CniError, match="cannot be recorded"):
            held.add("a", "net1", one, shared=False)
