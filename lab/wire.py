"""Network namespaces wired into a host with a NIC, a switch that may reflect, and a peer machine.

    node                          switch                 peer
    eth1 ─────────────────────── node   ┐
    br0 ── eth2 ──────────────── uplink ├ sw (a bridge)
                                 peer   ┘─────────────── eth0  10.77.0.254/24

Each lab has names of its own, so that many can run at once; closing it removes all of it. IPv6 is off on its machines,
so that a capture shows only frames of what a test is about. Must not use anything of cni/.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.process import PATIENCE, Closing, LabError, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from lab.process import RunOptions, Word

T = TypeVar("T")

FOLDER = Path("/run")
"""Not iproute2's /run/netns: the first `ip netns add` mounts that folder over itself, and mounts in it stay busy."""

NIC = "eth1"
"""The node's NIC, for macvtaps."""
BRIDGE = "br0"
"""The node's Linux bridge, for taps."""
BRIDGE_UPLINK = "eth2"
"""The node's second NIC: the bridge's port to the switch."""
PEER_ADDRESS = "10.77.0.254/24"

_CLONE_FS = 0x200
_CLONE_NEWNET = 0x40000000
_ETHTOOL_GLINK = 0x0A
_RTMGRP_LINK = 1
_MS_BIND = 4096
_MNT_DETACH = 2
_SIOCETHTOOL = 0x8946
_libc = ctypes.CDLL(None, use_errno=True)


