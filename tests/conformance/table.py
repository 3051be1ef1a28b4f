"""Writes the table of docs/conformance.md from the tests' names and docstrings: python -m tests.conformance.table

test_table.py holds the page to what this would write.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "conformance.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

ITEMS = {
    1: "CNI_COMMAND",
    2: "required variables",
    3: "container id, interface name, network name",
    4: "empty attachment variables",
    5: "stdout, stderr, exit status",
    6: "keys of an error",
    7: "codes of errors",
    8: "VERSION",
    9: "the version of a config",
    10: "the version of a result",
    11: "commands that a version lacks",
    12: "keys of a config",
    13: "runtimeConfig and CNI_ARGS",
    14: "ADD: the name is taken",
    15: "ADD: prevResult",
    16: "ADD: the result is what the kernel has",
    17: "ADD: the plugin's own namespace",
    18: "ADD: a failure is undone",
    19: "DEL: repeatable, needs nothing",
    20: "DEL: the delegate's part",
    21: "DEL: only what is ours",
    22: "CHECK: what it looks at",
    23: "CHECK: true after ADD",
    24: "GC: the list",
    25: "GC: scope and errors",
    26: "STATUS",
    27: "delegates",
    28: "in parallel",
}
"""The checklist: what of SPEC.md 1.1.0 binds a plugin, and what libcni adds."""


def sentences() -> dict[str, tuple[str, str]]:
    """Every test's name → its file and its sentence."""
    found = {}
    for file in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_item_", "test_runtime_")):
                found[node.name] = (file.name, ast.get_docstring(node) or "")
    return found


def item_of(name: str) -> int:
    """The number in test_item_07_codes; 0 for a test of what runtimes send."""
    number = re.match(r"test_item_(\d\d)_", name)
    return int(number[1]) if number else 0


def table() -> str:
    """What stands between BEGIN and END."""
    written = sentences()
    lines = ["| item | what it means here | test |", "| --- | --- | --- |"]
    for number, title in [*ITEMS.items(), (0, "what runtimes really send")]:
        lines.append(f"| **{number or ''}** | **{title}** | |")
        for name, (file, sentence) in written.items():
            if item_of(name) == number:
                text = " ".join(sentence.split()).replace("|", "\\|")
                lines.append(f"| | {text} | [`{name}`](../tests/conformance/{file}) |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/conformance.md with its table as it should be."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page())
