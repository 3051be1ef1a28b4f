"""Changes a JSON document into another one: libFuzzer's own changes of bytes seldom leave it one."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BYTES = 0.25
"""How often the bytes are changed instead, so that there are duplicate keys and broken escapes, too."""
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**64, 0.5, 1e300, [], {}, [[]], {"": None}),
    *("", "\0", "\n", "\x1b[2J", "\u202e", "\u2028", "\ud800", "ä", "🦊", "..", "/", "%", "x" * 300),
)


def document(
    data: bytes, most: int, seed: int, words: Sequence[str], change_bytes: Callable[[bytes, int], bytes]
) -> bytes:
    """data with one to four changes. most: bytes of the outcome; change_bytes: changes what is no JSON."""
    choice = random.Random(seed)  # noqa: S311 - the fuzzer wants what it can repeat
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, most)
    if choice.random() < _BYTES:
        return change_bytes(data, most)
    for _ in range(choice.randint(1, 4)):
        value = _changed(value, choice, words)
    changed = json.dumps(value, ensure_ascii=choice.random() < 0.5).encode(errors="surrogatepass")
    return changed if len(changed) <= most else change_bytes(data, most)


def _changed(value: Any, choice: random.Random, words: Sequence[str]) -> Any:
    inner = [
        *(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    ]
    if inner and choice.random() < 0.75:
        key, item = choice.choice(inner)
        match choice.randrange(8):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[_word(choice, words)] = value.pop(key)
            case 2 if isinstance(value, list):
                value.append(deepcopy(item))
            case _:
                value[key] = _changed(item, choice, words)
        return value
    if isinstance(value, dict) and choice.random() < 0.7:
        value[_word(choice, words)] = _new(choice, words)
        return value
    if isinstance(value, list) and choice.random() < 0.5:
        value.insert(choice.randint(0, len(value)), _new(choice, words))
        return value
    if isinstance(value, str) and choice.random() < 0.5:
        at = choice.randint(0, len(value))
        return value[:at] + _word(choice, words) + value[at + choice.randint(0, 2) :]
    if type(value) is int and choice.random() < 0.5:
        return value + choice.choice((-1, 1, 1 << choice.randrange(40)))
    return _new(choice, words)


def _word(choice: random.Random, words: Sequence[str]) -> str:
    odd = choice.random() < 0.2 or not words
    return choice.choice([each for each in _ODD if isinstance(each, str)]) if odd else choice.choice(words)


def _new(choice: random.Random, words: Sequence[str]) -> Any:
    match choice.randrange(5):
        case 0:
            return {_word(choice, words): deepcopy(choice.choice(_ODD))}
        case 1:
            return [_word(choice, words) for _ in range(choice.randrange(3))]
        case 2:
            return deepcopy(choice.choice(_ODD))
    return _word(choice, words)
