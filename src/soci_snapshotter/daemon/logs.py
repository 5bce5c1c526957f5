"""JSON log lines as the Go daemon writes them: one object a line, keys `level`, `msg`, `time`, then the fields."""

from __future__ import annotations

import datetime
import json
import logging
import sys

from soci_snapshotter.errors import Config

# logrus's names (the Go daemon's --log-level) and what they are here.
LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
_SPOKEN = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; `extra` fields become keys."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = {
            **{key: _plain(value) for key, value in fields.items()},
            "level": _SPOKEN.get(record.levelno, "fatal"),
            "msg": record.getMessage(),
            "time": _rfc3339_nano(record.created),
        }
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str) -> None:
    """Log to standard error at `level`. Raises Config for an unknown level."""
    number = LEVELS.get(level.lower())
    if number is None:
        raise Config(f"--log-level {level}: want one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # its debug lines hold signed queries


def _plain(value: object) -> object:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value)


def _rfc3339_nano(seconds: float) -> str:
    whole = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{int(seconds % 1 * 1e9):09d}Z"
