"""`make kind`: a shell with docker, kind, kubectl and helm on a new kind cluster; all of it ends with the shell.

    python -m lab.kind [COMMAND WORD...]

With a command, that is run instead, before there is a cluster: `make kind A=deploy/kind/up`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from lab.assets.cache import CHECKOUT
from lab.kind.cluster import Kind

_WELCOME = """The cluster is ready; it ends with this shell. Logs: {logs}. To install the agent:

  docker build -t ghcr.io/vmtap/vmtap:$(sed -n 's/^version = "\\(.*\\)"/\\1/p' pyproject.toml) .
  kind load docker-image --name vmtap ghcr.io/vmtap/vmtap:…
  kubectl apply -k deploy/kustomize/overlays/kind
"""


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory(prefix=f"vmtap-kind-{os.getpid()}-") as logs,
        Kind(Path(logs), internet=True) as kind,
    ):
        if not words:
            print("starting …", file=sys.stderr)
            kind.create()
            print(_WELCOME.format(logs=logs), file=sys.stderr)
            # script(1): job control needs a terminal whose session is in the machine's pid namespace.
            words = ["script", "-qec", shutil.which(os.environ.get("SHELL", "")) or "/bin/sh", "/dev/null"]
            kind.docker.popen(words, cwd=CHECKOUT).wait()
            return 0  # the shell's status is that of its last command
        status: int = kind.docker.popen(words, cwd=CHECKOUT).wait()
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
