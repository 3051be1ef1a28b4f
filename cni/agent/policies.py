"""The policy file as it is now: read again when it changes; while a new one is bad, the last good one stays."""

from __future__ import annotations

import os
import threading
from logging import ERROR, INFO

from cni import policy
from cni.agent.log import log
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.policy import Policy


class Policies:
    """Looks at the file's identity at each request: one stat(2), and never a stale answer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: CniError | None = None
        """What is wrong with the file as it is now; None if nothing is."""
        self._lock = threading.Lock()
        self._seen: object = ()
        self._good: Policy | None = None
        self._any_good = False

    def __call__(self, path: str = "") -> Policy | None:
        """In the place of policy.load; path is the one that it was made with.

        Raises CniError 7 if there has never been a good one.
        """
        seen = self._identity()
        if seen != self._seen:
            with self._lock:
                if seen != self._seen:
                    self._read()
                    self._seen = seen
        if self.error and not self._any_good:
            raise self.error
        return self._good

    def _read(self) -> None:
        try:
            self._good = policy.load(self.path)
        except CniError as error:
            self.error = error
            log(
                ERROR, "the policy file is refused; the last good one stays", path=self.path, error=str(error)
            )
        else:
            self.error, self._any_good = None, True
            names = [entry.name for entry in self._good.interfaces] if self._good else None
            log(INFO, "policy read", path=self.path, interfaces=names)

    def _identity(self) -> object:
        try:
            status = os.stat(self.path)
        except OSError as error:
            return error.errno
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
