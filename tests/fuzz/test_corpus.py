"""Every input in the corpus, called as the fuzzer calls it (lab/fuzz), without a fuzzer.

tests/faults has tests of the whole plugin: test_input.py sends a list of faulty inputs, test_fuzz.py random ones, and
both look at the links afterwards. A target here calls one parser and states what an accepted value must be. The fuzzer
reaches the parser's rare branches, because it keeps each input that has reached a new one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lab.fuzz import mutate, shim, targets
from lab.fuzz.__main__ import CORPUS, Run, replay

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("target", targets.names())
def test_target(target: str) -> None:
    replay(target, sorted((CORPUS / target).iterdir()))


def test_shim(tmp_path: Path) -> None:
    shim.replay(tmp_path, sorted((CORPUS / "shim").iterdir()))


def test_each_folder_is_of_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*targets.names(), "shim"}


def test_a_changed_document_is_another_one() -> None:
    data = (CORPUS / "netconf/full.json").read_bytes()

    def change(seed: int) -> bytes:
        return mutate.document(data, 4096, seed, ("mtu", "mode"), lambda *_: b"")

    changed = [change(seed) for seed in range(200)]
    documents = [json.loads(each) for each in changed if each]
    assert 100 < len(documents) < 200  # of the others, the bytes were changed
    assert sum(document != json.loads(data) for document in documents) > 100
    assert changed == [change(seed) for seed in range(200)]


def test_what_libfuzzer_prints() -> None:
    run = Run("netconf")
    assert run.read("#4096\tpulse  cov: 328 ft: 1117 corp: 121/30Kb lim: 4096 exec/s: 1374 rss: 51Mb\n")
    assert not run.read("stat::number_of_executed_units: 5000\n")
    assert not run.read("stat::peak_rss_mb:              47\n")
    assert (run.executions, run.per_second, run.edges, run.features) == (5000, 1374, 328, 1117)
    assert (run.corpus, run.peak_mb) == (121, 47)
