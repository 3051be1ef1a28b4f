"""The command as a user runs it: exit codes, messages of one line, and a real QEMU on a real macvtap."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.errors import CniError
from cni.kernel import netns
from cni.launcher import NO_VHOST, __main__, privilege
from tests.unit.launcher.attached import LAUNCH, QEMU, pod, record, save
from tests.waiting import LIMIT, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.launcher.attached import Pod


def launch(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    ended = subprocess.run(
        [*LAUNCH, *arguments],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    return ended.returncode, ended.stdout, ended.stderr


def own_netns() -> tuple[int, int]:
    return netns.own_identity()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMTAP_RUN", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the QEMU command is missing"),
        (["--"], "the QEMU command is missing"),
        (["--nets", "/x", "--", "true"], "unrecognized arguments: --nets"),
        (["qemu-system-x86_64", "-m", "64"], "unrecognized arguments"),
        (["--user", "root", "--", "true"], "--user 'root' is 0:0"),
        (["--user", "no-such-user", "--", "true"], "no such user"),
        (["--queues", "0", "--", "true"], "--queues: '0'"),
        (["--queues", "two", "--", "true"], "--queues: invalid"),
        (["--vhost", "maybe", "--", "true"], "--vhost: invalid choice"),
        (["--supervise", "--deadline", "nan", "--", "true"], "--deadline: 'nan'"),
        (["--supervise", "--deadline", "-1", "--", "true"], "--deadline: '-1'"),
        (["--deadline", "5", "--", "true"], "--deadline needs --supervise"),
        (["--ifname", "a", "--ifname", "a", "--", "true"], "names one attachment twice"),
        (["--supervise", "--", "true", "-daemonize"], "-daemonize"),
    ],
)
def test_usage(arguments: list[str], says: str) -> None:
    status, out, err = launch(*arguments)
    assert (status, out) == (os.EX_USAGE, "")
    assert says in err and err.startswith("vmtap-launch: ") and err.count("\n") == 1


def test_help_is_no_error() -> None:
    status, out, err = launch("--help")
    assert (status, err) == (0, "")
    assert "--netns" in out


def test_not_root(folder: Path) -> None:
    """It becomes another user when all is imported: that user need not be able to read this checkout."""
    code = """
import os
from cni.launcher.__main__ import main
os.setresuid(7, 7, 7)
raise SystemExit(main(["--", "true"]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert ended.returncode == os.EX_NOPERM
    assert "must start as root" in ended.stderr and ended.stderr.count("\n") == 1


def test_no_qemu_names_the_package(folder: Path, tmp_path: Path) -> None:
    status, _, err = launch("--", "qemu-system-x86_64", env={"PATH": str(tmp_path)})
    assert status == 127
    assert err == (
        "vmtap-launch: qemu-system-x86_64 is not installed: "
        "apt-get install --no-install-recommends qemu-system-x86\n"
    )


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("/no/qemu-system-i386", "qemu-system-x86"),
        ("kvm", "qemu-system"),
    ],
)
def test_packages(program: str, package: str) -> None:
    with pytest.raises(CniError, match=f"{package}$"):
        __main__.find(program, {"PATH": "/nowhere"})


def test_qemu_that_is_not_executable(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "qemu").touch(mode=0o644)
    for program, env in ((str(tmp_path / "qemu"), {}), ("qemu", {"PATH": str(tmp_path)})):
        status, _, err = launch("--", program, env=env)
        assert (status, err.count("\n")) == (126, 1)
        assert "not executable" in err


