"""A docker of the lab without a cluster, and what the tests of this folder read on its nodes."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from lab.kind.cluster import Kind
from tests.kind import host
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def records(kind: Kind, node: str) -> list[dict[str, Any]]:
    """The attachments of a node."""
    script = "for file in /run/vmtap/attachments/*.json; do [ ! -e $file ] || { cat $file; echo; }; done"
    return [json.loads(line) for line in kind.on_node(node, script).split("\n") if line.strip()]


@contextlib.contextmanager
def lab(folder: Path, *, internet: bool = False) -> Iterator[Kind]:
    """A docker without a cluster. At its end, nothing of it may be left on this machine."""
    before = host.look(0)
    with Kind(folder, internet=internet) as kind:
        yield kind
    until(lambda: host.added(before, os.getpid()), "the lab has left something", lambda left: not left)
