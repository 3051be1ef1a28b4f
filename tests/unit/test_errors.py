"""cni.errors: what a person reads of an exception has no Python in it, wherever it is formatted."""

from __future__ import annotations

import ast
import builtins
import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError, reason, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
_PYTHONS = {
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, OSError)
} | {*("ValueError", "KeyError", "TypeError", "AttributeError", "RecursionError")}


def _shown(file: Path) -> Iterator[str]:
    """The places where an exception of Python's own is put into a text otherwise than by reason().

    A handler of Exception is for faults of vmtap itself: a report of one needs the exception's class.
    """
    for handler in ast.walk(ast.parse(file.read_text())):
        if not isinstance(handler, ast.ExceptHandler) or not handler.name or handler.type is None:
            continue
        caught = {each.id for each in ast.walk(handler.type) if isinstance(each, ast.Name)}
        if not caught & _PYTHONS:
            continue
        for node in ast.walk(handler):
            text = None
            if isinstance(node, ast.FormattedValue):
                text = node.value
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("str", "repr")
            ):
                text = node.args[0]
            if isinstance(text, ast.Name) and text.id == handler.name:
                yield f"{file.relative_to(ROOT)}:{text.lineno}"


def test_no_exception_is_shown_as_python_writes_it() -> None:
    assert [place for file in sorted((ROOT / "cni").rglob("*.py")) for place in _shown(file)] == []


def _raised(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda: os.open("/nowhere", os.O_RDONLY), "No such file or directory: /nowhere"),
        (lambda: os.listdir("/nowhere/é"), "No such file or directory: /nowhere/é"),
        (lambda: os.close(-1), "Bad file descriptor"),
        (lambda: json.loads("{"), "Expecting property name enclosed in double quotes, line 1, column 2"),
        (b"ab\xff".decode, "byte 2 is not UTF-8"),
        (lambda: json.loads("[" * 100_000), "nested too deeply"),
        (lambda: int("9" * 5000), "a number has too many digits"),
        (lambda: {"": ""}["name"], "name is missing"),
    ],
)
def test_reason(action: Callable[[], object], text: str) -> None:
    assert reason(_raised(action)) == text


def test_the_text_of_an_oserror_is_kept() -> None:
    assert reason(OSError(errno.EINVAL, "the driver says why")) == "the driver says why"
    assert reason(OSError("a text alone")) == "a text alone"
    assert (
        str(refused(OSError(errno.EEXIST, "File exists"), "a step failed")) == "a step failed (File exists)"
    )
    assert reason(CniError(7, "msg", "details")) == "msg (details)"
