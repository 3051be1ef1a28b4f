"""Runs the executable's main() in forks of a process that has imported everything, each stopped before it begins.

strace can then be attached to what a test is about, and not to the interpreter's start. Reads one job a line, JSON
{"env": {}, "stdin": path, "stdout": path, "stderr": path}; prints the pid when it is stopped, and its wait status
when it has ended. Started by inject.py, in the node's network namespace.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import cni.attach.check
import cni.attach.ipam
import cni.kernel.iproute
import cni.kernel.tap
import cni.kernel.tapdev  # noqa: F401
from cni import __main__ as executable


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.clear()
            os.environ.update(job["env"])
            sys.argv = ["vmtap"]
            for fd, (name, flags) in enumerate(
                (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))
            ):
                os.dup2(os.open(job[name], flags), fd)
            os.closerange(3, 64)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(executable.main())
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
