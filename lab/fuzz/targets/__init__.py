"""The targets of the fuzzer: each module here but this one has a TARGET, whose name is the module's.

Each calls public functions with what it is given and states what must hold. An exception of run() is a finding. What a
target writes is in tempfile.gettempdir(), which its caller removes.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class Target:
    """run: called with each input. words: what an input is likely to have in it, for the fuzzer to insert."""

    run: Callable[[bytes], None]
    words: tuple[str, ...] = ()
    json: bool = False
    """Whether most inputs are JSON documents, so that mutate.py helps."""
    most_bytes: int = 4096
    """The length of an input."""
    cpu_seconds: float = 1.0
    """The CPU time that an input may take. One that takes more is a finding."""


def names() -> list[str]:
    """The targets in Python."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load(name: str) -> Target:
    """The target of that name. Importing it imports what it calls."""
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return target


def keys(*schemas: object) -> tuple[str, ...]:
    """The words of JSON Schemas: their properties' names, and the values of enum, examples and default."""
    return tuple(sorted(set(_keys(schemas))))


def _keys(schema: object) -> Iterable[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", ()) if isinstance(schema.get("properties"), dict) else ()
        for keyword in ("enum", "examples"):
            if isinstance(schema.get(keyword), list):
                yield from (each if isinstance(each, str) else json.dumps(each) for each in schema[keyword])
        schema = [*schema.values()]
    if isinstance(schema, list | tuple):
        for each in schema:
            yield from _keys(each)
