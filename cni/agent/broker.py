"""The fd broker: a unix socket for pods, from which a launcher gets the open fds of its own pod's attachments.

The broker identifies a client by the network namespace of its process (cni/agent/peer.py) and trusts nothing that the
client sends, so that a client reaches the attachments of its own pod only. One connection a request, one line of JSON a
message; cni/launcher/broker_client.py is the client:

    agent      {"broker": 1}                   once the client is identified and its pod has attachments
    launcher   {"ifnames": ["net1"], "queues": 2, "shared": false, "open": true}       each key is optional
    agent      {"attachments": [{"ifname": "net1", …, "opened": 2}]} and the fds in that order; or
               {"error": {"code": 106, "msg": "…", "details": ""}}, instead of either line

A launcher cannot delay those of other pods: it has _SECONDS in all and a thread of its own, and its pod has the limits
of cni/agent/admission.py. The thread that accepts neither reads from a connection nor closes what a pod has sent
(cni/agent/sent_fds.py). Must not attach, detach or change a link.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from logging import ERROR, INFO, WARNING

from cni.agent import peer, sent_fds, server
from cni.agent.admission import Admission
from cni.agent.holders import Holders
from cni.agent.log import log
from cni.dataclass import dataclass
from cni.errors import CniError, reason, refused
from cni.kernel import netns, tapdev
from cni.spec import (
    DECODING_FAILURE,
    INTERNAL,
    INVALID_ENVIRONMENT,
    INVALID_NETNS,
    NO_ATTACHMENT,
    TRY_AGAIN_LATER,
)
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cni.agent.admission import Space
    from cni.agent.metrics import Registry
    from cni.agent.peer import Peer
    from cni.state.record import Record

REQUEST_LIMIT = 64 << 10
GREETING = b'{"broker":1}\n'
_SECONDS = 5.0
"""From accept(2) to the end of the answer. A launcher needs milliseconds."""
_STUCK_SECONDS = 5.0
"""How long the thread that accepts may be busy with one connection: it needs less than a millisecond."""
_PAUSE_SECONDS = 0.1
"""Until the next try, if accept(2) fails."""
_SCM_MAX_FD = 253  # linux/net/scm.h: fds in one message
_LOGGED_CHARACTERS = 500
"""Of an error: a request of 64 KiB may be quoted in it."""
_VISIBLE = ("network", "ifname", "device", "mode", "mac", "mtu", "queues", "ips", "routes", "dns")
"""The fields of a record that a pod may read. The config is not among them: it may contain a delegate's secrets."""


@dataclass(frozen=True)
class LauncherRequest:
    """A launcher's request. Without ifnames: all attachments; without queues: as many as each has."""

    ifnames: tuple[str, ...] = ()
    queues: int | None = None
    shared: bool = False
    open: bool = True


