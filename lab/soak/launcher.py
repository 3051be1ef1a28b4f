"""A launcher that never becomes QEMU: gets the fds of a pod from the broker, and sends frames through them.

    python -m lab.soak.launcher BROKER_SOCKET PEER_MAC

Reads a command a line and prints a JSON object a line: `open NETNS` gets the fds, in that network namespace; `echo
TOKEN` sends a frame until the peer has sent it back; `close`. {"error": TEXT} tells what failed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import sys
import time
from typing import TYPE_CHECKING

from cni.errors import CniError
from cni.kernel.netns import entered
from cni.launcher import broker_client
from lab.frames import Frame, unpack, write_tap

if TYPE_CHECKING:
    from cni.launcher.broker_client import Attachment

_TUNGETVNETHDRSZ = 0x800454D7
_ECHO_SECONDS = 10.0
_AGAIN_SECONDS = 0.2
"""Until the frame is sent again: a switch may drop the first one."""
_LONGEST = 65536 + 128


class _Opened:
    """An attachment and the fd of its first queue."""

    def __init__(self, attachment: Attachment, fd: int) -> None:
        self.mac, self.fd = attachment.mac, fd
        self._header = struct.unpack("i", fcntl.ioctl(fd, _TUNGETVNETHDRSZ, struct.pack("i", 0)))[0]

    def echo(self, peer: str, token: str) -> str | None:
        """Why no frame came back from the peer; None if one did."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        until = time.monotonic() + _ECHO_SECONDS
        while time.monotonic() < until:
            write_tap(self.fd, Frame(peer, self.mac, token), header=self._header)
            again = time.monotonic() + _AGAIN_SECONDS
            while poll.poll(max(0.0, again - time.monotonic()) * 1000):
                raw = os.read(self.fd, _LONGEST)[self._header :]
                if len(raw) >= 14 and (frame := unpack(raw)).dst == self.mac and frame.token == token:
                    return None
        return f"no frame of {self.mac} came back from the peer in {_ECHO_SECONDS:g} s"


def main() -> None:
    broker, peer = sys.argv[1:]
    held: list[_Opened] = []
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        why: str | None = None
        try:
            if command == "open":
                with open(argument, "rb") as netns, entered(netns.fileno()):
                    given = broker_client.ask(broker, ifnames=[], queues=None, shared=False, open=True)
                held += [_Opened(attachment, fds[0]) for attachment, fds in given]
            elif command == "echo":
                why = next((why for each in held if (why := each.echo(peer, argument))), None)
                why = why if held else "no fd is open"
            else:
                while held:
                    os.close(held.pop().fd)
        except (CniError, OSError, ValueError) as error:
            why = str(error)
        print(json.dumps({"error": why} if why else {}), flush=True)


if __name__ == "__main__":
    main()
