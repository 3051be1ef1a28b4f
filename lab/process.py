"""Processes of the host: a command is run to its end, a program is started and ended, a condition is waited for.

Everything that waits has a deadline. Must not know in which namespaces a process runs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Word = str | os.PathLike[str]
"""A word of a command line."""
PATIENCE = 300
"""Seconds to wait for what usually takes one."""
_TAIL = 3000


class LabError(RuntimeError):
    """Something of the lab failed; the text has the command or the program, and the end of its output."""


class Closing:
    """A base class: a context manager that calls close() at its end."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunOptions(TypedDict, total=False):
    """The keyword arguments of run()."""

    check: bool
    stdin: str
    env: Mapping[str, str] | None
    cwd: Path | None
    timeout: float | None
    in_our_group: bool


def run(
    argv: Sequence[Word],
    *,
    check: bool = True,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = PATIENCE,
    in_our_group: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end with its output captured.

    timeout: seconds; in_our_group: whether a terminal's Ctrl-C interrupts the command, too. By default it does not,
    because the command may be in the middle of a plugin or a clean-up. Raises LabError if the program is missing, and
    if check is set and the exit status is not 0; subprocess.TimeoutExpired after the timeout.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            env=env,
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            process_group=None if in_our_group else 0,
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]}: {error.strerror}; lab/setup installs what the lab needs") from error
    if check and done.returncode != 0:
        output = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip()))) or "no output"
        command = shlex.join(os.fspath(word) for word in argv)
        raise LabError(f"{command}: exit status {done.returncode}: {output[-2 * _TAIL :]}")
    return done


def wait_for(
    condition: Callable[[], object],
    failure: Callable[[], str],
    *,
    seconds: float = PATIENCE,
    pause: float = 0.02,
) -> None:
    """Polls until the condition is true, where there is no event to wait for.

    pause: seconds between two looks. Raises LabError with failure()'s text after the given seconds.
    """
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise LabError(f"{failure()} (waited {seconds:g} s)")
        time.sleep(pause)


class Program(Closing):
    """A program that can be started, killed and started again; its output is appended to a file.

    popen: subprocess.Popen, or a function like it that starts the program elsewhere.
    """

    def __init__(
        self,
        popen: Callable[..., subprocess.Popen[Any]],
        argv: Sequence[Word],
        log: Path,
        env: Mapping[str, str],
    ) -> None:
        self.name = Path(argv[0]).name
        self.log = log
        self._popen = popen
        self._argv = argv
        self.env = env
        self._process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = self._popen(self._argv, stdout=log, stderr=log, env=self.env)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal and waits for the end of the program; kills it if that takes too long."""
        if self._process:
            self._process.send_signal(number)
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def pid(self) -> int:
        """The pid, once it was started."""
        assert self._process
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """All that the program has written."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The end of the output, for an error message."""
        return f"the output of {self.name} ends with: {self.output().strip()[-_TAIL:]}"

    def close(self) -> None:
        self.kill()
