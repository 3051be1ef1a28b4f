"""A delegate's deadline that passes when the delegate has come to where it hangs, however slow the machine is.

A deadline of a second is over before a busy machine has started a shell: the delegate would be killed on its way, and
so would the one that is to end its lease.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from cni.kernel import execute
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXECUTABLE = """#!{python}
import sys
from pathlib import Path
from cni.__main__ import main
from tests.hanging import deadline_after
with deadline_after(Path({mark!r})):
    sys.exit(main())
"""


@contextmanager
def deadline_after(mark: Path) -> Iterator[None]:
    """Inside the block no delegate's deadline passes until there is a file mark; it is used up."""
    passed = execute._passed
    longest = time.monotonic() + LIMIT

    def patiently(until: float) -> bool:
        if not passed(until) or not (mark.exists() or passed(longest)):
            return False
        mark.unlink(missing_ok=True)
        return True

    with mock.patch.object(execute, "_passed", patiently):
        yield


def living(folder: Path) -> list[int]:
    """The processes, zombies excepted, that were started with a CNI_PATH that has the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")  # a zombie has none
        except OSError:
            continue
        if any(each.startswith(b"CNI_PATH=") and os.fsencode(folder) in each for each in variables):
            found.append(int(process.name))
    return found


def executable(path: Path, mark: Path) -> Path:
    """The CNI executable that is so patient, made at path."""
    path.write_text(_EXECUTABLE.format(python=sys.executable, mark=str(mark)))
    path.chmod(0o755)
    return path
