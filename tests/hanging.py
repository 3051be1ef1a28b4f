"""A delegate's deadline that passes when the delegate has come to where it hangs, however slow the machine is.

A deadline of a second is over before a busy machine has started a shell: the delegate would be killed on its way, and
so would the one that is to end its lease.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    """Inside the block no process runs into a timeout of communicate() until there is a file mark; it is used up."""
    communicate = subprocess.Popen.communicate

    def patiently(process: subprocess.Popen[Any], given: Any = None, timeout: float | None = None) -> Any:
        longest = time.monotonic() + LIMIT
        while True:
            try:
                return communicate(process, given, timeout)
            except subprocess.TimeoutExpired:
                if mark.exists() or time.monotonic() >= longest:
                    mark.unlink(missing_ok=True)
                    raise
                given = None  # communicate() has it

    with mock.patch.object(subprocess.Popen, "communicate", patiently):
        yield


def executable(path: Path, mark: Path) -> Path:
    """The CNI executable that is so patient, made at path."""
    path.write_text(_EXECUTABLE.format(python=sys.executable, mark=str(mark)))
    path.chmod(0o755)
    return path
