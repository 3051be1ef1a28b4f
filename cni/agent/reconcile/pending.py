"""Carries out the DELs that the shim left in the folder pending/ while the agent was away."""

from __future__ import annotations

import os
import stat
import struct
import time
from contextlib import suppress
from functools import partial
from logging import INFO

from cni.agent import wire
from cni.agent.log import log
from cni.config import netconf
from cni.errors import reason
from cni.state.record import identifier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.metrics import Registry
    from cni.agent.reconcile.workers import Workers
    from cni.attach.call import Request
    from cni.plugin import Response
    from cni.state.store import Store

_RETRY_SECONDS = 24 * 3600.0
"""How long a DEL that fails is retried before it is set aside."""
_UNFINISHED_SECONDS = 60.0
"""The age at which a half-written file is removed: its shim was killed."""


class Pending:
    """The folder pending/. answer: carries out a request as the CNI socket does."""

    def __init__(
        self, store: Store, answer: Callable[[Request], Response], workers: Workers, registry: Registry
    ) -> None:
        self._store = store
        self._answer = answer
        self._workers = workers
        self._folder = f"{store.folder}/pending"
        self._done = registry.counter(
            "vmtap_reconcile_pending_done_total", "DELs carried out that came while the agent was away."
        )
        # Computed at each scrape: counting up and down would race with the workers.
        registry.computed(
            "vmtap_reconcile_pending",
            "DELs that wait in the folder pending/.",
            look=lambda: {(): sum(not name.endswith((".new", ".bad")) for name in self._waiting())},
        )

    def look(self) -> None:
        """Have each pending DEL carried out, and remove half-written files."""
        for name in self._waiting():
            path = f"{self._folder}/{name}"
            if name.endswith(".new"):
                with suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime > _UNFINISHED_SECONDS:
                        os.unlink(path)
            elif not name.endswith(".bad"):
                self._workers.submit(path, partial(self._carry_out, path))

    def _waiting(self) -> list[str]:
        """The names in pending/, which begin with a time: the oldest first."""
        return sorted(os.listdir(self._folder)) if os.path.isdir(self._folder) else []

    def _carry_out(self, path: str) -> None:
        """Carry out one DEL and remove its file. One that cannot be read or fails for too long is set aside."""
        try:
            data, status = _read(path)
            request = wire.parse(data)
            if request.env.get("CNI_COMMAND") != "DEL":
                raise wire.WireError("it is not a DEL")
        except FileNotFoundError:
            return
        except wire.WireError as error:
            self._set_aside(path, str(error))
            return
        if self._added_since(request, status.st_mtime_ns):
            self._remove(path)
            log(INFO, "pending DEL dropped: the attachment was added again after it", **_fields(request))
            return
        response = self._answer(request)
        if response.error is None:
            self._remove(path)
            self._done.inc()
            log(INFO, "pending DEL carried out", **_fields(request))
        elif time.time() - status.st_mtime > _RETRY_SECONDS:
            self._set_aside(path, str(response.error))
        else:
            self._workers.failed("pending DEL", str(response.error), **_fields(request))

    def _added_since(self, request: Request, since_ns: int) -> bool:
        """Whether the record is newer than the DEL: a container that is restarted keeps its id and has another ADD."""
        container_id, ifname = (request.env.get(name, "") for name in ("CNI_CONTAINERID", "CNI_IFNAME"))
        network = netconf.parse(request.stdin, command="DEL").name
        if network:
            ids = [identifier(network, container_id, ifname)]
        else:
            ids = [record.id for record in self._store.of(container_id, ifname)]
        return any((self._store.written_ns(id) or 0) > since_ns for id in ids)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # during a replacement, by the other agent
            os.unlink(path)

    def _set_aside(self, path: str, why: str) -> None:
        """Rename the file to NAME.bad, for an administrator to look at."""
        os.rename(path, f"{path}.bad")
        self._workers.failed("pending request set aside, as NAME.bad", why, path=path)


def _read(path: str) -> tuple[bytes, os.stat_result]:
    """The file's content and status. Raises FileNotFoundError, and WireError if it cannot be a file of the shim."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise wire.WireError(reason(error)) from error
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise wire.WireError("it is not a regular file of the agent's user")
        return file.read(wire.ENV_LIMIT + wire.STDIN_LIMIT + struct.calcsize("=IIII")), status


def _fields(request: Request) -> dict[str, object]:
    return {"container": request.env.get("CNI_CONTAINERID"), "ifname": request.env.get("CNI_IFNAME")}
