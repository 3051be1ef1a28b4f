"""docs/conformance.md says what the tests show, no more and no less."""

from __future__ import annotations

import re

from cni import spec
from tests.conformance.table import ITEMS, PAGE, item_of, page, sentences


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.conformance.table"


def test_every_item_has_a_test_and_every_test_a_sentence() -> None:
    assert {item_of(name) for name in sentences()} == {0, *ITEMS}
    assert [name for name, (_, sentence) in sentences().items() if not sentence.endswith((".", ")"))] == []


def test_the_page_lists_every_code() -> None:
    codes = {
        value
        for name, value in vars(spec).items()
        if isinstance(value, int) and not name.startswith("_") and value != spec.UNKNOWN_CONTAINER
    }
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)} == codes
