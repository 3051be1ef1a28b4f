"""What is accepted as a name, and how text that nobody has checked is printed."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.agent import log as logs
from cni.agent.metrics import Registry
from cni.errors import CniError
from cni.names import escaped, is_ifname, printable
from cni.state.record import parse_alias

UNPRINTABLE = {
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u115f\u3164\ufe0f\u2800\U000e0001\U000e0100",
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    *"\u2028\u2029\u00a0\u3000\ud800\udc80\udfff\ufffe\U0010ffff",
}
"""C0, DEL and C1; without a shape; bidirectional; line ends and blanks; surrogates and what is no character."""
TEXT = st.text(st.characters() | st.sampled_from(sorted(UNPRINTABLE)))


@pytest.mark.parametrize("letter", sorted(UNPRINTABLE), ids=ascii)
def test_the_kinds_of_unprintable_characters(letter: str) -> None:
    assert not printable(f"a{letter}b")
    assert not is_ifname(f"a{letter}b")
    assert parse_alias(f"vmtap/net/c1/a{letter}") is None
    assert parse_alias(f"vmtap/n{letter}/c1/net1") is None
    assert parse_alias(f"vmtap/net/c{letter}/net1") is None
    shown = escaped(f"a{letter}b")
    assert shown.isascii()
    assert json.loads(f'"{shown}"') == f"a{letter}b"


@pytest.mark.parametrize("text", ["net1", "äöü", "網", "→ ✔ “quoted” … é", "😀", ""])
def test_other_text_stays(text: str) -> None:
    assert printable(text)
    assert escaped(text) == text


@given(TEXT)
def test_whatever_is_printed_is_printable(text: str) -> None:
    assert printable(escaped(text))
    assert json.loads(escaped(json.dumps(text, ensure_ascii=False))) == text
    error = CniError(7, f"field: {text}", text)
    assert printable(str(error)) and printable(error.msg) and printable(error.details)
    line = logs._Json().format(_logged(text))
    assert printable(line)
    assert json.loads(line)["what"] == text
    registry = Registry()
    registry.gauge("m", "A gauge.", "label").set(1, text)
    rendered = registry.render(lambda name, error: pytest.fail(str(error))).decode()
    assert all(map(printable, rendered.splitlines()))
    assert len(rendered.splitlines()) == 3


def _logged(text: str) -> logging.LogRecord:
    record = logging.LogRecord("vmtapd", logging.INFO, "", 0, "request", None, None)
    record.fields = {"what": text}
    return record