def test_a_netns_that_is_none(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        status, _, err = launch("--netns", str(path), "--", "true")
        assert (status, err.count("\n")) == (os.EX_NOINPUT, 1)
        assert str(path) in err


def test_no_attachment_at_all(folder: Path) -> None:
    save(folder, record(netns_id=(1, 2)))  # of another pod
    status, _, err = launch("--", "true")
    assert (status, err.count("\n")) == (os.EX_UNAVAILABLE, 1)
    assert "no attachment in this network namespace" in err


def test_no_attachment_of_that_name_lists_what_there_is(folder: Path) -> None:
    save(folder, record(netns_id=own_netns()))
    save(folder, record(netns_id=own_netns(), ifname="net2"))
    status, _, err = launch("--ifname", "net3", "--ifname", "net1", "--", "true")
    assert (status, err.count("\n")) == (os.EX_UNAVAILABLE, 1)
    assert "no attachment net3 in" in err and "there is net1, net2" in err


def test_a_link_that_is_gone(folder: Path) -> None:
    save(folder, record(netns_id=own_netns(), ifname="gone"))
    status, _, err = launch("--", "true")
    assert (status, err.count("\n")) == (os.EX_UNAVAILABLE, 1)
    assert "gone" in err


def test_a_stale_record_hides_nothing(folder: Path) -> None:
    """Records of an earlier namespace of this inode number: of the ifname of the live attachment, and of another."""
    with pod(folder) as there:
        made = there.macvtap("net1")
        stale = {"netns_id": made.netns_id, "mac": "02:00:00:00:00:99"}
        for index, (container, ifname) in enumerate(
            [("a-before", "net1"), ("other", "net0"), ("z-after", "net1")], made.ifindex + 1
        ):
            save(folder, record(**stale, ifname=ifname, container_id=container, ifindex=index))
        launched = launch("--netns", there.path, "--", "true")
        shown = launch("--netns", there.path, "--print", "--", "true")
        named = launch("--netns", there.path, "--ifname", "net1", "--", "true")
        gone = launch("--netns", there.path, "--ifname", "net0", "--", "true")
    assert launched == named == (0, "", "")
    assert re.findall(r"mac=([0-9a-f:]*)", shown[1]) == [made.mac]
    assert gone[0] == os.EX_UNAVAILABLE
    assert "there is no macvtap net0" in gone[2]


def test_more_queues_than_there_are(folder: Path) -> None:
    save(folder, record(netns_id=own_netns(), queues=2))
    status, _, err = launch("--queues", "3", "--print", "--", "true")
    assert (status, err.count("\n")) == (os.EX_USAGE, 1)
    assert "net1 has 2" in err


@pytest.mark.parametrize(("wanted", "count"), [(None, 4), (1, 1), (4, 4)])
def test_queues_may_be_fewer(wanted: int | None, count: int) -> None:
    assert __main__.queue_count(record(queues=4), wanted) == count


def test_print_shows_the_command_and_opens_nothing(folder: Path) -> None:
    save(folder, record(netns_id=own_netns(), ifname="gone", queues=2))  # opening it would fail
    status, out, err = launch("--print", "--seed", "--supervise", "--", "true", "a b")
    assert (status, err) == (0, "")
    words = shlex.split(out)
    assert words[:4] == ["true", "a b", "-netdev", "tap,id=vmtap0,fds=3:4"]
    assert "socket,id=vmtap-qmp,fd=6,server=off" in words


def test_ifnames_choose_and_order(folder: Path) -> None:
    for index in (1, 2, 3):
        save(folder, record(netns_id=own_netns(), ifname=f"net{index}", mac=f"02:00:00:00:00:0{index}"))
    _, out, _ = launch("--print", "--ifname", "net3", "--ifname", "net1", "--", "true")
    assert re.findall(r"mac=[0-9a-f:]*(\d)", out) == ["3", "1"]


def test_vhost_where_the_host_has_it(tmp_path: Path) -> None:
    """A file stands in for /dev/vhost-net: whether it can be opened is all that is asked here."""
    (tmp_path / "vhost-net").touch()
    there, missing = str(tmp_path / "vhost-net"), str(tmp_path / "missing")
    assert [__main__.vhost_wanted(choice, there) for choice in ("on", "off", "auto")] == [True, False, True]
    assert [__main__.vhost_wanted(choice, missing) for choice in ("off", "auto")] == [False, False]
    with pytest.raises(CniError, match="vhost_net") as caught:
        __main__.vhost_wanted("on", missing)
    assert (caught.value.code, __main__.EXIT[NO_VHOST]) == (NO_VHOST, os.EX_UNAVAILABLE)


def test_every_own_code_has_an_exit_code() -> None:
    own = {
        value
        for name, value in vars(__main__).items()
        if name.startswith(("NO", "QEMU")) and isinstance(value, int)
    }
    assert len(own) == 4
    assert own <= set(__main__.EXIT)


def test_closed_stdio_is_never_a_queue(folder: Path) -> None:
    with pod(folder) as there:
        there.macvtap("net1")
        command = [*LAUNCH, "--netns", there.path, "--", "sh", "-c", "ls -l /proc/$$/fd; exit 3"]
        script = f"exec {shlex.join(command)} <&- 2>&-"
        ended = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, check=False, timeout=LIMIT
        )
    assert ended.returncode == 3
    links = dict(re.findall(r" (\d+) -> (\S+)", ended.stdout))
    assert links["0"] == links["2"] == "/dev/null"
    assert "node" in links["3"]


