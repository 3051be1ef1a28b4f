"""One fuzzing process: python -m lab.fuzz.child TARGET FOLDER SECONDS MEGABYTES [SEEDS].

FOLDER has corpus/ and findings/. libFuzzer's progress goes to stderr; __main__.py reads it. Of inputs that break one
claim in one place, the first is kept and the fuzzer goes on.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

from lab.fuzz import mutate, targets

if TYPE_CHECKING:
    from lab.fuzz.targets import Target

_HANGS = 10
"""Seconds of CPU time after which an input is given up."""
_MOST_FINDINGS = 20


class HungError(Exception):
    """The input takes too long."""


class Judge:
    """Calls the target, and writes the first input of each kind of failure to the folder."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._kinds: set[str] = set()
        # libFuzzer's own timer would end the process, and not write the input if there is a custom mutator.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGPROF, _hung)

    def __call__(self, data: bytes) -> None:
        begin = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, _HANGS)
            self._target.run(data)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except Exception as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._found(kind(error), data, "".join(traceback.format_exception(error)))
            return
        if (took := time.process_time() - begin) > self._target.cpu_seconds:
            self._found("slow", data, f"it took {took:.1f} s of CPU time\n")

    def _found(self, kind: str, data: bytes, text: str) -> None:
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        path = self._folder / hashlib.sha256(data).hexdigest()[:16]
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{kind}\n{text}")
        if len(self._kinds) >= _MOST_FINDINGS:
            sys.exit(f"{_MOST_FINDINGS} kinds of failure: mend these first")


def _hung(*_: object) -> None:
    raise HungError


def kind(error: BaseException) -> str:
    """What distinguishes a failure from others: the exception, and the line of the product or target that raised it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/cni/" in frame.filename or "/lab/fuzz/targets/" in frame.filename
    ]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def main(name: str, folder: str, seconds: str, megabytes: str, *seeds: str) -> None:
    """Fuzz until the time is over."""
    atheris.enabled_hooks.add("RegEx")
    with atheris.instrument_imports(include=["cni"], enable_loader_override=False):
        target = targets.load(name)
    own = Path(folder)
    tempfile.tempdir = str(own / "written")
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)
    os.mkdir(tempfile.tempdir)
    words = own / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    limit = int(megabytes) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    flags = {
        "max_total_time": seconds,
        "timeout": 0,
        "report_slow_units": 3600,
        "rss_limit_mb": megabytes,
        "max_len": target.most_bytes,
        "dict": words,
        "artifact_prefix": f"{own}/findings/",
        "print_final_stats": 1,
        "print_funcs": 0,
    }
    argv = ["fuzz", *(f"-{flag}={value}" for flag, value in flags.items()), str(own / "corpus"), *seeds]
    custom = None
    if target.json:
        custom = partial(_document, words=target.words)
    atheris.Setup(argv, Judge(target, own / "findings"), **({"custom_mutator": custom} if custom else {}))
    atheris.Fuzz()


def _document(data: bytes, most: int, seed: int, *, words: tuple[str, ...]) -> bytes:
    return mutate.document(data, most, seed, words, atheris.Mutate)


def _escaped(word: str) -> str:
    """As a libFuzzer dictionary has it."""
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word.encode()
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
