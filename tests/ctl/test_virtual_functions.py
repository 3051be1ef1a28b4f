"""Virtual functions in the output of tree, list, show and doctor. The NICs are faked, as snapshot.py returns them;
tests/hw/test_ctl.py has emulated NICs."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from cni.config.policy import Functions, Interface
from cni.ctl import picture, render, virtual_functions
from cni.ctl.inventory import Attachment, Node, Source
from cni.kernel.rtnl import Link
from cni.kernel.vf_settings import VfSettings
from cni.lower.vf_discovery import Function
from cni.state.record import Record, VfLink, VirtualFunction

NOW = datetime(2026, 11, 22, tzinfo=UTC)
PF = Source(
    "pf0",
    Link(2, "pf0", 1, 0x10043, "02:00:00:00:00:01", 1500),
    nics=("pf0",),
    functions=tuple(
        Function("pf0", number, f"0000:01:10.{number}", "igbvf", f"pf0v{number}", -1) for number in range(3)
    ),
    most=7,
    switch_mode="bridge",
)


def entry(vfs: int | None = None, *modes: str) -> Interface:
    return Interface("fast", "pf0", "sr-iov", modes or None, None, Functions(("pf0",), vfs, VfSettings()))


def attachment(number: int, mode: str = "bridge", **made: Any) -> Attachment:
    link = VfLink("02:00:00:00:00:08", 1500, 0, "", ipv6=True, pinned=False)
    pci = f"0000:01:10.{number}"
    vf = VirtualFunction(pci, number, "igbvf", VfSettings(), VfSettings(**made), link)
    record = Record(
        *(
            "net",
            f"c{number}",
            "net1",
            "/run/netns/x",
            (1, 2),
            3,
            "macvtap",
            4,
            "02:00:00:00:00:09",
            1500,
            1,
            "b",
        ),
        interface="fast",
        source="pf0",
        mode=mode,
        vf=vf,
    )
    return Attachment(record, NOW, "idle")


def node(source: Source = PF, *attached: Attachment) -> Node:
    return Node("n1", NOW, (replace(source, entries=(entry(),)),), attached)


def said(source: Source, of: Interface, *attached: Attachment) -> list[tuple[str, str]]:
    found = list(virtual_functions.faults(node(source, *attached), source, of))
    assert all(step for _, _, step in found)
    return [(severity, what) for severity, what, _ in found]


WITHOUT_VFS = replace(PF, functions=())


@pytest.mark.parametrize(
    ("source", "of", "severity", "what"),
    [
        (replace(WITHOUT_VFS, most=0), entry(), "error", "has no virtual functions"),
        (WITHOUT_VFS, entry(), "error", "0 of 7 VFs are made"),
        (WITHOUT_VFS, entry(9), "error", "sets vfs: 9, and the NIC can have 7"),
        (
            replace(PF, switch_mode=None),
            entry(None, "vepa"),
            "warning",
            "cannot set the mode of the embedded switch",
        ),
    ],
)
def test_what_is_wrong_with_a_pf(source: Source, of: Interface, severity: str, what: str) -> None:
    ((how, why),) = said(source, of)
    assert how == severity
    assert what in why


def test_nothing_is_wrong() -> None:
    assert said(PF, entry()) == []
    assert said(WITHOUT_VFS, entry(4)) == [], "an ADD makes them"
    assert said(PF, entry(), attachment(0), attachment(1)) == []


@pytest.mark.parametrize(("driver", "what"), [("vfio-pci", "the driver vfio-pci"), (None, "no driver")])
def test_a_function_that_no_vm_gets(driver: str | None, what: str) -> None:
    first = replace(PF.functions[0], driver=driver, link=None)
    source = replace(PF, functions=(first, *PF.functions[1:]))
    assert said(source, entry()) == [("warning", f"VF 0 has {what}, and no link on this host: no VM gets it")]
    assert said(source, entry(), attachment(0)) == [], "it is being bound anew"
    assert "2 free" in virtual_functions.summary(node(source), source)


def test_the_embedded_switch_has_another_mode_than_guests_need() -> None:
    ((severity, why),) = said(PF, entry(), attachment(0, "vepa"), attachment(1, "vepa"))
    assert severity == "error"
    assert "in mode bridge, and net1 of c0 needs vepa" in why


def test_how_many_are_made_and_free() -> None:
    assert (
        virtual_functions.summary(node(PF, attachment(1)), PF)
        == "3 of 7 VFs made, 2 free, embedded switch in mode bridge"
    )


def text(shown: Any) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=200).print(shown)
    return [line.strip(" │├└─").rstrip() for line in out.getvalue().splitlines()]


def test_the_tree_has_the_function_between_its_pf_and_the_attachment() -> None:
    lines = text(render.tree(node(PF, attachment(2, vlan=(100, 0, 0x8100)), attachment(0))))
    assert lines[1:] == [
        "pf0  up  mtu 1500  3 of 7 VFs made  [fast]",
        "VF 0  pf0v0  0000:01:10.0",
        "net1  macvtap bridge  02:00:00:00:00:09  ● idle",
        "sandbox c0",
        "VF 2  pf0v2  0000:01:10.2",
        "net1  macvtap bridge  02:00:00:00:00:09  VLAN 100  ● idle",
        "sandbox c2",
    ]
    gone = text(render.tree(node(WITHOUT_VFS, attachment(2))))
    assert gone[2] == "VF 2  gone"


def test_list_show_and_the_picture_name_it() -> None:
    one = attachment(2, vlan=(100, 0, 0x8100))
    assert any("pf0 VF 2" in line for line in text(render.attachments([one], render.console(), wide=False)))
    details = text(render.details(one))
    assert "virtual function  VF 2, 0000:01:10.2" in details
    assert "VLAN              100" in details
    assert (one.document()["virtualFunction"], one.document()["vlan"]) == (
        {"number": 2, "address": "0000:01:10.2"},
        100,
    )
    drawn = picture.draw(node(PF, one))
    assert "idle · VF 2 · macvtap bridge" in drawn
    assert "3 of 7 VFs made" in drawn
    made = PF.document()["virtualFunctions"]
    assert (made["most"], made["switchMode"], len(made["made"])) == (7, "bridge", 3)
