"""Runs in a pod, on the device of its macvtap, with no other module: peer.py answer | ask.

`answer` returns each frame to its sender. `ask` sends one every 10 ms, to whoever has answered within the last second,
else to everybody; each second it prints, as JSON, how many it has sent since the first answer and how many are lost. A
frame is lost if a later one was answered: nothing on the way reorders them. Two that ask answer each other.
"""

import glob
import json
import os
import select
import sys
import time
from pathlib import Path

VNET_HEADER = 10
TYPE = b"\x88\xb5"
PAUSE = 0.01
EVERYBODY = b"\xff" * 6


def main(role: str) -> None:
    [tap] = glob.glob("/dev/tap*")
    fd = os.open(tap, os.O_RDWR)
    mine = bytes.fromhex(Path("/sys/class/net/net1/address").read_text().strip().replace(":", ""))

    def send(to: bytes, text: bytes) -> None:
        os.write(fd, bytes(VNET_HEADER) + (to + mine + TYPE + text).ljust(60, b"\0"))

    def receive(seconds: float) -> bytes:
        """A frame of the other, or nothing."""
        if select.select([fd], [], [], seconds)[0]:
            frame = os.read(fd, 1 << 17)[VNET_HEADER:]
            if frame[12:14] == TYPE:
                return frame
        return b""

    if role == "answer":
        while True:
            frame = receive(3600)
            if frame[14:17] == b"ask":
                send(frame[6:12], b"ans" + frame[17:25])

    peer, first = EVERYBODY, 0
    answered: set[int] = set()
    number = 0
    heard = printed = time.monotonic()
    while True:
        send(peer, b"ask" + number.to_bytes(8, "big"))
        number += 1
        until = time.monotonic() + PAUSE
        while (left := until - time.monotonic()) > 0:
            frame = receive(left)
            if frame[14:17] == b"ans":
                if not answered:
                    first = int.from_bytes(frame[17:25], "big")
                answered.add(int.from_bytes(frame[17:25], "big"))
                peer, heard = frame[6:12], time.monotonic()
            elif frame[14:17] == b"ask":
                send(frame[6:12], b"ans" + frame[17:25])
        if time.monotonic() > heard + 1:
            peer = EVERYBODY
        if answered and time.monotonic() > printed + 1:
            printed = time.monotonic()
            lost = len(set(range(first, max(answered))) - answered)
            print(json.dumps({"sent": number - first, "answered": len(answered), "lost": lost}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
