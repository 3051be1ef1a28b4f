"""vmtapctl on the lab's node, and VMs that it can find."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent.conftest import agent  # noqa: F401 - a fixture
from tests.netns.conftest import attach  # noqa: F401 - a fixture
from tests.runner import BIN, Plugin, config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns

QEMU = shlex.split("qemu-system-x86_64 -accel tcg -M pc -m 64 -nodefaults -display none -S -daemonize")


@dataclass(frozen=True)
class Ctl:
    """The installed vmtapctl in the node's namespace."""

    plugin: Plugin

    def argv(self, *words: str | Path) -> list[str]:
        return [str(word) for word in self.plugin.node.argv([BIN / "vmtapctl", *words])]

    def env(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "VMTAP_RUN": str(self.plugin.state),
            "VMTAP_POLICY": str(self.plugin.policy),
            **more,
        }

    def __call__(
        self, *words: str | Path, status: int | None = 0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it; its exit status must be that one, if one is given."""
        done = subprocess.run(
            self.argv(*words), env=self.env(**env), capture_output=True, text=True, check=False, timeout=LIMIT
        )
        assert status is None or done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *words: str | Path, status: int | None = 0) -> Any:
        return json.loads(self(*words, "--json", status=status).stdout)

    def add(
        self, pod: Netns, *, container: str = "c1", ifname: str = "net1", name: str = "", **fields: Any
    ) -> str:
        """An attachment, by the executable; the guest's MAC. name: the pod's, in Kubernetes' namespace shop."""
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID=u" if name else ""
        conf = config(**(fields or {"source": "eth1", "mode": "bridge"}))
        answer = self.plugin("ADD", conf, netns=pod, container=container, ifname=ifname, args=args).ok()
        return str(answer["interfaces"][0]["mac"])

    def delete(self, pod: Netns | str, *, container: str = "c1", ifname: str = "net1") -> None:
        self.plugin("DEL", config(), netns=pod, container=container, ifname=ifname).ok()

    @contextmanager
    def vm(self, pod: Netns, name: str, *options: str) -> Iterator[int]:
        """A real QEMU on the pod's attachments, stopped before its first instruction; its pid."""
        argv: list[str | Path] = [BIN / "vmtap-launch", "--netns", pod.path, *options, "--"]
        with tempfile.TemporaryDirectory(dir="/run", prefix="vmtap-test-") as folder:
            Path(folder).chmod(0o777)  # QEMU is another user by then
            pidfile = Path(folder, "pid")
            subprocess.run(
                [*argv, *QEMU, "-pidfile", pidfile, "-name", name],
                env=self.env(),
                check=True,
                timeout=LIMIT,
                capture_output=True,
            )
            pid = int(pidfile.read_text())
        watch = os.pidfd_open(pid)
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch, signal.SIGKILL)
            ended = select.select([watch], [], [], LIMIT)[0]  # until then it has the fds
            os.close(watch)
            assert ended


def lldp_frame(*tlvs: tuple[int, bytes], port: bytes = b"\x05Eth1/7", to: str = "01:80:c2:00:00:0e") -> bytes:
    """What the switch leaf-12 announces, those TLVs (type, value) included."""
    every = [(1, b"\x04\x02\0\0\0\0\x09"), (2, port), (3, b"\0\x78"), (5, b"leaf-12"), *tlvs, (0, b"")]
    body = b"".join(struct.pack("!H", kind << 9 | len(value)) + value for kind, value in every)
    return bytes.fromhex(f"{to.replace(':', '')} 020000000009 88cc") + body


@contextmanager
def announced(lab: Lab, *frames: bytes) -> Iterator[None]:
    """The lab's switch sends these to the node again and again."""
    switch = lab.switch.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    done = threading.Event()

    def announce() -> None:
        with switch:
            switch.bind(("node", 0))
            while not done.wait(0.05):  # as switches do, only more often
                for frame in frames:
                    switch.send(frame)

    thread = threading.Thread(target=announce)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def ctl(plugin: Plugin) -> Ctl:
    return Ctl(plugin)


@pytest.fixture
def pod(lab: Lab) -> Netns:
    return lab.pod()
