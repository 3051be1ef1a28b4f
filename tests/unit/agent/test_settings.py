"""cni.agent.settings: the quick reading of flags, which loads no argparse, agrees with argparse."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cni.agent import settings
from cni.config import schema

PROPERTIES: dict[str, Any] = schema.load("agent")["properties"]
FLAGS = [settings._flag(name) for name in PROPERTIES] + ["--config"]
VALUES = ["", "x", "/run/x", "5", " 8 ", "-5", "true", "--x", "--", "-", "-h"]
WORDS = (
    st.sampled_from(FLAGS + VALUES + ["--help", "--no-run", "--no-dra", "--no-no-dra", "--no-", "--de"])
    | st.builds("{}={}".format, st.sampled_from([*FLAGS, "--no-dra", "--x"]), st.sampled_from(VALUES))
    | st.text(max_size=5)
)


@given(st.lists(WORDS, max_size=6))
@example(["--run", "/run/x", "--no-dra", "--delegate-seconds=7", "--metrics", "", "--config", "file"])
@example(["--run=--"])
def test_flags_are_read_as_argparse_reads_them(argv: list[str]) -> None:
    plain = settings._plain(PROPERTIES, argv)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            explained = settings._explained(PROPERTIES, argv)
        except SystemExit:
            explained = None
    assert plain in (None, explained)


@pytest.mark.parametrize("name", PROPERTIES)
def test_each_flag_is_read_without_argparse(name: str) -> None:
    flag, kind = settings._flag(name), PROPERTIES[name]["type"]
    values = {"string": ["a"], "integer": ["5"], "boolean": []}[kind]
    expected = {"string": "a", "integer": 5, "boolean": True}[kind]
    assert settings._plain(PROPERTIES, [flag, *values]) == {"config": None, name: expected}
    if kind == "boolean":
        assert settings._plain(PROPERTIES, [flag.replace("--", "--no-", 1)]) == {"config": None, name: False}


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["--help"], 0, "The node agent of vmtap"),
        (["--runs", "x"], 2, "--runs"),
        (["--delegate-seconds", "soon"], 2, "soon"),
        (["--run"], 2, "expected one argument"),
        (["--dra=yes"], 2, "--dra"),
    ],
)
def test_argparse_names_a_mistake(
    argv: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        settings.load(argv)
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert text in printed.out + printed.err
