"""cni.dataclass: its classes behave as those of the standard library, whose functions accept them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from cni import dataclass as ours

if TYPE_CHECKING:
    from collections.abc import Callable

MADE: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1, "b"), {}),
    ((1,), {"b": "b", "c": [3]}),
    ((), {"b": "b", "a": 1, "d": None}),
    ((1, "b", [3], 4), {}),
]
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((1,), {}),
    ((1, "b"), {"e": 5}),
    ((1, "b"), {"a": 1}),
    ((1, "b", [3], 4, 5), {}),
]


def _kinds(library: Any, **options: bool) -> type[Any]:
    class Kind:
        """A docstring."""

        a: int
        b: str
        c: list[int] = library.field(default_factory=lambda: [0])
        d: int | None = 7

        @property
        def both(self) -> tuple[int, str]:
            return self.a, self.b

    made: type[Any] = library.dataclass(**options)(Kind)
    return made


@dataclasses.dataclass(frozen=True)
class _Holder:
    inner: object


def _text(call: Callable[[], object]) -> str:
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"frozen": True}, {"eq": False}, {"frozen": True, "eq": False}], ids=str
)
class TestAsStandard:
    def test_objects(self, options: dict[str, bool]) -> None:
        theirs, own = (_kinds(library, **options) for library in (dataclasses, ours))
        for values, named in MADE:
            one, other = theirs(*values, **named), own(*values, **named)
            assert vars(one) == vars(other)
            assert list(vars(one)) == list(vars(other))
            assert repr(one) == repr(other)
            assert one.both == other.both
            assert (one == theirs(*values, **named)) == (other == own(*values, **named))
            assert other != one
            assert vars(copy.copy(other)) == vars(copy.deepcopy(other)) == vars(other)
        assert own.__match_args__ == theirs.__match_args__
        assert (own.__hash__ is None) == (theirs.__hash__ is None)
        assert own(1, "b").c is not own(1, "b").c
        assert own.d == 7
        assert not hasattr(own, "c")

    def test_refused_arguments(self, options: dict[str, bool]) -> None:
        theirs, own = (_kinds(library, **options) for library in (dataclasses, ours))
        for values, named in REFUSED:
            message = _text(lambda: theirs(*values, **named))  # noqa: B023
            assert _text(lambda: own(*values, **named)) == message  # noqa: B023

    def test_functions(self, options: dict[str, bool]) -> None:
        theirs, own = (_kinds(library, **options) for library in (dataclasses, ours))
        one: Any = theirs(1, "b")
        other: Any = own(1, "b")
        assert [dataclasses.is_dataclass(each) for each in (own, other)] == [True, True]
        assert [each.name for each in dataclasses.fields(other)] == ["a", "b", "c", "d"]
        assert dataclasses.asdict(other) == dataclasses.asdict(one)
        assert dataclasses.asdict(_Holder(other)) == dataclasses.asdict(_Holder(one))
        for replace in (dataclasses.replace, ours.replace):
            assert vars(replace(other, b="x")) == vars(dataclasses.replace(one, b="x"))
            assert type(replace(other, b="x")) is own
            with pytest.raises(TypeError):
                replace(other, e=5)


def test_a_frozen_object_does_not_change() -> None:
    own = _kinds(ours, frozen=True)(1, "b")
    with pytest.raises(AttributeError, match="Kind is frozen: a stays"):
        own.a = 2
    with pytest.raises(AttributeError, match="Kind is frozen: a stays"):
        del own.a
    with pytest.raises(AttributeError):
        own.other = 2
    assert own.a == 1


def test_the_hash_is_of_the_fields() -> None:
    @ours.dataclass(frozen=True)
    class Key:
        a: int
        b: str

    assert hash(Key(1, "b")) == hash(Key(1, "b")) != hash(Key(2, "b"))
    assert {Key(1, "b"): 1}[Key(1, "b")] == 1
    match Key(1, "b"):
        case Key(a, b):
            assert (a, b) == (1, "b")
    with pytest.raises(TypeError, match="unhashable"):
        hash(_kinds(ours, frozen=True)(1, "b"))


def test_an_object_can_be_pickled() -> None:
    from cni.spec import VERSIONS  # noqa: PLC0415
    from cni.state.record import VlanDevice  # noqa: PLC0415

    device = VlanDevice("eth1.5", len(VERSIONS), "802.1Q")
    assert pickle.loads(pickle.dumps(device)) == device  # noqa: S301


def test_what_is_not_supported_is_refused() -> None:
    class Base:
        a: int = 1

    class Derived(Base):
        b: int = 2

    class WithInit:
        a: int = 1

        def __init__(self) -> None:
            pass

    class Shared:
        a: list[int] = []  # noqa: RUF012

    for kind, message in (
        (Derived, "base class"),
        (WithInit, "__init__"),
        (Shared, "Shared.a: .* default_factory"),
    ):
        with pytest.raises(TypeError, match=message):
            ours.dataclass(kind)
    options: dict[str, Any] = {"slots": True}
    with pytest.raises(TypeError):
        ours.dataclass(**options)
    options = {"default": 1}
    with pytest.raises(TypeError):
        ours.field(**options)
