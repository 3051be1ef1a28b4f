"""Prometheus metrics in the text format 0.0.4.

Owned by the project because the client library would cost the agent, which has 16 MB, another 11 MB and 180 ms.
Each part of the agent declares its metrics on the registry that it is given. Must not know what is counted.
"""

from __future__ import annotations

import threading
from bisect import bisect_left

from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import TypeVar

    M = TypeVar("M", bound="_Metric")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of a histogram's buckets: from an ADD without a delegate to a delegate's deadline."""

Labels = tuple[str, ...]


class _Metric:
    """A metric family: name, help text, label names, and one value for each combination of label values."""

    kind = "untyped"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._lock = threading.Lock()

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """(suffix of the name, labels, value) of each sample."""
        raise NotImplementedError

    def lines(self) -> Iterator[str]:
        """The lines of the family in the text format."""
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} {self.kind}"
        for suffix, labels, value in self.samples():
            inner = ",".join(f'{name}="{_escaped(each)}"' for name, each in labels.items())
            yield f"{self.name}{suffix}{f'{{{inner}}}' if inner else ''} {_number(value)}"


class Counter(_Metric):
    """A value that only grows. Without labels it exists from the start, with the value 0."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(name, text, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    def inc(self, *values: str, by: float = 1) -> None:
        """Add `by` to the value of these label values."""
        with self._lock:
            self._values[values] = self._values.get(values, 0) + by

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        with self._lock:
            now = sorted(self._values.items())
        for values, value in now:
            yield "", dict(zip(self.labels, values, strict=True)), value


class Gauge(Counter):
    """A value that goes up and down."""

    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        """Set the value of these label values."""
        with self._lock:
            self._values[values] = value


class Computed(_Metric):
    """A gauge or counter whose values are computed at each scrape.

    look: returns label values → value; or the mapping of the scrape before, unchanged, whose lines are then kept.
    """

    def __init__(
        self, name: str, text: str, labels: Labels, kind: str, look: Callable[[], Mapping[Labels, float]]
    ) -> None:
        super().__init__(name, text, labels)
        self.kind = kind
        self._look = look
        self._seen: Mapping[Labels, float] | None = None
        self._lines: list[str] = []

    def lines(self) -> Iterator[str]:
        if (now := self._look()) is not self._seen:
            self._seen = now
            self._lines = list(super().lines())
        yield from self._lines

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        for values, value in sorted((self._seen or {}).items()):
            yield "", dict(zip(self.labels, values, strict=True)), value


class Histogram(_Metric):
    """A distribution of durations, in seconds."""

    kind = "histogram"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(name, text, labels)
        self._values: dict[Labels, tuple[list[int], float]] = {}

    def observe(self, seconds: float, *values: str) -> None:
        """Count one duration for these label values."""
        with self._lock:
            counts, total = self._values.get(values, ([0] * (len(SECONDS) + 1), 0.0))
            counts[bisect_left(SECONDS, seconds)] += 1
            self._values[values] = (counts, total + seconds)

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        with self._lock:
            now = [(values, list(counts), total) for values, (counts, total) in sorted(self._values.items())]
        for values, counts, total in now:
            labels = dict(zip(self.labels, values, strict=True))
            so_far = 0
            for bound, count in zip((*map(_number, SECONDS), "+Inf"), counts, strict=True):
                so_far += count
                yield "_bucket", {**labels, "le": bound}, so_far
            yield "_sum", labels, total
            yield "_count", labels, so_far


class Registry:
    """The metrics of one agent."""

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A new counter. By convention its name ends with _total."""
        return self._add(Counter(name, text, labels))

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """A new gauge."""
        return self._add(Gauge(name, text, labels))

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        """A new histogram. By convention its name ends with _seconds."""
        return self._add(Histogram(name, text, labels))

    def computed(
        self,
        name: str,
        text: str,
        *labels: str,
        look: Callable[[], Mapping[Labels, float]],
        kind: str = "gauge",
    ) -> None:
        """A new metric whose values look() returns at each scrape. If look() raises, the metric is left out."""
        self._add(Computed(name, text, labels, kind, look))

    def render(self, failed: Callable[[str, Exception], None]) -> bytes:
        """All metrics as text. failed(name, error) is called for each metric that is left out."""
        lines: list[str] = []
        for metric in list(self._metrics.values()):
            try:
                lines += list(metric.lines())
            except Exception as error:  # a failing metric must not hide the others
                failed(metric.name, error)
        return "\n".join([*lines, ""]).encode()

    def _add(self, metric: M) -> M:
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} is declared twice")
        self._metrics[metric.name] = metric
        return metric


def _escaped(value: str) -> str:
    """A label value, escaped for the format, after unprintable characters."""
    return escaped(value).replace("\\", r"\\").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
