"""The threads that carry out what the reconciler found to do. Must not know what a job does."""

from __future__ import annotations

import queue
import threading
import time
from logging import DEBUG, ERROR, WARNING

from cni.agent.log import log
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.metrics import Registry

_WORKERS = 4
"""Attachments that are ended at once: each may have a delegate that hangs until its deadline."""


class Workers:
    """A fixed number of threads. A failed job is logged and counted, and ends nothing else."""

    def __init__(self, registry: Registry) -> None:
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._at_work: set[str] = set()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name="heal", daemon=True) for _ in range(_WORKERS)
        ]
        self._failures = registry.counter(
            "vmtap_reconcile_failures_total", "Steps that failed; each is tried again in the next run."
        )

    def start(self) -> None:
        """Begin to take jobs."""
        for thread in self._threads:
            thread.start()

    def stop(self, until: float) -> bool:
        """Finish the jobs that were handed on, by time.monotonic() `until`; whether all threads have ended."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def wait_idle(self, seconds: float) -> None:
        """Until no job is left, at most that long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work, seconds)

    def hand_on(self, key: str, job: Callable[[], None]) -> None:
        """To a worker, unless one has that key in hand already."""
        with self._changed:
            if key in self._at_work:
                return
            self._at_work.add(key)
        self._jobs.put((key, job))

    def _work(self) -> None:
        while work := self._jobs.get():
            key, job = work
            self.attempt(key, job)
            with self._changed:
                self._at_work.discard(key)
                self._changed.notify_all()

    def attempt(self, what: str, step: Callable[..., None], *args: object) -> None:
        """Run one step; its failure is logged and counted, and ends nothing else."""
        try:
            step(*args)
        except BlockingIOError:  # a request has the attachment's lock: it is being seen to
            log(DEBUG, "left to a request", what=what)
        except (CniError, OSError) as error:
            self.failed(what, str(error))
        except Exception as error:
            self._failures.inc()
            log(ERROR, "a fault in the reconciler: please report it", what=what, error=repr(error))

    def failed(self, what: str, error: str, **fields: object) -> None:
        self._failures.inc()
        log(WARNING, "reconciling failed; it is tried again", what=what, error=error, **fields)
