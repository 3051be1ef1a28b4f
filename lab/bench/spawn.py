"""Runs processes through spawn.c and returns the cost of each. Must not know what they do."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.process import Closing, LabError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lab.wire import Netns

_JOB = struct.Struct("=IIII")
_OUTCOME = struct.Struct("=iIQQQQ")
_TAIL = 4000


@dataclass(frozen=True)
class Job:
    """One process to run: argv[0] is a path."""

    argv: Sequence[str]
    env: Mapping[str, str]
    stdin: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """The result of a job. Times in nanoseconds, begin and end of CLOCK_MONOTONIC; peak: resident KiB."""

    status: int
    stdout: bytes
    begin: int
    end: int
    cpu: int
    peak: int


class Spawner(Closing):
    """spawn.c, running in a namespace; a context manager."""

    def __init__(self, program: Path, netns: Netns) -> None:
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            netns.argv([program]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Runs all jobs at once until they end; spawn.c has a time limit. Raises LabError if spawn.c ends."""
        assert self._process.stdin is not None
        os.ftruncate(self._log.fileno(), 0)
        self._log.seek(0)  # the processes share its offset
        try:
            self._process.stdin.write(struct.pack("=I", len(jobs)) + b"".join(map(_encode, jobs)))
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return [self._outcome() for _ in jobs]

    def written(self) -> str:
        """The end of what the processes of the last run wrote to stderr."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _TAIL, max(0, size - _TAIL))
        return text.decode(errors="replace").strip()

    def failure(self, program: str, outcome: Outcome) -> LabError:
        """The error that a process of the last run ended with another status than 0, with what it wrote."""
        wrote = "\n".join(filter(None, (outcome.stdout.decode(errors="replace").strip(), self.written())))
        return LabError(f"{program} ended with status {outcome.status}: {wrote or 'no output'}")

    def _outcome(self) -> Outcome:
        status, length, begin, end, cpu, peak = _OUTCOME.unpack(self._read(_OUTCOME.size))
        return Outcome(status, self._read(length), begin, end, cpu * 1000, peak)

    def _read(self, length: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(length)
        if len(data) < length:
            raise self._ended()
        return data

    def _ended(self) -> LabError:
        return LabError(
            f"spawn.c ended with status {self._process.wait(10)}: {self.written() or 'no output'}"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._log.close()


def _encode(job: Job) -> bytes:
    env = [f"{name}={value}" for name, value in job.env.items()]
    strings = b"".join(word.encode() + b"\0" for word in (*job.argv, *env))
    return _JOB.pack(len(job.argv), len(env), len(strings), len(job.stdin)) + strings + job.stdin
