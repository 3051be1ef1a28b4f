"""What needs no attachment: completion, usage, and how things are laid out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.ctl import __main__ as vmtapctl
from cni.ctl import doctor, lldp
from cni.ctl.finding import Finding
from cni.kernel.lldp import Neighbour
from tests.ctl.conftest import Ctl
from tests.ctl.test_inventory import KEYS
from tests.runner import BIN
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.wire import Netns


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_understands_its_completion(shell: str, tmp_path: Path) -> None:
    assert shutil.which(shell), f"{shell} is missing: lab/setup test installs it"
    script = subprocess.run(
        [BIN / "vmtapctl", "completion", shell], capture_output=True, text=True, check=True
    ).stdout
    file = tmp_path / "completion"
    file.write_text(script)
    done = subprocess.run([shell, "-n", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("vmtapctl do", {"doctor"}),
        ("vmtapctl show we", {"web"}),
        ("vmtapctl trace 10.77.0.9 we", {"web"}),
        ("vmtapctl capture we", {"web"}),
        ("vmtapctl completion f", {"fish"}),
        ("vmtapctl probe et", {"eth1", "eth2"}),
    ],
)
def test_bash_completes(ctl: Ctl, pod: Netns, tmp_path: Path, line: str, offers: set[str]) -> None:
    """As its script does it; the names are those of this node's attachments."""
    ctl.add(pod, name="virt-launcher-web-x7b2d")
    said = tmp_path / "said"
    env = ctl.env(_ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE_IFS="\n")
    env["_ARGCOMPLETE_STDOUT_FILENAME"] = str(said)
    subprocess.run(ctl.argv(), env=env, check=True, timeout=LIMIT)
    assert {word.strip() for word in said.read_text().split("\n")} == offers


@pytest.mark.parametrize(
    "words", [[], ["lost"], ["show"], ["tree", "--lldp", "0"], ["probe"], ["trace", "a"], ["list", "--jso"]]
)
def test_usage(words: list[str]) -> None:
    done = subprocess.run([BIN / "vmtapctl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == os.EX_USAGE
    assert done.stderr.startswith("usage: vmtapctl")


@pytest.mark.parametrize(
    ("severities", "status", "strict"),
    [
        (("ok",), 0, 0),
        (("ok", "warning"), 0, 1),
        (("error",), 1, 1),
        (("warning", "error"), 1, 1),
    ],
    ids=str,
)
def test_the_exit_status_of_doctor(
    severities: tuple[str, ...], status: int, strict: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding("x", each, "x", "") for each in severities])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the process that runs the tests
    for json_too in ((), ("--json",)):
        assert vmtapctl.main(["doctor", *json_too]) == status
        assert vmtapctl.main(["doctor", "--strict", *json_too]) == strict


def test_colour_only_where_it_is_wanted(ctl: Ctl, pod: Netns) -> None:
    """script(1) is the terminal."""
    ctl.add(pod)
    command = ["script", "-qec", " ".join(ctl.argv("list")), "/dev/null"]
    coloured = ctl.env(TERM="xterm-256color")

    def said(env: dict[str, str]) -> str:
        return subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT,
        ).stdout

    assert "\x1b[36m● idle" in said(coloured)
    assert "\x1b[36m" not in said(coloured | {"NO_COLOR": "1"})
    assert "\x1b" not in ctl("list").stdout


def test_a_narrow_terminal_gets_fewer_columns(ctl: Ctl, pod: Netns) -> None:
    mac = ctl.add(pod, name="virt-launcher-web-x7b2d")
    command = ["script", "-qec", " ".join(ctl.argv("list")), "/dev/null"]
    done = subprocess.run(
        command,
        env=ctl.env(TERM="dumb", COLUMNS="72"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 72
    assert "HELD BY" not in done.stdout
    assert [
        line for line in lines if "shop/virt-launcher-web-x7b2d" in line and mac in line and "idle" in line
    ]


def test_what_lldpd_says() -> None:
    """Its json0, as lldpcli 1.0.16 printed it for a switch that calls its port by a MAC and describes it."""
    mac = {"type": "mac", "value": "4a:fd:ae:fe:de:6e"}
    interface = {
        "name": "eth1",
        "via": "LLDP",
        "chassis": [{"id": [mac], "name": [{"value": "leaf-12"}]}],
        "port": [{"id": [mac], "descr": [{"value": "node"}], "ttl": [{"value": "120"}]}],
    }
    assert lldp.of_lldpcli(json.dumps({"lldp": [{"interface": [interface]}]}).encode()) == {
        "eth1": Neighbour("leaf-12", "node")
    }
    assert lldp.of_lldpcli(b'{"lldp": [{}]}') == {}


def test_the_page_has_every_key_of_the_json() -> None:
    page = (Path(__file__).parents[2] / "docs/vmtapctl.md").read_text()
    assert [key for key in sorted(KEYS) if f"`{key}`" not in page] == []
