"""vmtapctl prints no control, bidirectional or invisible character of what others have named, in any format."""

from __future__ import annotations

import json
import re
import signal
import xml.etree.ElementTree as ET
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from cni.ctl import commands, doctor, lldp, probe, snapshot, watch
from cni.ctl.__main__ import main
from cni.ctl.finding import Finding
from cni.ctl.inventory import Attachment, Node, Source
from cni.ctl.open_devices import Holder
from cni.errors import CniError
from cni.kernel.lldp import Neighbour, parse
from cni.names import printable
from cni.state.probe_results import Probed
from cni.state.record import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

EVIL = "a\x1b[2J\x1b]0;x\x07b\x9b31mc\x7fd\u202ee\u200bf\udc80"
NAME = EVIL[:-1]
"""A surrogate cannot be in a record's key."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _node() -> Node:
    record = Record(
        network=NAME, container_id=f"c{NAME}", ifname=NAME, netns=f"/run/{EVIL}", netns_id=(4, 1), nsid=1,
        device="macvtap", ifindex=1, mac=EVIL, mtu=1500, queues=1, boot_id="b", interface=EVIL, source=EVIL,
        mode="bridge", node=f"/dev/{EVIL}", ips=({"address": EVIL},),
        args=f"K8S_POD_NAMESPACE={EVIL};K8S_POD_NAME={EVIL}",
    )  # fmt: skip
    holder = Holder(1, 107, EVIL, EVIL, 1)
    source = Source(EVIL, None, nics=(EVIL,), neighbours=(Neighbour(EVIL, EVIL),))
    attachment = Attachment(record, datetime.now(UTC), "in use", holders=(holder,))
    return Node(EVIL, datetime.now(UTC), (source,), (attachment,), {EVIL: EVIL})


@pytest.fixture(autouse=True)
def evil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "take", lambda *_, **__: _node())
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding(EVIL, "error", f"{EVIL}\n{EVIL}", EVIL)])
    found = Probed(EVIL, False, EVIL, EVIL, 1, "b")
    made = probe.Probe(found, 1.0, {EVIL: Neighbour(EVIL, EVIL)}, {})
    monkeypatch.setattr(probe, "run", lambda *_: made)
    monkeypatch.setattr(watch, "_News", _NoNews)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # SIGPIPE would end what runs the tests


class _NoNews:
    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> _NoNews:
        return self

    def __exit__(self, *_: object) -> None: ...
    def follow(self, *_: Any) -> None: ...
    def wait(self) -> bool:
        return False


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with suppress(SystemExit):
        main(words)
    out, err = capsys.readouterr()
    for line in COLOURS.sub("", out + err).split("\n"):
        assert printable(line), ascii(line)
    assert out or err
    return out


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("list",), ("list", "--wide"), ("show", NAME), ("show", f"x{EVIL}"), ("tree",), ("watch",), ("doctor",),
    ("capture", NAME), ("probe", "x"), ("lint", f"/{EVIL}"), (EVIL,), ("list", EVIL),
    ("trace", NAME, "::1"), ("trace", NAME, EVIL), ("trace", EVIL, EVIL),
)  # fmt: skip


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("words", COMMANDS, ids=ascii)
def test_for_people(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: Sequence[str], colours: bool
) -> None:
    if colours and words[0] != "watch":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "500")
    assert printed(capsys, *words) is not None


@pytest.mark.parametrize("words", [each for each in COMMANDS if each[0] in commands.COMMANDS], ids=ascii)
def test_for_programs(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> None:
    out = printed(capsys, *words, "--json")
    if out:
        json.loads(out)


def test_in_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    ET.fromstring(printed(capsys, "tree", "--svg", "-"))  # noqa: S314 - our own


def test_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (CniError(5, EVIL, EVIL), OSError(5, EVIL, EVIL), PermissionError(1, EVIL)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Node:
            raise error

        monkeypatch.setattr(snapshot, "take", fail)
        printed(capsys, "list")


def test_lldp_from_the_wire_and_from_lldpd() -> None:
    tlv = bytes([5 << 1, 4]) + b"\x1b[2J"
    frame = bytes(14) + bytes([1 << 1, 3, 7]) + b"\x9b1" + bytes([2 << 1, 3, 5]) + b"p\n" + tlv + bytes(2)
    assert parse(frame) == Neighbour(r"\u001b[2J", r"p\n")
    port = [{"id": [{"type": "ifname", "value": "p\n"}]}]
    known = {
        "lldp": [{"interface": [{"name": "eth1", "chassis": [{"name": [{"value": EVIL}]}], "port": port}]}]
    }
    (neighbour,) = lldp.of_lldpcli(json.dumps(known).encode()).values()
    assert printable(neighbour.system) and printable(neighbour.port)
