"""Prometheus metrics in the text format 0.0.4, counted by the parts and written when they are asked for.

Owned by the project because the client library costs 11 MB and 180 ms of an agent that has 16 MB and starts in less.
Each part declares its own metrics on the registry that it is given. Must not know what is counted.
"""

from __future__ import annotations

import threading
from bisect import bisect_left

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
    """One family: a name, a sentence, label names; a value for each combination of the labels' values."""

    kind = "untyped"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._lock = threading.Lock()

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """(suffix of the name, labels, value) of each line."""
        raise NotImplementedError

    def lines(self) -> Iterator[str]:
        """The family as text."""
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} {self.kind}"
        for suffix, labels, value in self.samples():
            inner = ",".join(f'{name}="{_escaped(each)}"' for name, each in labels.items())
            yield f"{self.name}{suffix}{f'{{{inner}}}' if inner else ''} {_number(value)}"


class Counter(_Metric):
    """What only grows. One without labels is there from the start, as 0."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(name, text, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    def inc(self, *values: str, by: float = 1) -> None:
        """Count one more (or `by` more) under these labels' values."""
        with self._lock:
            self._values[values] = self._values.get(values, 0) + by

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        with self._lock:
            now = sorted(self._values.items())
        for values, value in now:
            yield "", dict(zip(self.labels, values, strict=True)), value


class Gauge(Counter):
    """What goes up and down."""

    kind = "gauge"

    def set(self, value: float, *values: str) -> None:
        """It is this now."""
        with self._lock:
            self._values[values] = value


class Seen(_Metric):
    """A gauge or counter that is looked up when it is asked for. look: values of the labels → value."""

    def __init__(
        self, name: str, text: str, labels: Labels, kind: str, look: Callable[[], Mapping[Labels, float]]
    ) -> None:
        super().__init__(name, text, labels)
        self.kind = kind
        self._look = look

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        for values, value in sorted(self._look().items()):
            yield "", dict(zip(self.labels, values, strict=True)), value


class Histogram(_Metric):
    """How long things took, in seconds."""

    kind = "histogram"

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        super().__init__(name, text, labels)
        self._values: dict[Labels, tuple[list[int], float]] = {}

    def observe(self, seconds: float, *values: str) -> None:
        """One more of these labels' values took that long."""
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

    def seen(
        self,
        name: str,
        text: str,
        *labels: str,
        look: Callable[[], Mapping[Labels, float]],
        kind: str = "gauge",
    ) -> None:
        """A new metric that look() knows. One whose look() raises is left out of that answer."""
        self._add(Seen(name, text, labels, kind, look))

    def render(self, failed: Callable[[str, Exception], None]) -> bytes:
        """Everything as text. failed: hears of a metric that could not be looked up."""
        lines: list[str] = []
        for metric in list(self._metrics.values()):
            try:
                lines += list(metric.lines())
            except Exception as error:  # one part's trouble must not hide the others' numbers
                failed(metric.name, error)
        return "\n".join([*lines, ""]).encode()

    def _add(self, metric: M) -> M:
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} is declared twice")
        self._metrics[metric.name] = metric
        return metric


def _escaped(value: str) -> str:
    """A label's value; what came in as bytes that are no text goes out as marks."""
    clean = value.encode(errors="replace").decode()
    return clean.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
