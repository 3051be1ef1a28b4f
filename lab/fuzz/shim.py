"""The shim's target (targets/shim.c): its build for libFuzzer, and the one that replays inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab.process import run

if TYPE_CHECKING:
    from collections.abc import Iterable

SOURCE = Path(__file__).parent / "targets/shim.c"
_FLAGS = ("-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all")
_WORDS = (
    "CNI_COMMAND=",
    "CNI_NETNS=/n",
    "VMTAP_WAIT=",
    "VMTAP_RUN=/r",
    "VMTAP_DEADLINE=",
    "ADD",
    "DEL",
    "STATUS",
)
_JSON = ('\\"cniVersion\\"', '\\"1.1.0\\"', "VERSION", '\\"pid\\":', '\\"bundle\\":\\"/b\\"', "\\x00")


def fuzzer(folder: Path, seconds: float, megabytes: int, seeds: Iterable[Path]) -> list[str]:
    """The command that fuzzes; builds the program, with clang. Raises LabError."""
    program, words = folder / "shim", folder / "words"
    run(["clang", *_FLAGS, "-fsanitize=fuzzer,address,undefined", "-o", program, SOURCE])
    words.write_text("".join(f'"{word}"\n' for word in (*_WORDS, *_JSON)))
    flags = {
        "max_total_time": int(seconds),
        "timeout": 10,
        "rss_limit_mb": megabytes,
        "max_len": 1 << 15,
        "dict": words,
        "artifact_prefix": f"{folder}/findings/",
        "print_final_stats": 1,
    }
    return [
        str(program),
        *(f"-{name}={value}" for name, value in flags.items()),
        *map(str, (folder / "corpus", *seeds)),
    ]


def replayer(folder: Path) -> Path:
    """The program that replays files, built with gcc, whose sanitizers need no clang. Raises LabError."""
    program = folder / "replay-shim"
    run(["gcc", *_FLAGS, "-fsanitize=address,undefined", "-DREPLAY", "-o", program, SOURCE])
    return program


def replay(folder: Path, paths: Iterable[Path]) -> None:
    """Run the shim on each file. Raises LabError with the sanitizer's report; the last name in it is the file's."""
    run([replayer(folder), *paths])


if __name__ == "__main__":
    sys.exit("use: python -m lab.fuzz shim")
