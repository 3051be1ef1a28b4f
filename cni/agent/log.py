"""The agent's log: one JSON object a line, on stderr, with unprintable characters escaped."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from cni.names import escaped

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
        return escaped(_JSON.encode(line))


def start(level: str) -> None:
    """Log messages of that level and above."""
    # Not collected, since no line shows them (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    # gRPC logs exceptions of its servicers. This does not load gRPC.
    for logger in (LOG, logging.getLogger("grpc")):
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def log(level: int, msg: str, **fields: object) -> None:
    """Log msg, which is constant, with the fields, which vary."""
    if LOG.isEnabledFor(level):
        LOG.log(level, msg, extra={"fields": fields})
