"""docs/situations.md names tests that exist, and reports by their address."""

from __future__ import annotations

import re

from tests.test_security import ROOT, missing_tests

PAGE = (ROOT / "docs" / "situations.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| situation ")]
_REPORT = re.compile(r"\[[\w-]+ \d+\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/\d+\)")


def test_the_tests_exist() -> None:
    assert missing_tests(PAGE) == []


def test_each_row_is_whole() -> None:
    rows = [row for row in ROWS if not row.startswith("| ---")]
    assert len(rows) > 60
    for row in rows:
        situation, what, reports, _tests = (cell.strip() for cell in row.strip("|").split("|"))
        assert situation, row
        assert what, row
        assert _REPORT.sub("", reports).strip(", ") == "", row
