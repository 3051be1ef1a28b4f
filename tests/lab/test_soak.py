"""The soak finds what breaks its bounds; a short one breaks none that counts something, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lab.soak import chart, report
from lab.soak.neighbours import documents
from lab.soak.report import Outcome, Phase
from lab.soak.watch import Sample
from tests.waiting import LIMIT

AGENT = Sample(time=1.0, pid=7, memory=40_000, peak=41_000, fds=30, threads=20)
ONE = [(0.5, 2.0), (1.5, 3.0), (2.5, 4.0)]
GOOD = Outcome(
    seed=1,
    phases=[Phase("alone", 0, 1, 1.2), Phase("neighbours", 1.2, 2, 2.2), Phase("agent killed", 2.2, 3)],
    adds=ONE,
    brokers=ONE,
    probes=ONE,
    samples=[AGENT, replace(AGENT, time=2.5, pid=8)],
    events=[(2.5, "agent"), (1.5, "delegate")],
    pairs={"steady": 3, "troubled": 3},
    echoes=6,
    healed=0,
    restarts=[0.2],
    attempts={"fds": 9},
    before=AGENT,
    after=AGENT,
)


def test_a_good_run_has_no_finding() -> None:
    assert report.findings(GOOD) == []
    assert json.loads(json.dumps(report.document(GOOD)))["kills"] == {"agent": 1, "delegate": 1}


@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        (
            {"adds": [*ONE, (2.1, 2500.0)]},
            "stall",
            "neighbours: the longest ADD of the steady pod took 2500 ms",
        ),
        ({"adds": [*ONE, (9.0, 2500.0)]}, "stall", "agent killed: the longest ADD"),
        ({"adds": ONE[:2]}, "stall", "agent killed: the steady pod had no ADD"),
        ({"brokers": [(1.5, 2001.0)]}, "stall", "the longest request for fds"),
        ({"probes": [(1.5, 2001.0)]}, "stall", "the longest probe"),
        ({"restarts": [20.0]}, "stall", "ready only 20.0 s after a kill"),
        ({"end_seconds": 20.0}, "stall", "20.0 s after SIGTERM"),
        ({"after": replace(AGENT, fds=60)}, "growth", "fds: 30 more"),
        ({"after": replace(AGENT, threads=60)}, "growth", "threads: 40 more"),
        ({"after": replace(AGENT, memory=60_000)}, "growth", "memory, KiB: 20000 more"),
        ({"after": replace(AGENT, peak=100_000)}, "growth", "memory at its peak, KiB: 59000 more"),
        ({"after": None}, "failure", "ended without being killed"),
        ({"left": {"leases": ([], ["c1"])}}, "leak", "leases: 1 more: ['c1']"),
        ({"left": {"nf_tables": ({"p": []}, {"p": ["t"]})}}, "leak", "p: [] → ['t']"),
        ({"failures": ["no"]}, "failure", "no"),
        ({"failed_probes": ["503"]}, "failure", "503"),
    ],
)
def test_what_breaks_a_bound_is_found(changed: dict[str, object], kind: str, text: str) -> None:
    found = report.findings(replace(GOOD, **changed))  # type: ignore[arg-type]
    assert any(each.kind == kind and text in each.text and each.hint for each in found), found


def test_the_chart_has_each_call_and_each_kill() -> None:
    picture = ElementTree.fromstring(chart.draw(GOOD, "a note"))  # noqa: S314 - ours
    name = "{http://www.w3.org/2000/svg}"
    assert len(list(picture.iter(f"{name}circle"))) == 9
    texts = [text.text for text in picture.iter(f"{name}text")]
    assert {"agent", "delegate", "neighbours", "a note"} <= set(texts)


def test_hostile_configs_are_within_the_limit_of_the_shim() -> None:
    sizes = {name: len(document) for name, document in documents().items()}
    assert max(sizes.values()) <= 1 << 20, sizes
    assert min(sizes.values()) > 500_000, sizes


def test_a_short_soak(tmp_path: Path) -> None:
    """Times are not judged here, nor the memory, which a busy machine gives back late."""
    argv = [
        sys.executable,
        "-m",
        "lab.soak",
        "--json",
        "--seconds",
        "6",
        "--seed",
        "1",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=LIMIT)
    document = json.loads(out)
    serious = [each for each in document["findings"] if each["kind"] not in ("stall", "growth")]
    assert serious == [], err
    assert process.returncode == (1 if document["findings"] else 0), err
    assert all(document["pairs"].values())
    assert document["echoes"] > 0
    assert document["kills"]["agent"] > 0
    assert set(document["attempts"]) == {"linger", "fds", "slow", "http", "config"}
    assert {path.name for path in tmp_path.iterdir()} == {"agent.log", "soak.svg"}
    assert "seed 1" in err
    assert not list(Path("/run").glob(f"vmtap-lab-{process.pid}-*"))
    assert not list(Path("/dev/shm").glob(f"vmtap-*-{process.pid}-*"))  # noqa: S108 - where its folders are


def test_unknown_neighbours_are_refused() -> None:
    argv = [sys.executable, "-m", "lab.soak", "--neighbours", "cat"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 2
    assert "linger, fds" in done.stderr
