"""folder.py, and the programs that use it: VMTAP_RUN names the folder, VMTAP_STATE is its deprecated alias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cni.ctl import locations
from cni.launcher import __main__ as launcher
from cni.state import folder

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = [
    ({}, None),
    ({"VMTAP_RUN": ""}, None),
    ({"VMTAP_RUN": "/a"}, "/a"),
    ({"VMTAP_STATE": "/b"}, "/b"),
    ({"VMTAP_RUN": "", "VMTAP_STATE": "/b"}, "/b"),
    ({"VMTAP_RUN": "/a", "VMTAP_STATE": "/b"}, "/a"),
]


@pytest.mark.parametrize(("env", "named"), CASES)
def test_the_folder_has_one_name_and_an_alias(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], named: str | None
) -> None:
    for name in ("VMTAP_RUN", "VMTAP_STATE"):
        monkeypatch.delenv(name, raising=False)
        if name in env:
            monkeypatch.setenv(name, env[name])
    programs: list[Callable[[], str | None]] = [
        lambda: folder.named(env) or folder.DEFAULT,
        lambda: launcher._state(env),
        lambda: locations.load(run=None, policy=None, file=None).run,
    ]
    assert [program() for program in programs] == [named or "/run/vmtap"] * 3
