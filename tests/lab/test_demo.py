"""The demo judges what it measured rightly; run as a whole it is as expected, and interrupted it leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lab.demo import reach
from lab.demo.__main__ import EXAMPLES
from lab.demo.cases import CASES, IFNAMES, Case, Outcome, Seen, as_expected
from lab.demo.ending import ENDING
from lab.demo.reach import _ping_again
from lab.demo.show import _cell
from tests.waiting import LIMIT

DEMO = [sys.executable, "-u", "-m", "lab.demo"]
GOOD = [(case, {kind: {"a": yes, "b": yes} for kind, yes in asdict(case.expected).items()}) for case in CASES]


def leftovers(pid: int) -> list[Path]:
    """What a demo with this process id left in the places where it makes things."""
    return list(Path("/run").glob(f"vmtap-*-{pid}-*"))


def spoiled(kind: str) -> list[tuple[Case, Seen]]:
    """The good rows, but one direction of one kind in the last row is not as expected."""
    case, seen = GOOD[-1]
    return [*GOOD[:-1], (case, {**seen, kind: {**seen[kind], "b": not seen[kind]["b"]}})]


def test_every_example_is_in_the_table() -> None:
    names = [json.loads(path.read_text())["name"] for path in (EXAMPLES / "net.d").glob("*.conflist")]
    assert sorted(names) == sorted(IFNAMES)


def test_as_expected() -> None:
    assert all(as_expected(case, seen) for case, seen in GOOD)
    assert Outcome(GOOD, [], [], 1.0).ok


@pytest.mark.parametrize("kind", list(asdict(CASES[0].expected)))
def test_one_direction_that_differs_spoils_the_row_and_the_outcome(kind: str) -> None:
    rows = spoiled(kind)
    assert not as_expected(*rows[-1])
    assert not Outcome(rows, [], [], 1.0).ok
    document = Outcome(rows, [], [], 1.0).document()
    assert [row["ok"] for row in document["rows"]] == [True] * (len(CASES) - 1) + [False]


def test_missing_rows_check_errors_and_leftovers_spoil_the_outcome() -> None:
    good = Outcome(GOOD, [], [], 1.0)
    assert not replace(good, rows=GOOD[1:]).ok
    assert not replace(good, check_errors=["no"]).ok
    assert not replace(good, left=["/run/x"]).ok


@pytest.mark.parametrize(
    ("expected", "reached", "text"),
    [
        (True, {"a": True, "b": True}, "yes / yes"),
        (False, {"a": False, "b": False}, "no / no"),
        (True, {"a": False, "b": False}, "yes ✗ no"),
        (False, {"a": True, "b": True}, "no ✗ yes"),
        (True, {"a": True, "b": False}, "yes ✗ a"),
    ],
)
def test_a_cell_shows_expected_and_observed(expected: bool, reached: dict[str, bool], text: str) -> None:
    assert _cell(expected, reached).plain == text


def test_who_should_answer_is_asked_again_and_who_should_not_have_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [case] = [
        case for case in CASES if (case.device, case.mode, case.reflecting) == ("macvtap", "pepa", True)
    ]
    [good] = [seen for each, seen in GOOD if each == case]
    late = {**good, "guest_unicast": {"a": False, "b": True}}
    answers = [{**late, "peer_unicast": {"a": False, "b": False}}, good, good]
    monkeypatch.setattr(reach, "_ping", lambda *_: lambda: answers.pop(0))
    seen = dict(late)
    _ping_again(case, seen, {}, {})
    assert as_expected(case, seen)
    assert answers == [good]
    wrong = {**late, "guest_broadcast": {"a": True, "b": False}}
    _ping_again(case, wrong, {}, {})
    assert wrong == {**good, "guest_broadcast": {"a": True, "b": False}}
    assert answers == []


@pytest.mark.vm
def test_the_whole_demo() -> None:
    with subprocess.Popen([*DEMO, "--json"], stdout=subprocess.PIPE, text=True) as demo:
        stdout, _ = demo.communicate(timeout=LIMIT)
    document = json.loads(stdout)
    assert document["ok"], stdout
    assert demo.returncode == 0
    assert len(document["rows"]) == len(CASES)
    assert leftovers(demo.pid) == []


@pytest.mark.vm
@pytest.mark.parametrize("number", ENDING)
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout
        assert demo.stderr
        for line in demo.stdout:
            if "tap-pepa" in line:  # the attachments are made, the guests are about to boot
                break
        assert leftovers(demo.pid)
        demo.send_signal(number)
        _, stderr = demo.communicate(timeout=LIMIT)
    assert (demo.returncode, stderr) == (130, "lab.demo: interrupted; what it had made is gone\n")
    assert leftovers(demo.pid) == []
