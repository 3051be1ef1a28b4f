"""What must hold of an error that a target raises, and of a text that it accepts. Each raises AssertionError."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from cni import names, spec

if TYPE_CHECKING:
    from collections.abc import Collection

    from cni.errors import CniError

CODES = {value for name, value in vars(spec).items() if name.isupper() and isinstance(value, int)}
MSG_MOST = 4096
"""Characters of an error's message."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def refused(error: CniError, codes: Collection[int] = CODES) -> None:
    """The error is one that a person can read: a known code, and one printable line of bounded length."""
    assert error.code in codes, error.code
    assert error.code != spec.INTERNAL, error
    printable(error.msg)
    assert 0 < len(error.msg) <= MSG_MOST, len(error.msg)
    (error.msg + error.details).encode()


def printable(text: str | None) -> None:
    """The text has no character that controls a terminal, no newline, and no byte that is not UTF-8."""
    assert text is None or names.printable(text), ascii(text)


def unicast(mac: str) -> None:
    """The text is a unicast MAC in lower case."""
    assert _MAC.fullmatch(mac), ascii(mac)
    assert not int(mac[:2], 16) & 1, mac
    assert mac != "00:00:00:00:00:00"


def typed(value: object) -> None:
    """Each field of the dataclass has the type that it declares."""
    kind: Any = type(value)
    for name, wanted in hints(kind).items():
        assert _fits(getattr(value, name), wanted), f"{name}: {getattr(value, name)!r}"


@cache
def hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields. The product imports these two names for the type checker only."""
    return get_type_hints(kind, localns={"Any": Any, "Mapping": Mapping})


def _fits(value: object, wanted: Any) -> bool:
    origin, kinds = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        return any(_fits(value, kind) for kind in kinds)
    if origin is not tuple:
        return type(value) is (dict if origin is Mapping else origin or wanted)
    if type(value) is not tuple:
        return False
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    return len(kinds) == len(value) and all(map(_fits, value, kinds))
