"""The IPAM plugin of the tests: a shell script that records its executions and does what a test says."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

LEASED = {"cniVersion": "1.1.0", "ips": [{"address": "10.9.0.5/24", "gateway": "10.9.0.1"}]}
"""The usual answer to ADD."""

GATE = "lease; read -r line < gate; answer"
"""For ADD: it waits until a test has opened the FIFO seen/gate and closed it."""
HANG = "lease; touch hanging; exec sleep 3600"
"""For ADD: it does not end; there is a file seen/hanging then."""

_SCRIPT = """
seen="{seen}"
cd "$seen" || exit 1
lease() {{ touch "leases/$CNI_CONTAINERID-$CNI_IFNAME"; }}
release() {{ rm -f "leases/$CNI_CONTAINERID-$CNI_IFNAME"; }}
answer() {{ echo '{answer}'; }}
cat > "$CNI_COMMAND.stdin"
env > "$CNI_COMMAND.env"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> log
echo "the delegate was asked to $CNI_COMMAND" >&2
case $CNI_COMMAND in
{cases}
esac
"""


class FakeIpam:
    """The plugin `fake` in a folder for CNI_PATH, and what it recorded in the folder's subfolder `seen`."""

    config = {"type": "fake"}  # noqa: RUF012 - read only

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = folder / "seen"
        (self.seen / "leases").mkdir(parents=True)
        self.write()

    def write(self, *, answer: dict[str, Any] = LEASED, **commands: str) -> None:
        """Has it do shell commands in `seen`, for each CNI command that is named; the others do as usual.

        The shell functions lease and release make and remove the attachment's file in seen/leases; answer prints the
        answer to ADD.
        """
        cases = {"ADD": "lease; answer", "DEL": "release", **commands}
        text = "\n".join(f"{command}) {script} ;;" for command, script in cases.items())
        self.script(_SCRIPT.format(seen=self.seen, answer=json.dumps(answer), cases=text))

    def script(self, text: str) -> None:
        """Has it run a shell script, and record nothing. An execution under way goes on with the old one."""
        new = self.folder / "fake.new"
        new.write_text(f"#!/bin/sh\n{text}\n")
        new.chmod(0o755)
        new.rename(self.folder / "fake")

    def log(self) -> list[str]:
        """A line for each execution: its command, container and interface."""
        file = self.seen / "log"
        return file.read_text().splitlines() if file.exists() else []

    def commands(self) -> list[str]:
        """The command of each execution."""
        return [line.split()[0] for line in self.log()]

    def leases(self) -> set[str]:
        """CONTAINER-INTERFACE of each lease."""
        return set(os.listdir(self.seen / "leases"))

    def stdin(self, command: str) -> bytes:
        """What the last execution of that command had on its stdin."""
        return (self.seen / f"{command}.stdin").read_bytes()

    def env(self, command: str) -> dict[str, str]:
        """The environment of the last execution of that command."""
        lines = (self.seen / f"{command}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)
