"""The agent's log: one JSON object a line, on stderr, with unprintable characters escaped."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from cni.agent.log_writer import LogWriter
from cni.errors import cut
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.metrics import Registry

_LINE, _FIELD = 8000, 1000
"""Characters of a line; of a longer one, each field is cut to _FIELD characters."""
_JSON = json.JSONEncoder(default=str, ensure_ascii=False)
LOG = logging.getLogger("vmtapd")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        text = _JSON.encode(line)
        if len(text) > _LINE:
            text = _JSON.encode({key: _short(value) for key, value in line.items()})
        return escaped(text)


def _short(value: object) -> object:
    """The value, or the beginning of its text if that is long."""
    text = value if isinstance(value, str) else _JSON.encode(value)
    return value if len(text) <= _FIELD else cut(text, _FIELD)


def start(level: str) -> None:
    """Log messages of that level and above. Starts a thread, which inherits the signal mask."""
    # Not collected, since no line shows them (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = LogWriter(sys.stderr.fileno(), _dropped)
    handler.setFormatter(_Json())
    # gRPC logs exceptions of its servicers. This does not load gRPC.
    for logger in (LOG, logging.getLogger("grpc")):
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def declare(registry: Registry) -> None:
    """Declare the metric of the lines that were dropped."""
    registry.computed(
        "vmtap_log_lines_dropped_total",
        "Log lines that were dropped because stderr was not read.",
        look=lambda: {(): sum(each.dropped for each in LOG.handlers if isinstance(each, LogWriter))},
        kind="counter",
    )


def _dropped(lines: int) -> logging.LogRecord:
    return LOG.makeRecord(
        LOG.name,
        logging.WARNING,
        "",
        0,
        "log lines were dropped",
        (),
        None,
        extra={"fields": {"lines": lines}},
    )


def log(level: int, msg: str, **fields: object) -> None:
    """Log msg, which is constant, with the fields, which vary."""
    if LOG.isEnabledFor(level):
        LOG.log(level, msg, extra={"fields": fields})
