"""vmtapctl capture: real frames by a guest's fd and from the wire, and what its file and its summary have of them."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.ctl import dissect, libpcap
from cni.errors import CniError
from cni.names import printable
from lab.frames import BROADCAST, VNET_HEADER, packet_socket
from lab.wire import BRIDGE, NIC
from tests.ctl.conftest import Ctl
from tests.netns.test_port import FOREIGN, SPOOFED, arp, ethernet
from tests.waiting import LIMIT, until, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab
    from tests.netns.conftest import Attached
    from tests.runner import Plugin

KINDS: dict[str, dict[str, Any]] = {
    "macvtap": {"source": NIC, "mode": "bridge"},
    "tap": {"source": BRIDGE, "mode": "bridge"},
}
TAG = ((0x8100, 100),)
PRIORITY = ((0x8100, 0x6000 | 100),)
SERVICE = ((0x88A8, 7), (0x8100, 100))
ARP = 0x0806


@dataclass(frozen=True)
class Frame:
    """A frame of a pcapng file."""

    data: bytes
    size: int
    out: bool
    time: float


def read(raw: bytes) -> tuple[list[Frame], dict[int, int] | None]:
    """The frames, and the options of the last block: code → number; None if the file has no such block."""
    frames: list[Frame] = []
    counts = None
    at = 0
    while at < len(raw):
        kind, total = struct.unpack_from("=II", raw, at)
        body = raw[at + 8 : at + total - 4]
        at += total
        assert total % 4 == 0 and struct.unpack_from("=I", raw, at - 4)[0] == total, "not a whole block"
        if kind == 6:
            _, high, low, kept, size = struct.unpack_from("=5I", body)
            rest = body[20 + kept + -kept % 4 :]
            assert struct.unpack_from("=HH", rest) == (2, 4)
            flags = struct.unpack_from("=I", rest, 4)[0]
            frames.append(
                Frame(body[20 : 20 + kept], size, {1: False, 2: True}[flags], (high << 32 | low) / 1e9)
            )
        elif kind == 5:
            counts = {code: number for code, _, number in struct.iter_unpack("=HHQ", body[12:-4])}
    return frames, counts


def tcpdump(raw: bytes, *words: str) -> list[str]:
    """What tcpdump prints of the file, a line for each frame."""
    argv = ["tcpdump", "-r", "-", "-nn", "-e", "-t", "-q", *words]
    return subprocess.run(argv, input=raw, capture_output=True, check=True).stdout.decode().splitlines()


class Capture:
    """A vmtapctl capture that has begun."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stderr
        with watched(process):
            self.title = process.stderr.readline().decode()
        assert self.title.startswith("capturing "), self.title + process.stderr.read().decode()

    def end(self, number: int | None = signal.SIGINT) -> tuple[int, bytes, str]:
        """(exit status, standard output, the summary), after the signal, if one is given."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, err.decode()


@contextmanager
def capturing(
    ctl: Ctl, *words: str | Path, prefix: tuple[str, ...] = (), **options: Any
) -> Iterator[Capture]:
    with subprocess.Popen(
        [*prefix, *ctl.argv("capture", *words)],
        env=ctl.env(),
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    ) as process:
        try:
            yield Capture(process)
        finally:
            process.kill()


@pytest.fixture
def ctl(plugin: Plugin) -> Ctl:
    return Ctl(plugin)


@pytest.fixture(params=["macvtap", "tap"])
def made(request: pytest.FixtureRequest, attach: Callable[..., Attached], lab: Lab) -> Attached:
    return attach(lab.pod(), **KINDS[request.param])


@pytest.fixture
def macvtap(attach: Callable[..., Attached], lab: Lab) -> Attached:
    return attach(lab.pod(), **KINDS["macvtap"])


def send(made: Attached, *frames: bytes) -> None:
    """The guest sends them."""
    for frame in frames:
        os.write(made.fd, bytes(VNET_HEADER) + frame)


def receive(lab: Lab, made: Attached, *frames: bytes) -> None:
    """The peer sends them to the guest, which gets all."""
    with packet_socket(lab.peer, "eth0") as peer:
        for frame in frames:
            peer.send(frame)
            while frame[-20:] not in os.read(made.fd, 1 << 16):
                pass


def marked(mac: str, name: str, *, dst: str = FOREIGN, tags: tuple[tuple[int, int], ...] = ()) -> bytes:
    return ethernet(b"\x88\xb5" + name.encode().ljust(100, b"."), src=mac, dst=dst, tags=tags)


def test_both_directions_with_their_tags(lab: Lab, ctl: Ctl, made: Attached, tmp_path: Path) -> None:
    own, file = made.record.mac, tmp_path / "frames"
    out = [marked(own, f"out {tags}", tags=tags) for tags in ((), TAG, PRIORITY, SERVICE)]
    out.append(marked(own, "to all", dst=BROADCAST))
    into = [marked(FOREIGN, f"in {tags}", dst=own, tags=tags) for tags in ((), TAG, PRIORITY, SERVICE)]
    with capturing(ctl, own, "--write", file) as capture:
        assert own in capture.title
        send(made, *out)
        receive(lab, made, *into)
        status, _, summary = capture.end()
    assert status == 0, summary
    raw = file.read_bytes()
    frames, counts = read(raw)
    assert [frame.data for frame in frames if frame.out] == out
    assert [frame.data for frame in frames if not frame.out] == into
    assert all(frame.size == len(frame.data) for frame in frames)
    assert all(abs(time.time() - frame.time) < LIMIT for frame in frames)
    assert counts == {5: 0, 6: len(frames)}
    assert summary.startswith(f"{len(frames)} frames, {sum(map(len, out + into))} bytes, in ")
    assert summary.endswith("ended by SIGINT\n")
    assert len(tcpdump(raw)) == len(frames)
    assert len(tcpdump(raw, "vlan 100")) == 4
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(("direction", "sent"), [("out", True), ("in", False)])
def test_one_direction(lab: Lab, ctl: Ctl, made: Attached, direction: str, sent: bool) -> None:
    own = made.record.mac
    with capturing(ctl, own, "--direction", direction, "--write", "-") as capture:
        send(made, marked(own, "a"), marked(own, "b", tags=TAG))
        receive(lab, made, marked(FOREIGN, "c", dst=own), marked(FOREIGN, "d", dst=own, tags=TAG))
        frames, _ = read(capture.end()[1])
    assert [frame.out for frame in frames] == [sent, sent]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["arp"], {"out arp", "in arp"}),
        (["vlan", "100", "and", "arp"], {"out tagged arp", "in tagged arp"}),
        (["vlan 7 and vlan 100"], {"out service", "in service"}),
        (["vlan", "100"], {"out tagged arp", "in tagged arp", "out tagged", "in tagged"}),
    ],
)
def test_a_filter_sees_tags(lab: Lab, ctl: Ctl, made: Attached, words: list[str], wanted: set[str]) -> None:
    """The kernel keeps the tag of one direction apart, and that of the other in the frame."""
    own = made.record.mac

    def frames(way: str, src: str, dst: str) -> list[bytes]:
        def arps(name: str) -> bytes:
            return arp(own, "10.1.0.5") + f"<{way} {name}>".encode().ljust(60)

        return [
            ethernet(arps("arp"), src=src, dst=dst),
            ethernet(arps("tagged arp"), src=src, dst=dst, tags=TAG),
            marked(src, f"<{way} other>", dst=dst),
            marked(src, f"<{way} tagged>", dst=dst, tags=TAG),
            marked(src, f"<{way} service>", dst=dst, tags=SERVICE),
        ]

    with capturing(ctl, own, "--write", "-", *words) as capture:
        send(made, *frames("out", own, FOREIGN))
        receive(lab, made, *frames("in", FOREIGN, own))
        status, raw, _ = capture.end()
    assert status == 0
    got, _ = read(raw)
    assert {frame.data.partition(b"<")[2].partition(b">")[0].decode() for frame in got} == wanted
    assert len(tcpdump(raw, " ".join(words))) == len(got), "as tcpdump filters the file"


def test_for_people_and_for_programs(lab: Lab, ctl: Ctl, macvtap: Attached) -> None:
    own = macvtap.record.mac
    asks = ethernet(arp(own, "10.1.0.5", 1), src=own, dst=BROADCAST, tags=TAG)
    with capturing(ctl, "net1", "--count", "2") as capture:
        send(macvtap, asks, marked(own, "\x1b[2J"))
        status, out, summary = capture.end(None)
    assert status == 0
    assert "--count 2 is reached" in summary
    first, second = out.decode().splitlines()
    assert first[8] == "." and first[15:] == (
        f"  out  {own} > {BROADCAST}  VLAN 100  ARP  46  who has 10.1.0.9? tell 10.1.0.5"
    )
    assert second.endswith(f"  out  {own} > {FOREIGN}  0x88b5  114")
    process = subprocess.Popen(
        ctl.argv("capture", "net1", "--count", "1", "--json"),
        env=ctl.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout and process.stderr
        while not select.select([process.stdout], [], [], 0.05)[0]:  # it prints nothing when it begins
            send(macvtap, asks)
        out, err = process.communicate(timeout=LIMIT)
    line = json.loads(out)
    assert line.pop("time").startswith("20")
    assert line == {
        "direction": "out",
        "source": own,
        "destination": BROADCAST,
        "vlans": [100],
        "ethertype": "0x0806",
        "size": len(asks),
        "info": "who has 10.1.0.9? tell 10.1.0.5",
    }
    told = json.loads(err)
    assert told.pop("seconds") >= 0
    assert told == {
        "frames": 1, "bytes": len(asks), "drops": 0, "refused": {}, "ended": "--count 1 is reached",
    }  # fmt: skip


def test_limits(ctl: Ctl, macvtap: Attached, tmp_path: Path) -> None:
    own = macvtap.record.mac
    frames = [marked(own, f"{n}", tags=TAG) for n in range(200)]
    with capturing(ctl, own, "--size", "10k", "--write", tmp_path / "size") as capture:
        send(macvtap, *frames)
        status, _, summary = capture.end(None)
    raw = (tmp_path / "size").read_bytes()
    assert (status, "--size 10000 is reached" in summary) == (0, True)
    assert 9_700 < len(raw) <= 10_000
    assert len(tcpdump(raw)) == len(read(raw)[0])
    with capturing(ctl, own, "--snap", "64", "--seconds", "1", "--write", "-") as capture:
        send(macvtap, *frames)
        status, raw, summary = capture.end(None)
    assert (status, "--seconds 1 are over" in summary) == (0, True)
    assert [(frame.data, frame.size) for frame in read(raw)[0]] == [(each[:64], len(each)) for each in frames]


def test_no_file_is_overwritten_or_filled(ctl: Ctl, macvtap: Attached, tmp_path: Path) -> None:
    own, file, link = macvtap.record.mac, tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere")
    for path in (file, link):
        assert "is not overwritten" in ctl("capture", own, "--write", path, status=74).stderr
    assert file.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    missing = tmp_path / "missing/file"
    assert "No such file" in ctl("capture", own, "--write", missing, status=74).stderr
    huge = ctl("capture", own, "--write", tmp_path / "huge", "--size", "900000G", status=74).stderr
    assert "give a smaller one" in huge
    assert not (tmp_path / "huge").exists()


def test_a_full_file_system(ctl: Ctl, macvtap: Attached, tmp_path: Path) -> None:
    """The limit of a file's size, of which the signal is ignored, stands for it. The file has whole frames."""
    own, file = macvtap.record.mac, tmp_path / "file"
    limit = ("env", "--ignore-signal=XFSZ", "prlimit", "--fsize=5000")
    with capturing(ctl, own, "--write", file, prefix=limit) as capture:
        for n in range(100):
            send(macvtap, marked(own, f"{n}"))
            if capture.process.poll() is not None:
                break
        status, _, why = capture.end(None)
    assert (status, "it has the frames before" in why) == (74, True), why
    frames, _ = read(file.read_bytes())
    assert [frame.data for frame in frames] == [marked(own, f"{n}") for n in range(len(frames))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_frames_before_a_signal_are_kept(ctl: Ctl, macvtap: Attached, number: int) -> None:
    own = macvtap.record.mac
    with capturing(ctl, own, "--write", "-") as capture:
        send(macvtap, marked(own, "last"))
        status, raw, summary = capture.end(number)
    assert (status, len(read(raw)[0])) == (0, 1), summary
    assert read(raw)[1] == {5: 0, 6: 1}


@pytest.mark.parametrize("traffic", [False, True])
@pytest.mark.parametrize("words", [["--write", "-"], []])
def test_a_reader_that_closes(ctl: Ctl, macvtap: Attached, words: list[str], traffic: bool) -> None:
    own = macvtap.record.mac
    with capturing(ctl, own, *words) as capture:
        assert capture.process.stdout
        if traffic:
            send(macvtap, marked(own, "a"))
            assert capture.process.stdout.read(1)
        capture.process.stdout.close()
        if traffic:
            send(macvtap, marked(own, "b"))
        assert capture.process.stderr
        assert capture.process.stderr.read().decode().endswith("the reader has closed the pipe\n")
        assert capture.process.wait(LIMIT) == 0


@pytest.mark.parametrize("reads", [False, True])
def test_a_slow_reader(ctl: Ctl, macvtap: Attached, reads: bool) -> None:
    """The pipe is full when the signal comes. What is read after it is complete, and has no frame twice."""
    own = macvtap.record.mac
    frames = [marked(own, f"{n}".ljust(1400)) for n in range(3000)]
    with capturing(ctl, own, "--write", "-") as capture:
        send(macvtap, *frames)
        until(
            lambda: waiting_bytes(capture.process.stdout), "the pipe is not full", lambda size: size > 60_000
        )
        capture.process.send_signal(signal.SIGTERM)
        assert capture.process.stderr
        if reads:
            status, raw, summary = capture.end(None)
            assert [frame.data for frame in read(raw)[0]] == frames
            assert summary.endswith("ended by SIGTERM\n")
        else:
            status = capture.process.wait(LIMIT)
            why = "ended by SIGTERM, and the reader has not taken everything"
            assert why in capture.process.stderr.read().decode()
        assert status == 0


def waiting_bytes(pipe: IO[bytes] | None) -> int:
    assert pipe
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_lost_frames_are_counted(ctl: Ctl, macvtap: Attached, tmp_path: Path) -> None:
    own, count, file = macvtap.record.mac, 40_000, tmp_path / "frames"
    frame = ethernet(b"\x88\xb5" + bytes(1000), src=own)
    with capturing(ctl, own, "--write", file) as capture:
        capture.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, capture.process.pid, os.WSTOPPED)
        send(macvtap, *[frame] * count)
        capture.process.send_signal(signal.SIGCONT)
        status, _, summary = capture.end()
    frames, counts = read(file.read_bytes())
    assert counts and counts[5] > 0
    assert len(frames) + counts[5] == count
    assert (status, f"{counts[5]} frames are missing" in summary) == (1, True)


