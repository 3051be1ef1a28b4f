"""The JSON Schemas of what people write, whether a value is valid by one, and what is wrong if it is not.

The .json files alone have each field, its default and its description; docs/configuration.md is generated from them.
Of JSON Schema, CHECKS has the keywords that they use. Must not know what the fields mean.

An invalid value costs bounded work: one pass over it up to the fourth fault, and a quotation of bounded length.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from itertools import islice

from cni import spec
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

ANNOTATIONS = frozenset({"$schema", "$defs", "title", "description", "default", "examples", "readOnly"})
"""Keywords for readers: they do not decide whether a value is valid."""

_FAULTS = 4
"""How many faults an error names."""
_SHOWN = 200
"""Characters of a value that an error quotes."""
_LISTED = 40
"""How many names an error lists, and how many an unknown name is compared with."""
_NEAR, _FEW = 3, 8
"""How many names an error lists that resemble an unknown one, and how many if none does."""
_CLOSE = 0.6
"""The similarity (difflib) of two names from which one is a misspelling of the other."""
NO_WORDS: Mapping[str, str] = {}
_NAME = 64
"""Characters of a key that an error quotes, or compares with the known ones."""
_JSON = json.JSONEncoder(default=str)
_PYTHON = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}


@cache
def load(name: str) -> dict[str, Any]:
    """The schema of that name, such as "netconf". All callers get one object: do not change it."""
    with open(os.path.join(os.path.dirname(__file__), f"{name}.json"), encoding="utf-8") as file:
        schema: dict[str, Any] = json.load(file)
    return schema


def defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """The defaults of an object's properties, by name."""
    return {key: rule["default"] for key, rule in schema["properties"].items() if "default" in rule}


def _type(names: str | list[str], value: Any, _: dict[str, Any]) -> bool:
    # type() and not isinstance: True is an int to Python and not to JSON Schema.
    kind = type(value)
    if kind is float and value.is_integer():  # as in JSON Schema, 1500.0 is the integer 1500
        kind = int
    if isinstance(names, str):
        return kind is _PYTHON[names]
    return any(kind is _PYTHON[name] for name in names)


def _properties(rules: dict[str, Any], value: Any, _: dict[str, Any]) -> bool:
    return type(value) is not dict or all(accepts(rules[key], value[key]) for key in value if key in rules)


def _pattern_properties(rules: dict[str, Any], value: Any, _: dict[str, Any]) -> bool:
    return type(value) is not dict or all(
        accepts(rule, value[key])
        for pattern, rule in rules.items()
        for key in value
        if re.search(pattern, key)
    )


