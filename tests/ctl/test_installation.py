"""vmtapctl install and uninstall: the shim in a runtime's folder, whole at any moment, and nothing else touched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent.conftest import SHIM, Agent
from tests.runner import BIN
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.wire import Lab, Netns
    from tests.ctl.conftest import Ctl

TEMPORARY = 75  # sysexits.h, EX_TEMPFAIL


def install(folder: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [BIN / "vmtapctl", "install", "--bin-dir", folder, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_install_again_and_replace(tmp_path: Path) -> None:
    folder = tmp_path / "cni/bin"
    assert install(folder) == f"{folder}/vmtap is installed\n"
    assert (folder / "vmtap").read_bytes() == SHIM.read_bytes()
    assert (folder / "vmtap").stat().st_mode & 0o7777 == 0o755
    assert install(folder) == f"{folder}/vmtap is up to date\n"
    (folder / "vmtap").write_bytes(b"an older one")
    (folder / "macvtap").symlink_to("/nowhere")
    assert json.loads(install(folder, "--as", "macvtap", "--json")) == {
        "done": [f"{folder}/vmtap is replaced", f"{folder}/macvtap is replaced"]
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(
        ("vmtap", "macvtap"), SHIM.read_bytes()
    )
    assert not (folder / "macvtap").is_symlink()


def test_a_runtime_never_finds_half_a_shim(tmp_path: Path) -> None:
    """Executed again and again while it is replaced, by two installers at once: neither ENOENT nor ETXTBSY."""
    install(tmp_path)
    over = threading.Event()
    failed: list[str] = []

    def replace() -> None:
        for _ in range(5):
            shim = tmp_path / "vmtap"
            shim.chmod(0o700)  # makes it a stranger's, which is replaced
            install(tmp_path)

    def execute() -> None:
        while not over.is_set():
            done = subprocess.run(
                [tmp_path / "vmtap"],
                env={"CNI_COMMAND": "VERSION", "VMTAP_RUN": str(tmp_path / "run")},
                input=b'{"cniVersion": "1.0.0"}',
                capture_output=True,
                check=False,
                timeout=LIMIT,
            )
            if done.returncode or b"supportedVersions" not in done.stdout:
                failed.append(str(done))

    runtime = threading.Thread(target=execute)
    runtime.start()
    installers = [threading.Thread(target=replace) for _ in range(2)]
    for each in installers:
        each.start()
    for each in installers:
        each.join()
    over.set()
    runtime.join()
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["vmtap"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    install(tmp_path / "file", status=os.EX_OSERR)


def test_uninstall_takes_what_is_ours(ctl: Ctl, tmp_path: Path) -> None:
    """An older shim is known by what it says of itself, a stranger's file by what it does not."""
    folder = tmp_path / "bin"
    install(folder)
    (folder / "macvtap").write_bytes(SHIM.read_bytes() + b"another version")
    (folder / ".vmtap-shim-killed").write_bytes(SHIM.read_bytes()[:100])
    (folder / "bridge").write_bytes(b"somebody's")
    said = ctl("uninstall", "--bin-dir", folder).stdout
    assert said == f"{folder}/vmtap is removed\n{folder}/macvtap is removed\n"
    assert [path.name for path in folder.iterdir()] == ["bridge"]
    (folder / "macvtap").write_bytes(b"the old plugin")
    (folder / "vmtap").symlink_to(BIN / "vmtap")
    assert ctl("uninstall", "--bin-dir", folder).stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == ["bridge", "macvtap", "vmtap"]