def test_del_ends_it(ctl: Ctl, made: Attached, tmp_path: Path) -> None:
    file = tmp_path / "frames"
    with capturing(ctl, made.record.mac, "--write", file) as capture:
        send(made, marked(made.record.mac, "last"))
        ctl.delete(made.pod)
        status, _, summary = capture.end(None)
    assert (status, "the attachment has ended" in summary) == (2, True), summary
    assert len(read(file.read_bytes())[0]) == 1


def test_it_keeps_no_namespace_alive(ctl: Ctl, macvtap: Attached) -> None:
    """The runtime has removed the pod's network namespace without a DEL; the packet socket is the last one in it."""
    with capturing(ctl, macvtap.record.mac, "--write", "-") as capture:
        os.close(os.dup(macvtap.fd))
        macvtap.pod.close()
        status, _, summary = capture.end(None)
    assert (status, "the attachment has ended" in summary) == (2, True), summary


@pytest.mark.parametrize("before", [False, True])
def test_a_link_that_is_down_for_a_while(ctl: Ctl, macvtap: Attached, before: bool) -> None:
    own = macvtap.record.mac
    if before:
        macvtap.pod.ip("link set net1 down")
    with capturing(ctl, own, "--write", "-") as capture:
        macvtap.pod.ip("link set net1 down", "link set net1 up")
        send(macvtap, marked(own, "later"))
        status, raw, _ = capture.end()
    assert (status, len(read(raw)[0])) == (0, 1)


