"""The standard streams of vmtapctl: everything that is printed has its unprintable characters escaped.

Loaded before the arguments are parsed, because the parser's errors quote them. Must not import rich.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TextIO


class _Escaped:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(escaped(text, kept="\n\t"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaping() -> Iterator[None]:
    """In the block, stdout and stderr escape all that is written to them but line ends and tabs."""
    out: Any = _Escaped(sys.stdout)
    err: Any = _Escaped(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield


def terminal(stream: TextIO) -> TextIO:
    """The stream without escaping, for text whose unprintable characters are escaped, and which has colours."""
    return stream.stream if isinstance(stream, _Escaped) else stream