def test_a_program_that_the_user_may_not_run(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with pod(folder) as there:
        there.macvtap("net1")
        for extra in ([], ["--supervise"]):
            status, _, err = launch("--netns", there.path, *extra, "--", str(program))
            assert (status, err.count("\n")) == (126, 1), err
            assert "cannot be run as 107:107" in err


def test_a_busy_tap(folder: Path) -> None:
    with pod(folder) as there:
        there.tap("net1", queues=1)
        holder = [*LAUNCH, "--netns", there.path, "--", "sh", "-c", "echo there; read end"]
        with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout and first.stdout.readline() == b"there\n"
            status, _, err = launch("--netns", there.path, "--", "true")
    assert (status, err.count("\n")) == (os.EX_TEMPFAIL, 1)
    assert "in use" in err


class Vm:
    """A launched QEMU that answers on its own stdio."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        """What is not QMP: QEMU's qemu-io prints."""

    def ask(self, execute: str, **arguments: object) -> Any:
        assert self.process.stdout
        self._send({"execute": execute, "arguments": arguments})
        for line in self.process.stdout:
            if not line.startswith("{"):
                self.said.append(line)
                continue
            answer = json.loads(line)
            if answer.get("id") == "wake":
                continue
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"no answer to {execute}")

    def keep_awake(self, over: threading.Event) -> None:
        """QEMU 7.2 can oversleep a command when it has two monitors: another one wakes it."""
        while not over.wait(1):
            with suppress(BrokenPipeError):
                self._send({"execute": "query-status", "id": "wake"})

    def _send(self, request: dict[str, object]) -> None:
        assert self.process.stdin
        # One write, so that two threads may; and past the buffer, which nobody could empty when QEMU has ended.
        os.write(self.process.stdin.fileno(), json.dumps(request).encode() + b"\n")

    def qemu_io(self, command: str) -> str:
        self.said.clear()
        returned = self.ask("human-monitor-command", **{"command-line": f'qemu-io vmtap-seed "{command}"'})
        return "".join([*self.said, returned])


