"""The bytes of a network config → a JSON object, with bounded work. ADD, DEL and vmtapctl lint decode with this.

It refuses JSON that two readers could understand differently, or that a system call could not carry.
"""

from __future__ import annotations

import json
import re

from cni import spec
from cni.config import schema
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH = 64
"""Levels of nesting. json itself stops only at the interpreter's recursion limit."""
_MAX_MARKS = 1 << 15
"""Commas, colons and opening brackets, counted before decoding: each value takes one, up to 300 bytes and 1 µs."""
_DIGITS = 40  # of an integer: reading one takes quadratic time
_UNSPEAKABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that JSON can escape, but that neither a system call nor UTF-8 can carry."""


def decode(text: bytes, most: int) -> dict[str, Any]:
    """The JSON object in the text. Raises CniError 6 if there is none, or the text is longer than `most` bytes."""
    if len(text) > most:
        raise CniError(spec.DECODING_FAILURE, f"the network configuration is larger than {most >> 10} KiB")
    # Before decoding, which holds the GIL and cannot be interrupted.
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > _MAX_MARKS:
        message = f"the network configuration has more than {_MAX_MARKS} commas, colons and brackets"
        raise CniError(spec.DECODING_FAILURE, f"{message}; make it smaller")
    if text.startswith(b"\xef\xbb\xbf"):
        message = "the network configuration begins with a byte order mark (BOM), which is not JSON"
        raise CniError(spec.DECODING_FAILURE, f"{message}; save it as UTF-8 without one")
    try:
        # json.loads would also accept bytes of UTF-16 and UTF-32, which no other reader of a config does.
        document = json.loads(text.decode(), object_pairs_hook=_object, parse_int=_integer)
        _inspect(document, escapes=b"\\u" in text)
    except (ValueError, RecursionError) as error:
        message = f"the network configuration cannot be decoded as JSON: {reason(error)}"
        raise CniError(spec.DECODING_FAILURE, message) from error
    if not isinstance(document, dict):
        message = f"the network configuration is not a JSON object but {schema.show(document)}"
        raise CniError(spec.DECODING_FAILURE, message)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {schema.show(key)} stands twice in one object")
            seen.add(key)
    return document


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"the number {text[:_DIGITS]}… is too large")
    return int(text)


def _inspect(document: Any, *, escapes: bool) -> None:
    """Raise ValueError for what json accepts and vmtap does not. escapes: whether the text has \\u escapes."""
    level, depth = [document], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                if escapes:
                    for key in value:
                        _speakable(key)
                below += value.values()
            elif kind is list:
                below += value
            elif kind is str:
                if escapes:
                    _speakable(value)
            elif kind is float and value - value != 0:  # 1e999, NaN, Infinity
                raise ValueError(f"{value} is not a number in JSON")
        level, depth = below, depth + 1


def _speakable(text: str) -> None:
    if _UNSPEAKABLE.search(text):
        raise ValueError(f"the string {schema.show(text)} has a NUL or half a surrogate pair in it")
