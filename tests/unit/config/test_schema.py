"""cni.schema: the acceptor is sound, the schemas complete, the errors of use, the docs up to date."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cni.config import schema
from cni.errors import CniError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("netconf", "policy")
ROOT = Path(__file__).parents[3]


def subschemas(rule: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield at, rule
    for keyword in ("properties", "patternProperties", "$defs"):
        for key, each in rule.get(keyword, {}).items():
            yield from subschemas(each, f"{at}.{key}")
    for keyword in ("items", "additionalProperties"):
        if isinstance(rule.get(keyword), dict):
            yield from subschemas(rule[keyword], f"{at}[]")


EVERY = [(f"{name}{at}", rule) for name in NAMES for at, rule in subschemas(schema.load(name))]
FIELDS = [
    (f"{name}{at}.{key}", field)
    for name in NAMES
    for at, rule in subschemas(schema.load(name))
    for key, field in rule.get("properties", {}).items()
]


@pytest.mark.parametrize("name", NAMES)
def test_is_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(schema.load(name))


@pytest.mark.parametrize(("at", "rule"), EVERY)
def test_acceptor_knows_every_keyword(at: str, rule: dict[str, Any]) -> None:
    assert set(rule) <= schema.CHECKS.keys() | schema.ANNOTATIONS


def test_unknown_keyword_is_not_accepted() -> None:
    assert not schema.accepts({"multipleOf": 2}, 4)


@pytest.mark.parametrize(("at", "field"), FIELDS)
def test_field_is_described(at: str, field: dict[str, Any]) -> None:
    assert field["description"][0].isupper()
    assert field["description"].endswith(".")
    if "pattern" in field:  # errors show the title, for nobody should have to read the pattern
        assert field["title"]
        assert field["examples"]


@pytest.mark.parametrize(("at", "field"), FIELDS)
def test_defaults_and_examples_are_valid(at: str, field: dict[str, Any]) -> None:
    for value in [*field.get("examples", ()), *([field["default"]] if "default" in field else ())]:
        assert schema.accepts(field, value)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"type": "integer"}, [0, -1, 1.0], [True, 1.5, "1", None]),
        ({"type": ["string", "null"]}, ["", None], [False, 0, []]),
        ({"type": "object"}, [{}], [[], None]),
        ({"enum": ["a", "b"]}, ["a", "b"], ["A", "", None, ["a"], "a\n"]),
        ({"minimum": 0}, [0, 1], [-1]),
        ({"maximum": 3}, [3, -1], [4, 3.5]),
        ({"maxLength": 2}, ["ab"], ["abc"]),
        ({"pattern": "^a(?!\n)$"}, ["a"], ["b", "ab", "a\n"]),
        ({"items": {"type": "string"}}, [[], ["a", "b"]], [["a", 1], [1]]),
        ({"required": ["a", "b"]}, [{"a": 1, "b": 2}], [{"a": 1}, {}]),
        ({"properties": {"a": {"type": "null"}}}, [{}, {"a": None}, {"b": 1}], [{"a": 1, "b": 2}]),
        ({"patternProperties": {"^x": {"type": "null"}}}, [{"a": 1}, {"x": None}], [{"a": 1, "xy": 1}]),
        (
            {"properties": {"a": {}}, "patternProperties": {"^x": {}}, "additionalProperties": False},
            [{}, {"a": 1, "x1": 2}],
            [{"b": 1}, {"a": 1, "yx": 1}],
        ),
        ({"additionalProperties": {"type": "null"}}, [{"a": None}], [{"a": None, "b": 1}]),
    ],
    ids=str,
)
def test_each_keyword(rule: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    oracle = Draft202012Validator(rule)
    assert all(schema.accepts(rule, value) and oracle.is_valid(value) for value in good)
    assert not any(schema.accepts(rule, value) for value in bad)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def nearly(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values about as often valid as not: on the limits, just beside them, of another type."""
    choices: list[st.SearchStrategy[Any]] = [ANYTHING]
    if "enum" in rule:
        choices.append(st.sampled_from([*rule["enum"], "", rule["enum"][0].upper(), rule["enum"][0] + "\n"]))
    if "minimum" in rule:
        least, most = rule["minimum"], rule.get("maximum", 2**40)
        choices.append(st.sampled_from([least - 1, least, float(least), most, most + 1, most + 0.5, True]))
    if "pattern" in rule:
        choices += [
            st.from_regex(rule["pattern"]),
            st.sampled_from(["eth0\n", ".", "..", "a" * 51, "x/y", "é"]),
        ]
    if "properties" in rule:
        known = {key: nearly(each) for key, each in rule["properties"].items()}
        whole = st.fixed_dictionaries({}, optional=known)
        choices += [whole, whole, st.builds(lambda a, b: a | b, whole, st.dictionaries(st.text(), ANYTHING))]
    if "items" in rule:
        choices.append(st.lists(nearly(rule["items"]), max_size=3))
    return st.one_of(choices)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_accepted_is_valid(name: str) -> None:
    """And what is refused is not."""
    rules = schema.load(name)
    oracle = Draft202012Validator(rules)
    verdicts = set()

    @settings(max_examples=300, deadline=None)
    @given(nearly(rules))
    @example({"name": "x", "interfaces": []})
    @example({"name": "x", "mtu": 1500})
    @example({})
    def check(value: Any) -> None:
        verdict = schema.accepts(rules, value)
        verdicts.add(verdict)
        assert verdict == oracle.is_valid(value)

    check()
    assert verdicts == {True, False}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_accepted_is_valid_field_by_field(data: st.DataObject) -> None:
    _, rule = data.draw(st.sampled_from(FIELDS))
    value = data.draw(nearly(rule))
    assert schema.accepts(rule, value) == Draft202012Validator(rule).is_valid(value)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_explain_agrees_with_jsonschema(data: st.DataObject) -> None:
    rules = schema.load(data.draw(st.sampled_from(NAMES)))
    value = data.draw(nearly(rules))
    if Draft202012Validator(rules).is_valid(value):
        schema.explain(rules, value)
    else:
        with pytest.raises(CniError) as caught:
            schema.explain(rules, value, unknown=2)
        assert caught.value.code in (2, 7)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"interfaces": {}}, "interfaces: {} is not allowed; give a list, each an object"),
        (
            {"interfaces": [{"name": "a", "source": {"dev": "eth0"}, "modes": ["vepa", "bridg"]}]},
            'interfaces[0].modes[1]: "bridg" is not allowed; give one of "vepa", "pepa", "private", "bridge"',
        ),
        (
            {"interfaces": [{"name": "a", "source": {}}]},
            "interfaces[0].source.dev: is missing; give a device name of at most 15 ASCII characters "
            "without '/', ':' and white space, or, with type sr-iov, a list of them, such as \"eth1\"",
        ),
        (
            {"interfaces": [{"name": "a", "source": {"dev": "eth0"}, "capacity": 0}]},
            "interfaces[0].capacity: 0 is not allowed; give an integer from 1 to 4096",
        ),
        (
            {"interfaces": [{"name": "a", "source": {"dev": "eth0"}, "Mode": []}]},
            'interfaces[0].Mode: unknown key, its value is []; did you mean "modes"?',
        ),
        (
            {"wires": 1},
            "wires: unknown key, its value is 1; known are: interfaces, macSeed, macPrefix, mac, ipamTypes, "
            "allowUnlisted",
        ),
        ([], "the document: [] is not allowed; give an object"),
    ],
)
def test_explain_names_path_value_and_what_is_allowed(value: Any, message: str) -> None:
    with pytest.raises(CniError) as caught:
        schema.explain(schema.load("policy"), value)
    assert (caught.value.code, caught.value.msg) == (7, message)