def test_uninstall_where_nothing_is(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("uninstall", "--state", "--bin-dir", tmp_path / "none").stdout == ""


def test_uninstall_waits_for_the_last_pod(ctl: Ctl, pod: Netns, tmp_path: Path) -> None:
    install(tmp_path / "bin")
    uninstall: tuple[Any, ...] = ("uninstall", "--bin-dir", tmp_path / "bin", "--state")
    ctl.add(pod, name="web")
    refused = ctl(*uninstall, status=TEMPORARY)
    assert "pods are attached (shop/web)" in refused.stderr
    assert (tmp_path / "bin/vmtap").exists()
    assert ctl.plugin.state.exists()
    ctl.delete(pod)
    ctl(*uninstall)
    assert not (tmp_path / "bin/vmtap").exists()
    assert not ctl.plugin.state.exists()


def test_uninstall_by_force(ctl: Ctl, pod: Netns, tmp_path: Path) -> None:
    install(tmp_path)
    ctl.add(pod)
    ctl("uninstall", "--bin-dir", tmp_path, "--force")
    assert not (tmp_path / "vmtap").exists()
    assert ctl.plugin.state.exists()
    ctl.delete(pod)


def test_state_of_a_running_agent_stays(ctl: Ctl, lab: Lab, tmp_path: Path) -> None:
    agent = Agent(lab.node, ctl.plugin.state, ctl.plugin.policy).start()
    try:
        assert "an agent runs" in ctl("uninstall", "--bin-dir", tmp_path, "--state", status=TEMPORARY).stderr
        ctl("uninstall", "--bin-dir", tmp_path)
    finally:
        agent.end()
    ctl("uninstall", "--bin-dir", tmp_path, "--state")
    assert not ctl.plugin.state.exists()


@pytest.mark.parametrize(
    ("mounted", "kind"),
    [(".", "tmpfs"), (".", "bind"), ("attachments", "tmpfs"), ("agent/held", "bind"), ("file", "bind")],
)
def test_mount_points_in_the_state_stay(ctl: Ctl, tmp_path: Path, mounted: str, kind: str) -> None:
    """The state folder may be a mount, or contain one, of a folder or a file: rmdir and unlink fail with EBUSY."""
    state = tmp_path / "run"
    point = (state / mounted).resolve()
    if mounted == "file":
        state.mkdir()
        point.touch()
        (tmp_path / "other").touch()
    else:
        point.mkdir(parents=True)
        (tmp_path / "other").mkdir()
    what = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", tmp_path / "other"]
    subprocess.run(["mount", *what, point], check=True)
    try:
        if mounted != "file":
            (point / "sub").mkdir()
            (point / "sub/record.json").write_text("{}")
        (state / "beside").touch()
        for _ in range(2):  # it may be repeated
            done = ctl("uninstall", "--state", "--run", state, "--bin-dir", tmp_path / "bin")
            assert done.stdout == f"{state} is removed, except for mount points: {point}\n"
            assert done.stderr == ""
            expected = {parent for parent in [point, *point.parents] if parent.is_relative_to(state)}
            assert {state, *state.rglob("*")} == expected
            assert os.path.lexists(point)
    finally:
        subprocess.run(["umount", point], check=True)
    ctl("uninstall", "--state", "--run", state, "--bin-dir", tmp_path / "bin")
    assert not state.exists()


def test_a_state_folder_that_is_a_link(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "there/agent").mkdir(parents=True)
    state = tmp_path / "run"
    state.symlink_to(tmp_path / "there")
    done = ctl("uninstall", "--state", "--run", state, "--bin-dir", tmp_path / "bin")
    assert done.stdout == f"{state} is removed\n"
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_that_is_read_only(ctl: Ctl, tmp_path: Path) -> None:
    """Only a mount point is left in place with exit status 0."""
    state = tmp_path / "run"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", state], check=True)
    try:
        (state / "record.json").touch()
        subprocess.run(["mount", "-o", "remount,ro", state], check=True)
        done = ctl("uninstall", "--state", "--run", state, "--bin-dir", tmp_path / "bin", status=os.EX_OSERR)
        assert "Read-only file system" in done.stderr
    finally:
        subprocess.run(["umount", state], check=True)


def test_cdi_files_go_with_the_state(ctl: Ctl, tmp_path: Path) -> None:
    cdi = tmp_path / "cdi"
    cdi.mkdir()
    (cdi / "vmtap-dataMvp0.json").write_text(
        '{"cdiVersion": "0.5.0", "kind": "vmtap.dev/tap", "devices": []}'
    )
    (cdi / "vmtap-theirs.json").write_text(
        '{"cdiVersion": "0.5.0", "kind": "example.com/nic", "devices": []}'
    )
    (tmp_path / "agent.yaml").write_text(f"cdi: {cdi}\n")
    ctl("uninstall", "--bin-dir", tmp_path, "--state", "--config", tmp_path / "agent.yaml")
    assert [path.name for path in cdi.iterdir()] == ["vmtap-theirs.json"]


def test_the_drivers_folder_goes_with_the_state(ctl: Ctl, tmp_path: Path) -> None:
    """With the sockets of killed agents. What is another driver's stays, and what is served."""
    uninstall = ("uninstall", "--bin-dir", tmp_path, "--state", "--config", tmp_path / "agent.yaml")
    with tempfile.TemporaryDirectory(prefix="kubelet-") as short:  # a socket's path has 107 bytes at most
        kubelet = Path(short)
        own, registry = kubelet / "plugins/vmtap.dev", kubelet / "plugins_registry"
        own.mkdir(parents=True)
        registry.mkdir()
        (tmp_path / "agent.yaml").write_text(f"kubelet: {kubelet}/device-plugins\n")
        paths = own / "dra-1.sock", registry / "vmtap.dev-1-reg.sock", registry / "theirs-reg.sock"
        for path in paths:
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        with socket.socket(socket.AF_UNIX) as served:
            served.bind(str(own / "dra-2.sock"))
            served.listen()
            ctl(*uninstall)
            assert [path.exists() for path in paths] == [False, False, True]
            assert (own / "dra-2.sock").exists()
        assert f"{own} is removed" in ctl(*uninstall).stdout
        assert not own.exists()
        assert own.parent.exists()
        assert "plugins" not in ctl(*uninstall).stdout


def test_a_package_without_a_shim_says_so(tmp_path: Path) -> None:
    package = tmp_path / "cni"
    shutil.copytree(SHIM.parents[1], package, ignore=shutil.ignore_patterns("vmtap", "__pycache__"))
    done = subprocess.run(
        [BIN / "python", "-m", "cni.ctl", "install", "--bin-dir", tmp_path / "bin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == os.EX_IOERR
    assert "VMTAP_NO_SHIM" in done.stderr


@pytest.mark.parametrize("name", ["bridge", "../vmtap"])
def test_no_other_name(tmp_path: Path, name: str) -> None:
    install(tmp_path, "--as", name, status=os.EX_USAGE)