@contextmanager
def qemu(there: Pod, *options: str) -> Iterator[Vm]:
    command = [*LAUNCH, "--netns", there.path, *options, "--", *QEMU, "-qmp", "stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        vm, over = Vm(process), threading.Event()
        waker = threading.Thread(target=vm.keep_awake, args=[over])
        waker.start()
        try:
            with watched(process):
                vm.ask("qmp_capabilities")
                yield vm
        finally:
            over.set()
            process.kill()
            waker.join()  # before the pipe is closed that it writes to


def family(process: subprocess.Popen[str]) -> list[Path]:
    """The launcher, if it is still there, and QEMU, in /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path(f"/proc/{pid}") for pid in (process.pid, *children)]


def nodes_of(proc: Path) -> set[str]:
    """The fds on which the process has a device."""
    found = set()
    for fd in (proc / "fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU has closed it meanwhile
            if fd.readlink().name == "node":
                found.add(fd.name)
    return found


@pytest.mark.vm
@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("device", ["macvtap", "tap"])
def test_qemu_on_an_attachment(folder: Path, device: str, queues: int, supervised: bool) -> None:
    user = privilege.User(4242, 4243)
    options = ["--user", str(user), *(["--supervise"] if supervised else [])]
    with pod(folder) as there:
        made = getattr(there, device)("net1", queues=queues)
        with qemu(there, *options) as vm:
            members = family(vm.process)
            assert len(members) == 1 + supervised
            for proc in members:
                assert privilege.excess((proc / "status").read_text().splitlines(), user) == []
            held = [nodes_of(proc) for proc in members]
            assert held == [set()] * supervised + [{"3", "4"} if queues == 2 else {"3"}]
            path = "/machine/peripheral-anon"
            [card] = [
                part for part in vm.ask("qom-list", path=path) if part["type"] == "child<virtio-net-pci>"
            ]
            properties = {
                name: vm.ask("qom-get", path=f"{path}/{card['name']}", property=name)
                for name in ("mac", "host_mtu", "mq")
            }
            assert properties == {
                "mac": made.mac,
                "host_mtu": made.mtu,
                "mq": queues > 1,
            }
            vm.ask("quit")
            assert vm.process.wait(LIMIT) == 0


@pytest.mark.vm
def test_qemu_opens_the_seed_without_privilege(folder: Path) -> None:
    with pod(folder) as there:
        there.macvtap("net1", ips=({"address": "10.1.0.5/24"},))
        with qemu(there, "--seed") as vm:
            assert "cidata" in vm.qemu_io("read -v 32808 16")


@pytest.mark.vm
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_disk_boots_beside_the_seed(folder: Path, machine: str) -> None:
    """The boot sector ends QEMU with a status of its own: 42 * 2 + 1 (isa-debug-exit)."""
    boot = bytes.fromhex("baf400 b02a ee f4").ljust(510, b"\0") + b"\x55\xaa"
    with pod(folder) as there, tempfile.NamedTemporaryFile() as disk:
        disk.write(boot.ljust(1 << 20, b"\0"))
        disk.flush()
        os.fchmod(disk.fileno(), 0o444)
        there.macvtap("net1")
        status, _, err = launch(
            *(
                "--netns",
                there.path,
                "--seed",
                "--",
                *QEMU,
                "-M",
                machine,
                "-device",
                "isa-debug-exit,iobase=0xf4,iosize=1",
            ),
            *("-drive", f"file={disk.name},format=raw,if=virtio,read-only=on"),
        )
    assert status == 42 * 2 + 1, err


@pytest.mark.vm
@pytest.mark.parametrize("supervised", [False, True])
def test_qemu_that_dies_at_once(folder: Path, supervised: bool) -> None:
    with pod(folder) as there:
        there.macvtap("net1")
        options = ["--supervise"] if supervised else []
        status, _, err = launch("--netns", there.path, *options, "--", *QEMU, "-device", "no-such-device")
    assert status == 1
    assert "no-such-device" in err
    assert ("vmtap-launch: QEMU ended at once with status 1" in err) == supervised


@pytest.mark.vm
def test_a_signal_to_the_launcher_ends_qemu_in_order(folder: Path) -> None:
    with pod(folder) as there:
        there.macvtap("net1")
        with qemu(there, "--supervise", "--deadline", "0.2") as vm:
            process = vm.process
            assert process.stdout
            process.terminate()
            said = process.stdout.read()
            assert process.wait(LIMIT) == 0
        assert said.index("POWERDOWN") < said.index("host-qmp-quit")


def test_a_start_imports_only_what_it_needs(folder: Path) -> None:
    save(folder, record(netns_id=own_netns()))
    code = """
import sys
import threading
from cni.launcher import __main__
assert __main__.main(["--print", "--", "true"]) == 0
late = {"pycdlib", "pyroute2", "jsonschema", "yaml", "asyncio", "logging", "socket", "subprocess"}
print(sorted(late & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[1] == "[]"
