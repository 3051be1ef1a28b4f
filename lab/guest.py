"""A virtual machine that boots on a pod's attachments and runs commands.

vmtap-launch opens the attachments' fds and becomes QEMU; lab/guest.init runs in the guest and answers commands over
QEMU's stdin and stdout. Everything that waits has a deadline. Must not make attachments.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from lab.assets import guest as assets
from lab.process import PATIENCE, Closing, LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

LAUNCHER = Path(sys.executable).with_name("vmtap-launch")
_LOG_TAIL = 1500


class GuestError(LabError):
    """The guest did not start, does not answer or has ended; the text has the end of its output."""


@dataclass(frozen=True)
class Nic:
    """A NIC of the guest, known by its MAC; without an address ("10.77.0.1/24") it is only set up."""

    mac: str
    address: str | None = None


@dataclass(frozen=True)
class Answer:
    status: int
    output: str


class Image(Closing):
    """Copies of the guest's kernel and initramfs that QEMU's unprivileged user can read; a context manager."""

    def __init__(self) -> None:
        made = assets.files()
        self._folder = tempfile.TemporaryDirectory(prefix=f"vmtap-guest-{os.getpid()}-", dir="/run")
        folder = Path(self._folder.name)
        folder.chmod(0o755)
        self.kernel = folder / "vmlinuz"
        self.initramfs = folder / "initramfs"
        for source, copy in ((made.kernel, self.kernel), (made.initramfs, self.initramfs)):
            shutil.copyfile(source, copy)
            copy.chmod(0o644)

    def close(self) -> None:
        self._folder.cleanup()


def qemu_command(
    image: Image, nics: Sequence[Nic], *, words: Sequence[str] = (), memory: int = 96, processors: int = 1
) -> list[str]:
    """QEMU's command line without a network, which the launcher adds. words: for the kernel's command line."""
    addresses = [f"nic={nic.mac},{nic.address}" for nic in nics if nic.address]
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg", "-M", "pc", "-m", str(memory), "-nodefaults", "-no-user-config", "-no-reboot"),
        *(
            "-smp",
            str(processors),
            "-display",
            "none",
            "-kernel",
            str(image.kernel),
            "-initrd",
            str(image.initramfs),
        ),
        # no_timer_check: on a busy machine an emulated timer is late, and the kernel would panic.
        *("-append", " ".join(["console=ttyS0", "quiet", "panic=-1", "no_timer_check", *addresses, *words])),
        # stderr is the log: the guest's kernel writes to it, too.
        *("-chardev", "file,id=console,path=/dev/stderr,append=on", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=control,signal=off", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=control"),
    ]


class Conversation(Closing):
    """Commands to a guest and its answers, over two text streams; a context manager.

    A subclass starts the guest, passes the streams to _listen(), and implements _tail(), which describes a guest that
    does not answer.
    """

    _commands: IO[str]
    _reader: threading.Thread

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._ended = False
        self._ready: Future[None] = Future()
        self._waiting: dict[str, Future[Answer]] = {}

    def ready(self, timeout: float = PATIENCE) -> None:
        """Waits until the guest takes commands."""
        self._result(self._ready, timeout, "boot")

    def ask(self, command: str, timeout: float = PATIENCE) -> Callable[[], Answer]:
        """Sends a shell command and returns a function that waits for its answer. Commands run side by side."""
        number = str(next(self._numbers))
        answer: Future[Answer] = Future()
        with self._lock:
            if self._ended:
                raise GuestError(f"the guest has ended{self._tail()}")
            self._waiting[number] = answer
        self._send(f"{number} {command}\n")
        return partial(self._result, answer, timeout, f"answer {command!r}")

    def run(self, command: str, timeout: float = PATIENCE) -> Answer:
        """Sends a shell command and waits for the answer."""
        return self.ask(command, timeout)()

    def must(self, command: str) -> str:
        """The output of a shell command. Raises GuestError if its status is not 0."""
        answer = self.run(command)
        if answer.status != 0:
            raise GuestError(f"{command!r} in the guest: status {answer.status}: {answer.output.strip()}")
        return answer.output

    def ping(self, address: str, *, wait: int = PATIENCE) -> bool:
        """Whether an echo request is answered within `wait` seconds; QEMU may have to wait for a processor."""
        return self.run(f"ping -c 1 -W {wait} {address}", wait + PATIENCE).status == 0

    def _listen(self, commands: IO[str], answers: IO[str]) -> None:
        self._commands = commands
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def _send(self, line: str) -> None:
        try:
            with self._lock:
                self._commands.write(line)
                self._commands.flush()
        except OSError as error:
            raise GuestError(f"the guest has ended{self._tail()}") from error

    def _read(self, answers: IO[str]) -> None:
        """Passes each answer to its caller. At the end, raises GuestError in the callers that still wait."""
        with answers, contextlib.suppress(ConnectionResetError):  # a socket whose other end was killed
            for line in answers:
                if not line.endswith("\n"):  # the guest was killed in the middle of an answer
                    break
                words = line.split()
                if words == ["ready"]:
                    self._ready.set_result(None)
                else:
                    number, status, output = words
                    answer = Answer(int(status), base64.b64decode(output).decode(errors="replace"))
                    self._waiting.pop(number).set_result(answer)
        with self._lock:
            self._ended = True
        ended = GuestError("the guest has ended")
        if not self._ready.done():
            self._ready.set_exception(ended)
        for waiting in self._waiting.values():
            waiting.set_exception(ended)

    def _result(self, future: Future[T], timeout: float, what: str) -> T:
        try:
            return future.result(timeout)
        except TimeoutError as error:
            raise GuestError(f"the guest did not {what} in {timeout} s{self._tail()}") from error
        except GuestError as error:
            raise GuestError(f"{error}{self._tail()}") from error

    def _tail(self) -> str:
        """The end of the guest's output, for an error message: "; its output ends with: …"."""
        raise NotImplementedError


