"""Which of a guest's frames the hooks of its link in the pod see: docs/chaining.md has the table.

Each hook drops what it sees. A frame that passes arrives while the hook is there; a marker arrives after it is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from lab.frames import Frame, collect, packet_socket, write_tap
from lab.wire import BRIDGE, BRIDGE_UPLINK, NIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from lab.wire import Lab, Netns
    from tests.netns.conftest import Attached

MAC, PEER_MAC = "02:00:00:00:01:01", "02:00:00:00:00:fe"
DEVICES: dict[str, dict[str, Any]] = {
    "macvtap": {"source": NIC},
    "bridge-tap": {"source": BRIDGE, "device": "tap"},
}
UPLINKS = {"macvtap": NIC, "bridge-tap": BRIDGE_UPLINK}

_ETH_P_ALL = 0x0003  # the rx handler takes a frame before a socket of its ethertype
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
# linux/bpf.h
_BPF_PROG_LOAD, _BPF_LINK_CREATE = 5, 28
_BPF_PROG_TYPE_SCHED_CLS = 3
_BPF_TCX = {"ingress": 46, "egress": 47}
_DROP = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
"""r0 = TCX_DROP; exit"""


def nft(pod: Netns, hook: str) -> Iterator[None]:
    rule = f"chain c {{ type filter hook {hook} device net1 priority 0; ether type 0x88b5 drop\n}}"
    pod.run(["nft", "-f", "-"], stdin=f"table netdev t {{\n{rule}\n}}")
    yield
    pod.run(["nft", "delete", "table", "netdev", "t"])


def tcx(pod: Netns, hook: str) -> Iterator[None]:
    link = pod.call(lambda: _attach(hook))
    yield
    os.close(link)


def qdisc(pod: Netns, hook: str) -> Iterator[None]:
    """A token bucket that is smaller than any frame."""
    pod.run(["tc", "qdisc", "add", "dev", "net1", hook, "tbf", "rate", "8kbit", "burst", "50", "limit", "50"])
    yield
    pod.run(["tc", "qdisc", "del", "dev", "net1", hook])


HOOKS: dict[str, Callable[[Netns, str], AbstractContextManager[None]]] = {
    "nft": contextmanager(nft),
    "tcx": contextmanager(tcx),
    "qdisc": contextmanager(qdisc),
}


@pytest.mark.parametrize(
    ("device", "hook", "where", "lost"),
    [
        ("macvtap", "nft", "ingress", ["to the guest"]),
        ("macvtap", "nft", "egress", ["from the guest"]),
        ("macvtap", "tcx", "ingress", ["to the guest"]),
        ("macvtap", "tcx", "egress", ["from the guest"]),
        ("macvtap", "qdisc", "root", ["from the guest"]),
        ("bridge-tap", "nft", "ingress", []),
        ("bridge-tap", "nft", "egress", []),
        ("bridge-tap", "tcx", "ingress", ["from the guest"]),
        ("bridge-tap", "tcx", "egress", ["to the guest"]),
        ("bridge-tap", "qdisc", "root", ["to the guest"]),
    ],
)
def test_what_a_hook_sees(
    *, lab: Lab, attach: Callable[..., Attached], device: str, hook: str, where: str, lost: list[str]
) -> None:
    made = attach(lab.pod(), mac=MAC, **DEVICES[device])
    frames = {"to the guest": "guest", "from the guest": "peer"}
    with (
        packet_socket(lab.peer, "eth0") as peer,
        packet_socket(lab.node, UPLINKS[device], _ETH_P_ALL) as node,
    ):

        def send(to_guest: str, from_guest: str) -> None:
            peer.send(Frame(MAC, PEER_MAC, to_guest).pack())
            collect({"node": node}, until=to_guest)
            write_tap(made.fd, Frame(PEER_MAC, MAC, from_guest))

        ports: dict[str, int | socket.socket] = {"guest": made.fd, "peer": peer}
        with HOOKS[hook](made.pod, where):
            send(*frames)
            for token, port in frames.items():
                if token not in lost:
                    collect({port: ports[port]}, until=token)
        send("marker", "marker")
        got = collect(ports, until="marker")
    assert [frame.token for each in got.values() for frame in each] == []


def _attach(hook: str) -> int:
    """An fd of the link between the program that drops everything and the hook of net1. Raises OSError."""
    code, licence = ctypes.create_string_buffer(_DROP), ctypes.create_string_buffer(b"GPL")
    instructions = len(_DROP) // 8
    load = struct.pack(
        "=IIQQ", _BPF_PROG_TYPE_SCHED_CLS, instructions, ctypes.addressof(code), ctypes.addressof(licence)
    )
    program = _bpf(_BPF_PROG_LOAD, load)
    try:
        request = struct.pack("=IIII", program, socket.if_nametoindex("net1"), _BPF_TCX[hook], 0)
        return _bpf(_BPF_LINK_CREATE, request)
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("tcx needs Linux 6.6")
        raise
    finally:
        os.close(program)


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    fd = int(libc.syscall(_SYS_BPF[platform.machine()], command, held, len(held)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command})")
    return fd