POLICY = f"""
interfaces:
- {{name: data, source: {{dev: {NIC}}}, port: {{macSpoofCheck: true}}}}
- {{name: bridged, source: {{dev: {BRIDGE}}}, port: {{macSpoofCheck: true}}}}
"""


@pytest.mark.parametrize(("interface", "captured"), [("data", 0), ("bridged", 3)])
def test_refused_frames(
    lab: Lab, ctl: Ctl, attach: Callable[..., Attached], interface: str, captured: int
) -> None:
    ctl.plugin.policy.write_text(POLICY)
    made = attach(lab.pod(), interface=interface)
    send(made, marked(SPOOFED, "before"))
    with capturing(ctl, made.record.mac, "--write", "-") as capture:
        send(made, *(marked(SPOOFED, f"{n}") for n in range(3)))
        status, raw, summary = capture.end()
    assert status == 0
    assert "refused frames (not all are captured): source-mac 3\n" in summary
    assert len(read(raw)[0]) == captured


def test_which_attachment(lab: Lab, ctl: Ctl, attach: Callable[..., Attached]) -> None:
    pod = lab.pod()
    first = attach(pod, **KINDS["macvtap"], opened=False)
    second = attach(pod, ifname="net2", **KINDS["macvtap"], opened=False)
    several = ctl("capture", "c1", status=64).stderr
    assert first.record.mac in several and second.record.mac in several
    assert "no attachment" in ctl("capture", "nobody", status=66).stderr
    pod.ip("link delete net2")
    assert "its link is gone" in ctl("capture", second.record.mac, status=66).stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["arp", "or", "nonsense"], "'arp or nonsense' is refused"),
        (["inbound"], "--direction"),
        (["arp and ip"], "rejects all packets"),
        ([" or ".join(["arp"] * 200)], "1396 characters: at most 1000"),
        (["--size", "1M"], "--write"),
        (["--size", "1"], "--size"),
        (["--count", "0"], "--count"),
        (["--snap", "1k", "--lost"], "--lost"),
        (["--direction", "up"], "--direction"),
    ],
)
def test_usage(ctl: Ctl, macvtap: Attached, words: list[str], why: str) -> None:
    assert why in ctl("capture", macvtap.record.mac, *words, status=64).stderr


