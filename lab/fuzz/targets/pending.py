"""A DEL that the shim left in pending/ while the agent was away: Pending carries it out or sets it aside."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cni.agent.log import LOG
from cni.agent.metrics import Registry
from cni.agent.reconcile.pending import Pending
from cni.plugin import Response
from cni.state.store import Store
from lab.fuzz.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.reconcile.workers import Workers
    from cni.attach.call import Request


class _AtOnce:
    """In the place of Workers: carries out a job in the calling thread, and lets its exceptions through."""

    def submit(self, _: str, job: Callable[[], None]) -> None:
        job()

    def failed(self, *_: str, **fields: Any) -> None: ...


class _Folder:
    """A state folder, and the pending requests that reached the plugin."""

    def __init__(self, path: str) -> None:
        LOG.disabled = True
        self.store = Store(path)
        self.store.prepare()
        self.waiting = Path(path, "pending")
        self.waiting.mkdir()
        self.answered: list[Request] = []
        self.pending = Pending(self.store, self._answer, cast("Workers", _AtOnce()), Registry())

    def _answer(self, request: Request) -> Response:
        self.answered.append(request)
        return Response(b"", 0)


_folder = cache(_Folder)


def run(data: bytes) -> None:
    """Leave data in pending/ and have the agent look: only a DEL is carried out, and nothing waits afterwards."""
    here = _folder(f"{tempfile.gettempdir()}/state")
    here.answered.clear()
    (here.waiting / "1.1").write_bytes(data)
    here.pending.look()
    left = [path.name for path in here.waiting.iterdir()]
    assert left in ([], ["1.1.bad"])
    for name in left:
        (here.waiting / name).unlink()
    for request in here.answered:
        assert request.env["CNI_COMMAND"] == "DEL"
        assert request.netns is None
    assert bool(left) != bool(here.answered), "it was neither carried out nor set aside"


_WORDS = ("CNI_COMMAND=DEL", "CNI_CONTAINERID=", "CNI_IFNAME=", "vmt1", '"name":', "\0", "../")
TARGET = Target(run, words=_WORDS)
