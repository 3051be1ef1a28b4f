"""Who connected: a pid that another process has by now must not be believed."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cni.agent import peer
from cni.errors import CniError
from cni.kernel import netns
from cni.spec import INVALID_NETNS
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_SUCH_OPTION = 9999
"""Instead of SO_PEERPIDFD: the kernel's answer is an older kernel's."""


@pytest.fixture(params=["SO_PEERPIDFD", "pidfd_open"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what this kernel has, and as on one before 6.5."""
    if request.param == "pidfd_open":
        monkeypatch.setattr(peer, "SO_PEERPIDFD", NO_SUCH_OPTION)
    return str(request.param)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


def connected(listener: socket.socket) -> tuple[int, socket.socket]:
    """A child that connects and waits, and our end of it."""
    child = os.fork()
    if child == 0:
        with socket.socket(socket.AF_UNIX) as own:
            own.connect(listener.getsockname())
            own.recv(1)
            own.sendall(b"here")
            own.recv(1)
            os._exit(0)
    return child, listener.accept()[0]


def test_a_living_peer(kernel: str, listener: socket.socket) -> None:
    child, connection = connected(listener)
    with connection, peer.identify(connection) as who:
        assert (who.process.pid, who.uid, who.netns_id) == (child, os.getuid(), netns.own_identity())
        assert who.process.alive()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        connection.sendall(b"?")
        _, credentials, _, _ = connection.recvmsg(16, socket.CMSG_SPACE(peer.UCRED.size))
        assert who.proven(credentials)
        assert not who.proven([])
        connection.close()
        os.waitpid(child, 0)
        assert not who.proven(credentials)  # what it said is true no more
        assert not who.process.alive()


def test_a_peer_that_has_ended(kernel: str, listener: socket.socket) -> None:
    child, connection = connected(listener)
    with connection:
        os.kill(child, 9)
        os.waitpid(child, 0)
        with pytest.raises(CniError, match="has ended") as caught:
            peer.identify(connection)
    assert caught.value.code == INVALID_NETNS


def test_a_zombie_is_no_peer(kernel: str, listener: socket.socket) -> None:
    child, connection = connected(listener)
    pidfd = os.pidfd_open(child)
    try:
        with connection:
            os.kill(child, 9)
            assert select.select([pidfd], [], [], LIMIT)[0]
            with pytest.raises(CniError, match="has ended"):
                peer.identify(connection)
    finally:
        os.close(pidfd)
        os.waitpid(child, 0)


def test_a_start_time_tells_two_of_one_pid_apart() -> None:
    own = peer.Process(os.getpid(), peer.start_time(os.getpid()))
    assert own.alive()
    assert not peer.Process(own.pid, own.start - 1).alive()


RECYCLED = """
import json, os, socket, sys
from cni.kernel import netns
from cni.agent import peer
from cni.errors import CniError
peer.SO_PEERPIDFD = int(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0vmtap-" + os.urandom(8).hex())
listener.listen()
go, ready = socket.socketpair()
first = os.fork()
if first == 0:  # it connects, leaves the connection to its child, and ends
    own = socket.socket(socket.AF_UNIX)
    own.connect(listener.getsockname())
    if os.fork() == 0:
        ready.recv(1)
        own.sendall(b"request")
    os._exit(0)
connection, _ = listener.accept()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
os.waitpid(first, 0)
with open("/proc/sys/kernel/ns_last_pid", "w") as file:
    file.write(str(first - 1))
out, done = os.pipe()
victim = os.fork()
if victim == 0:  # the number again, in another network namespace
    assert netns.libc.unshare(netns.CLONE_NEWNET) == 0
    os.write(done, b".")
    os.read(os.pipe()[0], 1)
os.read(out, 1)
said = {"same pid": victim == first}
try:
    who = peer.identify(connection)
except CniError as error:
    said["refused"] = str(error)
else:
    said["taken for the victim"] = who.netns_id != netns.own_identity()
    go.send(b".")
    _, credentials, _, _ = connection.recvmsg(16, socket.CMSG_SPACE(peer.UCRED.size))
    said["proven"] = who.proven(credentials)
    said["proven by the victim"] = who.proven(
        [(socket.SOL_SOCKET, peer.SCM_CREDENTIALS, peer.UCRED.pack(victim, 0, 0))]
    )
os.kill(victim, 9)
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (peer.SO_PEERPIDFD, {"refused"}),
        (NO_SUCH_OPTION, {"taken for the victim", "proven", "proven by the victim"}),
    ],
    ids=["SO_PEERPIDFD", "pidfd_open"],
)
def test_a_recycled_pid(option: int, expected: set[str]) -> None:
    """A real one, in a pid namespace of its own: the kernel is told which number comes next.

    Where it is not known who connected, the victim is taken for the peer; so the request must be its own, too.
    """
    code = [sys.executable, "-c", RECYCLED, str(option)]
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *code],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    said = json.loads(done.stdout)
    assert said.pop("same pid") is True
    assert set(said) == expected
    if "proven" in said:
        assert said == {"taken for the victim": True, "proven": False, "proven by the victim": True}
    else:
        assert "has ended" in said["refused"]