def test_a_terminal_gets_no_pcapng(ctl: Ctl, macvtap: Attached) -> None:
    command = " ".join(ctl.argv("capture", macvtap.record.mac, "--write", "-"))
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], env=ctl.env(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert (done.returncode, "is a terminal" in done.stdout) == (64, True)


def test_what_it_needs_of_the_process(ctl: Ctl, macvtap: Attached) -> None:
    """The capabilities of the agent's container are enough; CAP_NET_RAW is one of them."""
    agent = "net_admin,net_broadcast,net_raw,sys_admin,mknod,chown,fowner"
    enough = "-all," + ",".join(f"+{each}" for each in agent.split(","))
    own = macvtap.record.mac
    with capturing(ctl, own, "--write", "-", prefix=("setpriv", "--bounding-set", enough)) as capture:
        send(macvtap, marked(own, "a"))
        status, raw, _ = capture.end()
    assert (status, len(read(raw)[0])) == (0, 1)
    less = enough.replace("+net_raw,", "")
    done = subprocess.run(
        ["setpriv", "--bounding-set", less, *ctl.argv("capture", own)],
        env=ctl.env(), capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == os.EX_NOPERM
    assert "a packet socket needs CAP_NET_RAW" in done.stderr


def test_without_libpcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libpcap, "_NAMES", ("libpcap.so.none",))
    with pytest.raises(CniError, match="needs libpcap, which is not there: install it"):
        libpcap.compiled("arp", 64)


@given(
    st.builds(
        lambda head, tags, kind, rest: head + tags + kind + rest,
        st.binary(min_size=12, max_size=12),
        st.sampled_from([b"", b"\x81\0\0\x64", b"\x88\xa8\0\1\x81\0\0\x64", b"\x81\0" * 20]),
        st.sampled_from([b"\x08\0", b"\x86\xdd", b"\x08\x06", b"\x88\xb5", b"\0\x2e"]),
        st.binary(max_size=80),
    )
    | st.binary(max_size=64)
)
def test_no_frame_becomes_unprintable_text(frame: bytes) -> None:
    seen = dissect.seen(frame)
    assert printable(seen.info + seen.protocol + seen.source + seen.destination)
    assert len(seen.vlans) <= 4
