"""SECURITY.md names tests that exist, and none of its promises is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()
PROMISES = PAGE.split("<!-- promises: begin -->\n")[1].split("<!-- promises: end -->")[0].splitlines()[2:]
_TEST = re.compile(r"\[`(test_\w+)`\]\((?:\.\./)?(tests/[\w/]+\.py)\)")


def functions(file: str) -> set[str]:
    """The tests that the file defines."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def missing_tests(page: str) -> list[tuple[str, str]]:
    """The tests that the page names and that are not there: (name, file)."""
    return [(name, file) for name, file in _TEST.findall(page) if name not in functions(file)]


def test_each_promise_has_tests() -> None:
    assert len(PROMISES) > 10
    for line in PROMISES:
        promise, how, held = line.strip("| ").split(" | ")
        assert promise.endswith("."), line
        assert how.endswith("."), line
        assert _TEST.sub("", held).strip(", ") == "", "only tests hold a promise"
        assert _TEST.findall(held), promise


def test_the_tests_exist() -> None:
    assert missing_tests(PAGE) == []