class Netns(Closing):
    """A network namespace with a path, as a container runtime passes it to a plugin.

    ipv6=False turns IPv6 off on every link that is created in it or moved into it.
    """

    def __init__(self, label: str, *, ipv6: bool = True) -> None:
        fd, name = tempfile.mkstemp(prefix=f"vmtap-lab-{os.getpid()}-", suffix=f"-{label}", dir=FOLDER)
        os.close(fd)
        self.path = Path(name)

        def unshare() -> None:
            _syscall("unshare", _CLONE_NEWNET)
            if not ipv6:
                for scope in ("all", "default"):
                    Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
            _syscall("mount", b"/proc/thread-self/ns/net", bytes(self.path), None, _MS_BIND, None)

        try:
            _in_thread(unshare)
            self.ip("link set lo up")
        except BaseException:
            self.close()
            raise

    def argv(self, argv: Sequence[Word]) -> list[Word]:
        """The command line that runs argv in this namespace."""
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def run(self, argv: Sequence[Word], **options: Unpack[RunOptions]) -> subprocess.CompletedProcess[str]:
        """process.run() in this namespace."""
        return run(self.argv(argv), **options)

    def popen(self, argv: Sequence[Word], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen in this namespace."""
        return subprocess.Popen(self.argv(argv), **options)

    def ip(self, *commands: str) -> None:
        """Runs ip(8) commands, each without the word `ip`, in one process. Raises LabError at the first that fails."""
        self.run(["ip", "-batch", "-"], stdin="\n".join(commands))

    def links(self) -> dict[str, dict[str, Any]]:
        """The output of `ip -d -j link show`, by the link's name; "promiscuity" is the kernel's counter."""
        shown: list[dict[str, Any]] = json.loads(self.run(["ip", "-d", "-j", "link", "show"]).stdout)
        return {link["ifname"]: link for link in shown}

    def wait_until_up(self, *names: str) -> None:
        """Waits until each of the links exists and has a carrier, which the kernel notes a moment after `set up`."""
        until = time.monotonic() + PATIENCE
        with self.call(_link_events) as events:
            while True:
                _note_carriers(events, names)
                links = self.links()
                late = [name for name in names if links.get(name, {}).get("operstate") != "UP"]
                if not late:
                    return
                events.settimeout(max(0.001, until - time.monotonic()))
                try:
                    events.recv(1 << 16)
                except TimeoutError as error:
                    raise LabError(f"no carrier on {', '.join(late)} within {PATIENCE:g} s") from error
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # the socket's buffer has overflowed, so look again
                        raise

    def call(self, function: Callable[[], T]) -> T:
        """Calls function in a thread of this namespace; sockets that it opens stay in the namespace."""

        return in_namespaces([self.path], function)

    def close(self) -> None:
        """Removes the path. The kernel frees the namespace when its last process and fd are gone."""
        with contextlib.suppress(OSError):  # not a mount, if the constructor failed half-way
            _syscall("umount2", bytes(self.path), _MNT_DETACH)
        self.path.unlink(missing_ok=True)


class Switch(Netns):
    """A learning switch. Its ports are links of the bridge `sw`."""

    def __init__(self) -> None:
        super().__init__("switch", ipv6=False)
        self.ip("link add sw up type bridge stp_state 0 forward_delay 0 mcast_snooping 0")

    def plug(self, port: str, machine: Netns, nic: str, mtu: int) -> None:
        """Connects a new port to a new NIC of the machine; both are up."""
        self.ip(
            f"link add {port} mtu {mtu} type veth peer name {nic} mtu {mtu} netns {machine.path}",
            f"link set {port} master sw up",
        )
        machine.ip(f"link set {nic} up")

    def reflect(self, on: bool, port: str = "node") -> None:
        """Sets reflective relay (IEEE 802.1Qbg): whether a frame may go out of the port that it came in by."""
        self.run(["bridge", "link", "set", "dev", port, "hairpin", "on" if on else "off"])


class Lab(Closing):
    """The node, the switch and the peer of the picture above. Reflective relay is off at first."""

    def __init__(self, *, mtu: int = 1500) -> None:
        with contextlib.ExitStack() as stack:
            self.switch = stack.enter_context(Switch())
            self.node = stack.enter_context(Netns("node", ipv6=False))
            self.peer = stack.enter_context(Netns("peer", ipv6=False))
            self.switch.plug("node", self.node, NIC, mtu)
            self.switch.plug("uplink", self.node, BRIDGE_UPLINK, mtu)
            self.switch.plug("peer", self.peer, "eth0", mtu)
            self.node.ip(
                f"link add {BRIDGE} up mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                f"link set {BRIDGE_UPLINK} master {BRIDGE}",
            )
            self.peer.ip(f"address add {PEER_ADDRESS} dev eth0")
            self.switch.wait_until_up("sw", "node", "uplink", "peer")
            self.node.wait_until_up(NIC, BRIDGE_UPLINK, BRIDGE)
            self.peer.wait_until_up("eth0")
            self._stack = stack.pop_all()

    def pod(self, label: str = "pod") -> Netns:
        """A namespace for a pod, as a runtime makes it: IPv6 is on. Closed with the lab."""
        return self._stack.enter_context(Netns(label))

    def close(self) -> None:
        self._stack.close()


def in_namespaces(namespaces: Sequence[Path], function: Callable[[], T]) -> T:
    """Calls function in a new thread in these namespaces. A pid namespace applies to processes that it starts only."""

    def inside() -> T:
        # setns(2) into a mount namespace changes the root folder, which the other threads must not share.
        _syscall("unshare", _CLONE_FS)
        with contextlib.ExitStack() as stack:
            # All are opened first: in another mount namespace their paths may name other files.
            for namespace in [stack.enter_context(path.open("rb")) for path in namespaces]:
                _syscall("setns", namespace.fileno(), 0)
        return function()

    return _in_thread(inside)


def _link_events() -> socket.socket:
    """A socket that receives every change of a link in the calling thread's namespace."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, _RTMGRP_LINK))
    return events


def _note_carriers(any_socket: socket.socket, names: Sequence[str]) -> None:
    """Has the kernel note carriers at once that it would note within a second (net/core/link_watch.c).

    It does so for a link that is asked for its carrier (ETHTOOL_GLINK), in the socket's namespace; before Linux 6.8 it
    answers only.
    """
    for name in names:
        value = array.array("I", (_ETHTOOL_GLINK, 0))
        request = struct.pack("16sP", name.encode(), value.buffer_info()[0])
        with contextlib.suppress(OSError):  # there is no such link yet
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def _syscall(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _in_thread(function: Callable[[], T]) -> T:
    """Calls function in a new thread, whose namespaces it may change. Returns its result, or raises its exception."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