class Broker:
    """Serves FOLDER/launcher/broker.sock from start() to stop()."""

    def __init__(self, folder: str, registry: Registry) -> None:
        self.path = f"{folder}/launcher/broker.sock"
        self._store = Store(folder)
        self._holders = Holders(self._store)
        self._own = netns.own_identity()
        self._admission = Admission()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._busy_since: float | None = None
        self._given = registry.counter("vmtap_broker_fds_total", "File descriptors given to launchers.")
        self._refused = registry.counter(
            "vmtap_broker_refusals_total", "Launchers that the broker refused.", "code"
        )

    def start(self) -> None:
        """Listen and serve. Raises OSError. Pods mount the socket's folder, so nothing else is in it."""
        self._holders.start()
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o755)  # noqa: S103 - pods run as any user, and makedirs obeys the umask
        self._listener = server.listen(self.path, mode=0o666, prepare=self._refuse_fds)
        self._acceptor = threading.Thread(target=self._accept, name="broker", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Accept no more; wait for the requests in flight, which end by their deadline. The socket file stays."""
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        until = time.monotonic() + _SECONDS + 1
        self._acceptor.join(_SECONDS)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._close(self._listener)
        self._holders.stop()

    def stuck(self) -> str | None:
        """Why launchers are not served; None if the thread that accepts is not stuck and its socket is there.

        What is measured does not depend on how many launchers wait: a pod that connects all the time must not be able
        to have the agent restarted. Raises OSError if the socket is gone.
        """
        if self._stopping.is_set():
            return None
        if not self._acceptor.is_alive():
            return "the thread that accepts launchers has ended"
        if (since := self._busy_since) and (seconds := time.monotonic() - since) > _STUCK_SECONDS:
            return f"the thread that accepts launchers has been busy with one of them for {seconds:.0f} s"
        os.stat(self.path)
        return None

    def _refuse_fds(self, listener: socket.socket) -> None:
        self._fds_arrive = not sent_fds.refuse(listener)

    def _close(self, connection: socket.socket) -> None:
        if self._fds_arrive:
            sent_fds.close(connection)
        else:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                log(ERROR, "the broker cannot accept", error=reason(error))  # out of fds or memory: retry
                self._stopping.wait(_PAUSE_SECONDS)
                continue
            self._busy_since = time.monotonic()
            try:
                self._admit(connection)
            except Exception as error:  # the broker must go on for other launchers
                self._close(connection)
                log(ERROR, "the broker failed", error=repr(error))
            self._busy_since = None

    def _admit(self, connection: socket.socket) -> None:
        """Start a thread for the connection, or refuse it. Does not wait for the launcher."""
        space, why = self._admission.enter(peer.claimed_netns(connection))
        if why:
            self._refuse(connection, CniError(TRY_AGAIN_LATER, why), space)
            self._close(connection)
            return
        thread = threading.Thread(
            target=self._serve, args=(connection, space), name="broker request", daemon=True
        )
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self._leave(thread, space)
            raise

    def _serve(self, connection: socket.socket, space: Space) -> None:
        who = None
        try:
            connection.settimeout(_SECONDS)
            with peer.identify(connection) as who:
                self._exchange(connection, who, space)
        except CniError as error:
            self._refuse(connection, error, space, who)
        except OSError as error:  # the launcher was too slow, or has ended
            self._refuse(connection, refused(error, "the request was not finished"), space, who)
        except Exception as error:
            log(ERROR, "the broker failed", error=repr(error))
            self._refuse(
                connection, CniError(INTERNAL, f"internal error in the agent: {error!r}"), space, who
            )
        finally:
            self._close(connection)
            self._leave(threading.current_thread(), space)

    def _leave(self, thread: threading.Thread, space: Space) -> None:
        self._admission.leave(space)
        with self._lock:
            self._threads.discard(thread)

    def _exchange(self, connection: socket.socket, who: Peer, space: Space) -> None:
        if who.netns_id == self._own:
            raise CniError(
                INVALID_NETNS, "the broker is for pods; on the host, run vmtap-launch as root with --netns"
            )
        if not (records := self._attachments(who)):
            raise CniError(
                NO_ATTACHMENT, "no attachment in this network namespace: attach the pod to a network of vmtap"
            )
        self._admission.has_attachments(space)
        until = time.monotonic() + _SECONDS
        request = parse(_receive(connection, who, until))
        chosen = [
            (tapdev.tuned(who.netns, record) or record, queues) for record, queues in choose(records, request)
        ]
        if not request.open:
            _send(connection, chosen, [], until)
            return
        with ExitStack() as fds, ExitStack() as undo:
            for record, _ in chosen:
                if self._holders.add(record.id, record.ifname, who.process, shared=request.shared):
                    undo.callback(self._holders.remove, record.id, who.process)
            opened = []
            for record, queues in chosen:
                for fd in tapdev.open_queues(who.netns, record, queues):
                    fds.callback(os.close, fd)
                    opened.append(fd)
            _send(connection, chosen, opened, until, undo.pop_all)
        self._given.inc(by=len(opened))
        log(
            INFO,
            "fds given to a launcher",
            pid=who.process.pid,
            uid=who.uid,
            shared=request.shared,
            attachments={record.id: queues for record, queues in chosen},
        )

    def _attachments(self, who: Peer) -> list[Record]:
        """The attachments of the peer's network namespace, by ifname: its links that have a record.

        Looks up the reserved indexes in the namespace. To list its links would hold the interpreter's lock for a
        second if it has fifty thousand; and a record of a dead namespace whose inode number was reused for this one
        has no link here.
        """
        reserved = dict(self._store.reserved())
        links = {}
        with netns.entered(who.netns):
            for index in reserved:
                with suppress(OSError):  # ENXIO
                    links[index] = socket.if_indextoname(index)
        found = []
        for index, name in links.items():
            record = self._store.load(reserved[index])
            if record and (record.netns_id, record.ifindex, record.ifname) == (who.netns_id, index, name):
                found.append(record)
        return sorted(found, key=lambda record: record.ifname)

    def _refuse(
        self, connection: socket.socket, error: CniError, space: Space, who: Peer | None = None
    ) -> None:
        """Send the error if that does not block, count it, and log it if the pod's quota allows."""
        self._refused.inc(str(error.code))
        document = {"error": {"code": error.code, "msg": error.msg, "details": error.details}}
        with suppress(OSError):
            connection.settimeout(0)
            connection.sendall(_line(document))
        unlogged = self._admission.may_log(space)
        if unlogged is None:
            return
        fields: dict[str, object] = {"unlogged": unlogged} if unlogged else {}
        if space.key:
            fields["netns"] = space.key[1]
        if who:
            fields |= {"pid": who.process.pid, "uid": who.uid, "netns": who.netns_id[1]}
        log(WARNING, "launcher refused", code=error.code, error=str(error)[:_LOGGED_CHARACTERS], **fields)


def parse(line: bytes) -> LauncherRequest:
    """Parse the launcher's line. Raises CniError 6 if it is not a valid request."""
    try:
        document: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, "the request is not JSON", reason(error)) from None
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "ifnames": (_names, "a list of different names"),
        "queues": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
        "shared": (lambda value: type(value) is bool, "true or false"),
        "open": (lambda value: type(value) is bool, "true or false"),
    }
    if type(document) is not dict:
        raise CniError(DECODING_FAILURE, "the request is not a JSON object")
    for key, value in document.items():
        if key not in rules:
            raise CniError(
                DECODING_FAILURE, f"{key!r} is not a field of a request; the fields are {', '.join(rules)}"
            )
        holds, wanted = rules[key]
        if not holds(value):
            raise CniError(DECODING_FAILURE, f"{key} must be {wanted}")
    return LauncherRequest(**document | {"ifnames": tuple(document.get("ifnames", ()))})


