"""The decorator `dataclass` of the standard library, for processes that start once for each pod.

The standard one imports inspect, and compiles six functions for each class: that was 22 of the 60 ms of a one-shot ADD
and 2 MB of an agent. Here the classes share their methods, and __init__ is compiled when the first object is made.
A type checker sees the standard functions. dataclasses.fields(), replace() and asdict() accept these classes, too.

Must import nothing. Base classes, methods that the decorator would replace, and options other than frozen, eq and
default_factory are not supported, with a TypeError.
"""

from __future__ import annotations

__all__ = ["dataclass", "field", "replace"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


class _Factory:
    """The default of a field that has a new value in each object."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def _field(*, default_factory: Callable[[], Any]) -> Any:
    return _Factory(default_factory)


def _replace(instance: T, /, **changes: Any) -> T:
    """A copy with the changes. Raises TypeError for a name that is no field."""
    kind: Any = type(instance)
    values = zip(kind.__match_args__, _values(instance), strict=True)
    return kind(**{**dict(values), **changes})  # type: ignore[no-any-return]


def _dataclass(kind: Any = None, /, *, frozen: bool = False, eq: bool = True) -> Any:
    if kind is None:
        return lambda kind: _dataclass(kind, frozen=frozen, eq=eq)
    if kind.__bases__ != (object,):
        raise TypeError(f"{kind.__name__}: a dataclass with a base class is not supported")
    names = tuple(kind.__annotations__)
    defaults = {name: vars(kind)[name] for name in names if name in vars(kind)}
    for name, value in defaults.items():
        if isinstance(value, _Factory):
            delattr(kind, name)
        elif value.__class__.__hash__ is None:
            raise TypeError(f"{kind.__name__}.{name}: objects would share the default; use default_factory")

    def __init__(self: Any, *values: Any, **named: Any) -> None:  # noqa: N807
        kind.__init__ = _compile(kind, names, defaults)
        kind.__init__(self, *values, **named)

    made = {"__init__": __init__, "__repr__": _repr, "__match_args__": names}
    if eq:
        made |= {"__eq__": _eq, "__hash__": _hash if frozen else None}
    if frozen:
        made |= {"__setattr__": _refuse, "__delattr__": _refuse}
    if own := made.keys() & vars(kind).keys():
        raise TypeError(f"{kind.__name__}: a dataclass with its own {min(own)} is not supported")
    for name, value in {**made, "__dataclass_fields__": _Fields(defaults)}.items():
        setattr(kind, name, value)
    return kind


def _compile(kind: type[Any], names: tuple[str, ...], defaults: dict[str, Any]) -> Callable[..., None]:
    """The __init__ of the class: a parameter for each field, in their order."""
    parameters = ", ".join(f"{name}=defaults[{name!r}]" if name in defaults else name for name in names)
    fields = ", ".join(
        f"{name}={name}.make() if {name}.__class__ is Factory else {name}"
        if isinstance(defaults.get(name), _Factory)
        else f"{name}={name}"
        for name in names
    )
    made: dict[str, Any] = {}
    code = f"def __init__(self, {parameters}): self.__dict__.update({fields})"
    exec(code, {"defaults": defaults, "Factory": _Factory}, made)  # noqa: S102 - names of fields, no input
    made["__init__"].__qualname__ = f"{kind.__qualname__}.__init__"
    return made["__init__"]  # type: ignore[no-any-return]


class _Fields:
    """What the functions of dataclasses read of a class, made when they read it."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        self._defaults = defaults

    def __get__(self, instance: object, kind: type[Any]) -> dict[str, Any]:
        import dataclasses  # noqa: PLC0415

        body = {
            name: dataclasses.field(default_factory=value.make) if isinstance(value, _Factory) else value
            for name, value in self._defaults.items()
        }
        twin = type(kind.__name__, (), {**body, "__annotations__": kind.__annotations__, "__doc__": ""})
        return {each.name: each for each in dataclasses.fields(dataclasses.dataclass(twin))}


def _values(instance: Any) -> list[Any]:
    return [getattr(instance, name) for name in instance.__match_args__]


def _repr(self: Any) -> str:
    values = zip(self.__match_args__, _values(self), strict=True)
    return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in values)})"


def _eq(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if self.__class__ is other.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(_values(self)))


def _refuse(self: Any, name: str, *_: object) -> None:
    raise AttributeError(f"{type(self).__name__} is frozen: {name} stays as it is")


if TYPE_CHECKING:
    from dataclasses import dataclass, field, replace
else:
    dataclass, field, replace = _dataclass, _field, _replace
