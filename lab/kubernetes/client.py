"""kubectl on a cluster of the lab, whichever way its nodes were started."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lab.process import PATIENCE, Closing, LabError, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.process import Word

_EVENTS_TAIL = 3000
KUBECTL_PAUSE = 0.2
"""Seconds between two runs of kubectl, each of which takes a tenth of a second of CPU."""


class Client(Closing):
    """A base class: a cluster that run() administrates."""

    def run(
        self,
        argv: Sequence[Word],
        *,
        stdin: str = "",
        check: bool = True,
        timeout: float = 2 * PATIENCE,
    ) -> str:
        """Runs a command as the cluster's administrator and returns its output. Raises LabError."""
        raise NotImplementedError

    def kubectl(self, *words: str, stdin: str = "", check: bool = True, timeout: float = 2 * PATIENCE) -> str:
        """The output of kubectl. Raises LabError if check is set and it fails. timeout: seconds."""
        return self.run(["kubectl", *words], stdin=stdin, check=check, timeout=timeout)

    def get(self, *words: str) -> Any:
        """The JSON of `kubectl get`."""
        return json.loads(self.kubectl("get", "-o", "json", *words))

    def apply(self, *objects: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def wait(self, what: str, condition: str, *words: str, seconds: float = 2 * PATIENCE) -> None:
        """Runs kubectl wait. condition: its option --for. Raises LabError with the pods and events."""
        try:
            self.kubectl(
                "wait", what, f"--for={condition}", f"--timeout={seconds:g}s", *words, timeout=seconds + 10
            )
        except LabError as error:
            raise LabError(f"{error}\n{self.story()}") from error

    def wait_kind(self, kind: str) -> None:
        """Waits until the API server lists a kind, which it does a moment after the kind is Established."""
        wait_for(
            lambda: self.kubectl("get", kind, "-o", "json", check=False),
            lambda: f"the API server does not list {kind}",
            pause=KUBECTL_PAUSE,
        )

    def story(self) -> str:
        """The pods and the last events, for an error message."""
        pods = self.kubectl("get", "pods", "-A", "-o", "wide", check=False)
        events = self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False)
        return f"{pods}\n{events[-_EVENTS_TAIL:]}"
