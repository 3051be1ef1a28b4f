"""One JSON object a line on stderr: for a person's grep and a collector's parser alike."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

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
        return _JSON.encode(line)


def start(level: str) -> None:
    """Log from that level up."""
    # Nobody asks a line for these (the logging HOWTO's "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    # gRPC tells of an exception in what we serve to it; it is not loaded for that.
    for logger in (LOG, logging.getLogger("grpc")):
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def log(level: int, msg: str, **fields: object) -> None:
    """msg is a constant; what differs from line to line is a field."""
    if LOG.isEnabledFor(level):
        LOG.log(level, msg, extra={"fields": fields})