def choose(records: list[Record], request: LauncherRequest) -> list[tuple[Record, int]]:
    """The requested records, in the order of the request, each with its number of queues. Raises CniError."""
    there = {record.ifname: record for record in records}
    if missing := [name for name in request.ifnames if name not in there]:
        raise CniError(
            NO_ATTACHMENT,
            f"no attachment {', '.join(map(repr, missing[:3]))} in this network namespace; there is {', '.join(there)}",
        )
    chosen = []
    for name in request.ifnames or there:
        record = there[name]
        if request.queues is not None and request.queues > record.queues:
            raise CniError(
                INVALID_ENVIRONMENT,
                f'queues {request.queues}: {name} has {record.queues}, by "queues" of its network config',
            )
        chosen.append((record, request.queues or record.queues))
    if sum(queues for _, queues in chosen) > _SCM_MAX_FD:
        raise CniError(INVALID_ENVIRONMENT, f"more than {_SCM_MAX_FD} queues in one request: request fewer")
    return chosen


def _receive(connection: socket.socket, who: Peer, until: float) -> bytes:
    """Send the greeting; return the line that the peer process sends after it. Raises CniError, OSError."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        pass
    else:
        raise CniError(
            DECODING_FAILURE, "the launcher sent data before the greeting, or closed the connection"
        )
    connection.sendall(GREETING)
    line = b""
    while not line.endswith(b"\n"):
        _set_timeout(connection, until)
        # Fds must not be received, since there is no room for them and this thread would close them: see sent_fds.py.
        room = socket.CMSG_SPACE(peer.UCRED.size)
        data, _, flags, _ = connection.recvmsg(REQUEST_LIMIT + 1 - len(line), room, socket.MSG_PEEK)
        if flags & socket.MSG_CTRUNC:
            raise CniError(DECODING_FAILURE, "a request contains no file descriptors")
        if not data:
            raise CniError(DECODING_FAILURE, "the connection ended before the request's line did")
        data, credentials, _, _ = connection.recvmsg(len(data), room)
        if not who.proven(credentials):
            raise CniError(INVALID_NETNS, "the request must come from the process that connected")
        line += data
        if len(line) > REQUEST_LIMIT:
            raise CniError(DECODING_FAILURE, f"the request is longer than {REQUEST_LIMIT} bytes")
    return line


def _send(
    connection: socket.socket,
    chosen: list[tuple[Record, int]],
    fds: list[int],
    until: float,
    given: Callable[[], object] = lambda: None,
) -> None:
    """Send the answer. Calls given() once the fds are sent, since they cannot be taken back."""
    described = [
        {key: getattr(record, key) for key in _VISIBLE} | {"opened": queues if fds else 0}
        for record, queues in chosen
    ]
    data = _line({"attachments": described})
    _set_timeout(connection, until)
    sent = socket.send_fds(connection, [data], fds)
    given()
    while sent < len(data):
        _set_timeout(connection, until)
        sent += connection.send(data[sent:])


def _line(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _set_timeout(connection: socket.socket, until: float) -> None:
    connection.settimeout(max(0.001, until - time.monotonic()))


def _names(value: Any) -> bool:
    return type(value) is list and all(type(name) is str for name in value) and len(set(value)) == len(value)