def _additional(rule: Any, value: Any, schema: dict[str, Any]) -> bool:
    return type(value) is not dict or all(accepts(rule, value[key]) for key in unnamed(schema, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


CHECKS: dict[str, Callable[[Any, Any, dict[str, Any]], bool]] = {
    "type": _type,
    "enum": lambda allowed, value, _: type(value) is str and value in allowed,
    "properties": _properties,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
    "required": lambda keys, value, _: type(value) is not dict or all(key in value for key in keys),
    "items": lambda rule, value, _: type(value) is not list or all(accepts(rule, item) for item in value),
    "maxItems": lambda most, value, _: type(value) is not list or len(value) <= most,
    "minimum": lambda least, value, _: not _number(value) or value >= least,
    "maximum": lambda most, value, _: not _number(value) or value <= most,
    "maxLength": lambda most, value, _: type(value) is not str or len(value) <= most,
    "pattern": lambda pattern, value, _: type(value) is not str or re.search(pattern, value) is not None,
}
"""Keyword → a function of (the keyword's value, the instance, the schema): whether the instance is valid."""


def accepts(schema: dict[str, Any] | bool, value: Any) -> bool:
    """Whether the value is valid. By a schema with a keyword that CHECKS does not have, no value is."""
    if isinstance(schema, bool):
        return schema
    for keyword, wanted in schema.items():
        if keyword not in ANNOTATIONS and not (keyword in CHECKS and CHECKS[keyword](wanted, value, schema)):
            return False
    return True


def unnamed(schema: dict[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """The keys to which additionalProperties applies."""
    for key in keys:
        patterns = schema.get("patternProperties", ())
        if key not in schema.get("properties", ()) and not any(re.search(each, key) for each in patterns):
            yield key


def given(schema: dict[str, Any], document: Any, *, zero: bool) -> Any:
    """The document without the fields that mean "not given", those of objects and lists in it included.

    These are null in a field of any type, "" in a string and, with zero, 0 in an integer: what programs write for a
    value that they do not have. Where the schema accepts one of them, it is a value, and stays.
    """
    if type(document) is list and "items" in schema:
        return [given(schema["items"], item, zero=zero) for item in document]
    rules = schema.get("properties")
    if type(document) is not dict or not rules:
        return document
    return {
        key: given(rules[key], value, zero=zero) if key in rules else value
        for key, value in document.items()
        if key not in rules or not _is_nothing(rules[key], value, zero) or accepts(rules[key], value)
    }


def _is_nothing(rule: dict[str, Any], value: Any, zero: bool) -> bool:
    if value is None:
        return True
    types = rule.get("type", ())
    return ("string" in types and value == "") or (
        zero and "integer" in types and value == 0 and type(value) is not bool
    )


def explain(
    schema: dict[str, Any],
    value: Any,
    *,
    unknown: int = spec.INVALID_NETWORK_CONFIG,
    foreign: Mapping[str, str] = NO_WORDS,
) -> None:
    """Raise CniError with the path, the value and what is allowed, if the value is invalid.

    The code is 7, or `unknown` for a key that the schema does not have. The error's details list up to three others.
    foreign: keys of other programs, in lower case → the hint for each.
    """
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - 90 ms, and only an invalid value needs it

    errors = Draft202012Validator(schema).iter_errors(value)  # found one by one, as they are asked for
    found = (fault for error in errors for fault in _faults(error, unknown, foreign))
    faults = {text: code for code, text in islice(found, _FAULTS)}
    if faults:
        # An unknown key goes first: if it is a misspelling, the other faults may follow from it.
        first, *others = sorted(faults, key=lambda text: faults[text] != unknown)
        raise CniError(faults[first], first, "; ".join(others))


def _faults(error: Any, unknown: int, foreign: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """(code, message) of each fault in one error of jsonschema's, found one by one as the caller asks for them."""
    at = tuple(error.absolute_path)
    match error.validator:
        case "additionalProperties":
            known = list(error.schema["properties"])
            for key in unnamed(error.schema, error.instance):
                hint = foreign.get(key.lower()) if len(key) <= _NAME else None
                what = f"unknown key, its value is {show(error.instance[key])}; {hint or nearest(key, known)}"
                yield unknown, f"{path((*at, key))}: {what}"
        case "required":
            for key in error.validator_value:
                if key not in error.instance:
                    missing = f"is missing; give {allowed(error.schema['properties'][key])}"
                    yield spec.INVALID_NETWORK_CONFIG, f"{path((*at, key))}: {missing}"
        case _:
            where = path(at) or "the document"
            yield (
                spec.INVALID_NETWORK_CONFIG,
                f"{where}: {show(error.instance)} is not allowed; give {allowed(error.schema)}"
                f"{_unquoted(error.schema, error.instance)}",
            )


def _unquoted(schema: dict[str, Any], value: Any) -> str:
    """The hint for a number, true or false that was written as a string; "" for another value."""
    if type(value) is not str or len(value) > _NAME:
        return ""
    try:
        meant = json.loads(value)
    except (ValueError, RecursionError):
        return ""
    return f", without quotes: {show(meant)}" if accepts(schema, meant) else ""


def nearest(word: str, known: Sequence[str]) -> str:
    """The hint for a word that is not among the known ones: the closest of them, those that resemble it, or a few."""
    from difflib import SequenceMatcher, get_close_matches  # noqa: PLC0415

    word = word.lower()
    by_lower = {name.lower(): name for name in islice(known, _LISTED)}
    close = get_close_matches(word, by_lower, n=_NEAR, cutoff=0.45) if len(word) <= _NAME else []
    if close and SequenceMatcher(None, word, close[0]).ratio() >= _CLOSE:
        return f"did you mean {show(by_lower[close[0]])}?"
    if close and len(known) > _FEW:
        return f"near it: {', '.join(by_lower[each] for each in close)}"
    return f"known are: {listed(known, _FEW)}"


def listed(names: Sequence[str], most: int = _LISTED) -> str:
    """The names with commas between them; of more than `most`, the first ones and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "") or "none"


def path(parts: Iterable[str | int]) -> str:
    """("interfaces", 2, "modes", 0) → interfaces[2].modes[0]"""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if len(part) <= _NAME and part.isprintable() else show(part)}"
    return text.removeprefix(".")


def show(value: Any) -> str:
    """The value as JSON, on one line of at most 201 characters."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = ""
    for part in _JSON.iterencode(value):  # in parts, since the value may be large
        text += part
        if len(text) > _SHOWN:
            return f"{text[:_SHOWN]}…"
    return text


def allowed(schema: dict[str, Any]) -> str:
    """What a value may be, as a phrase for error messages and the docs."""
    if "enum" in schema:
        return f"one of {', '.join(map(show, schema['enum']))}"
    if "title" in schema:
        return f"{schema['title']}, such as {show(schema['examples'][0])}"
    names = schema.get("type", ["anything"])
    # null is accepted where programs write it for "not given", but it is not recommended.
    return " or ".join(
        _kind(name, schema) for name in ([names] if isinstance(names, str) else names) if name != "null"
    )


def _kind(name: str, schema: dict[str, Any]) -> str:
    if name == "integer" and "maximum" in schema:
        return f"an integer from {schema['minimum']} to {schema['maximum']}"
    if name == "integer":
        return f"an integer of {schema['minimum']} or more"
    if name == "array" and "items" in schema:
        return f"a list, each {allowed(schema['items'])}"
    plain = {"object": "an object", "array": "a list", "string": "a string", "boolean": "true or false"}
    return plain.get(name, name)