def test_unknown_key_goes_before_its_consequences() -> None:
    with pytest.raises(CniError) as caught:
        schema.explain(schema.load("netconf"), {"nmae": "x", "mtu": 1}, unknown=2)
    assert caught.value.code == 2
    assert caught.value.msg == 'nmae: unknown key, its value is "x"; did you mean "name"?'
    assert "name: is missing" in caught.value.details
    assert "mtu: 1 is not allowed" in caught.value.details


@pytest.mark.parametrize(
    "value", ["x" * 10_000, "\0" * 10_000, ["x"] * 10_000, {"x" * 10_000: 1}, [["x" * 300]]]
)
def test_show_is_bounded(value: Any) -> None:
    assert len(schema.show(value)) == 201
    assert schema.show(value).endswith("…")


def test_a_list_of_names_is_bounded() -> None:
    names = [f"n{number}" for number in range(1000)]
    assert schema.listed(names).endswith("n39 and 960 more")
    assert (schema.listed(names[:40]), schema.listed([])) == (", ".join(names[:40]), "none")


def test_show_is_one_line() -> None:
    assert schema.show("a\nb") == r'"a\nb"'


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((), ""),
        (("a",), "a"),
        (("a", 2, "b", 0), "a[2].b[0]"),
        (("a\n", "b"), r'"a\n".b'),
        (("a", "b" * 10_000), f'a."{"b" * 199}…'),
    ],
)
def test_path(parts: tuple[str | int, ...], text: str) -> None:
    assert schema.path(parts) == text


def test_the_page_is_what_the_schemas_generate() -> None:
    generated = runpy.run_path(str(ROOT / "docs/generate.py"))
    assert (ROOT / "docs/configuration.md").read_text() == generated["page"]()
    assert schema.accepts(schema.load("netconf"), generated["NETCONF_EXAMPLE"])
    assert schema.accepts(schema.load("policy"), yaml.safe_load(generated["POLICY_EXAMPLE"]))
    for at, field in FIELDS:
        if "$defs" not in at:
            assert field["description"] in generated["page"]()


def test_schemas_are_plain_ascii_json() -> None:
    for name in NAMES:
        (ROOT / f"cni/config/schema/{name}.json").read_text(encoding="ascii")
        json.dumps(schema.load(name))