class Guest(Conversation):
    """A started guest; close() kills it if it still runs.

    netns: the pod's path, or None for the namespace of the launcher itself. under: a command that runs the launcher.
    launch_options: further options of the launcher. words: for the kernel's command line. user_network: QEMU's user
    networking on the first NIC instead of the launcher; its connections then begin in netns. Several guests boot at
    once if all are created before the first call of ready().
    """

    def __init__(
        self,
        image: Image,
        netns: str | os.PathLike[str] | None,
        nics: Sequence[Nic],
        *,
        under: Sequence[str | os.PathLike[str]] = (),
        env: Mapping[str, str] | None = None,
        launch_options: Sequence[str] = (),
        words: Sequence[str] = (),
        processors: int = 1,
        user_network: bool = False,
    ) -> None:
        super().__init__()
        self._log = tempfile.TemporaryFile(mode="a+", errors="replace")  # noqa: SIM115 - until close()
        os.fchmod(self._log.fileno(), 0o666)  # QEMU opens it again, without privilege
        qemu = qemu_command(image, nics, words=words, processors=processors)
        where = ["--netns", netns] if netns else []
        argv: list[str | os.PathLike[str]] = [*under, LAUNCHER, *where, *launch_options, "--", *qemu]
        if user_network:
            device = f"virtio-net-pci,netdev=user,mac={nics[0].mac}"
            inside = ["nsenter", f"--net={os.fspath(netns)}", "--"] if netns else []
            argv = [*inside, *qemu, "-netdev", "user,id=user", "-device", device]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            text=True,
            errors="replace",
            bufsize=1,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._listen(self.process.stdin, self.process.stdout)

    def power_off(self, timeout: float = PATIENCE) -> int:
        """Powers the guest off from inside and returns QEMU's exit status. Raises GuestError after the timeout."""
        self._send("0 poweroff -f\n")
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"the guest did not power off in {timeout} s{self._tail()}") from error

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        with contextlib.suppress(OSError):  # a line that the guest did not read before it ended
            self._commands.close()
        self._log.close()

    def _tail(self) -> str:
        """The end of the output of the launcher, QEMU and the guest's kernel."""
        self._log.seek(0)
        output = self._log.read().strip()[-_LOG_TAIL:]
        return f"; its output ends with: {output}" if output else "; it has no output"
