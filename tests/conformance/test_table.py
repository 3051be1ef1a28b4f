"""docs/conformance.md says what the tests show, no more and no less."""

from __future__ import annotations

import re

from cni import spec
from tests.conformance.table import ITEMS, PAGE, item_of, page, sentences

OPERATIONS = PAGE.with_name("operations.md")


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.conformance.table"


def test_every_item_has_a_test_and_every_test_a_sentence() -> None:
    assert {item_of(name) for name in sentences()} == {0, *ITEMS}
    assert [name for name, (_, sentence) in sentences().items() if not sentence.endswith((".", ")"))] == []


def test_the_docs_list_every_code_of_ours() -> None:
    ours = {value for value in vars(spec).values() if isinstance(value, int) and value >= 100}
    listed = re.findall(r"^\| (\d+) \|", OPERATIONS.read_text(), re.MULTILINE)
    assert {int(code) for code in listed} == ours
