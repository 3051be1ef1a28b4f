"""The reconciler's threads, which carry out jobs. Must not know what a job does."""

from __future__ import annotations

import queue
import threading
import time
from logging import DEBUG, ERROR, WARNING

from cni.agent.log import log
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.metrics import Registry

_WORKERS = 4
"""Jobs at once: an attachment that is ended may have a delegate that hangs until its deadline."""


class Workers:
    """A fixed number of threads. The failure of a job is logged and counted, and affects no other job."""

    def __init__(self, registry: Registry) -> None:
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._keys: set[str] = set()
        """Of the jobs that wait or run."""
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name="heal", daemon=True) for _ in range(_WORKERS)
        ]
        self._failures = registry.counter(
            "vmtap_reconcile_failures_total", "Steps that failed; each is tried again in the next run."
        )

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, until: float) -> bool:
        """Finish the submitted jobs, by `until` (time.monotonic()) at the latest; whether all threads have ended."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def wait_idle(self, seconds: float) -> None:
        """Wait until no job is left, at most that long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._keys, seconds)

    def submit(self, key: str, job: Callable[[], None]) -> None:
        """Have a thread carry out the job, unless one with that key waits or runs. Does not block."""
        with self._changed:
            if key in self._keys:
                return
            self._keys.add(key)
        self._jobs.put((key, job))

    def _work(self) -> None:
        while work := self._jobs.get():
            key, job = work
            self.attempt(key, job)
            with self._changed:
                self._keys.discard(key)
                self._changed.notify_all()

    def attempt(self, what: str, step: Callable[..., None], *args: object) -> None:
        """Call step(*args); log and count its failure instead of raising it."""
        try:
            step(*args)
        except BlockingIOError:  # a request has the attachment's lock, and takes care of it
            log(DEBUG, "left to a request", what=what)
        except (CniError, OSError) as error:
            self.failed(what, reason(error))
        except Exception as error:
            self._failures.inc()
            log(ERROR, "internal error in the reconciler: please report it", what=what, error=repr(error))

    def failed(self, what: str, error: str, **fields: object) -> None:
        """Log and count a failure."""
        self._failures.inc()
        log(WARNING, "reconciling failed; it is tried again", what=what, error=error, **fields)
