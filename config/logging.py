"""The logs: server.log for the api process, one JSON object a line for the ranks, and the way from these to that.

A rank writes to its stderr, mlx.launch brings the lines to the api process, and `relay_rank_line` logs them there in
the user's format, so one file tells the whole story. The entry points of `api` and `server` call this once each; no
other module adds a handler.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from config.settings import Settings

MAX_LOG_BYTES = 10 * 1024 * 1024
NUM_OLD_LOGS = 5
_RANK_FIELDS = ("rank", "world_size", "model")
_LINE_START = '{"time": '  # of every line `JsonFormatter` makes
_QUIET = (
    "httpx",
    "httpcore",
    "filelock",
    "huggingface_hub",
    "urllib3",
    "asyncio",
)  # at INFO they log each step they take


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, rank, world_size, model; exc if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name, None) for name in _RANK_FIELDS},
        }
        exc = record.exc_text or (self.formatException(record.exc_info) if record.exc_info else None)
        return json.dumps({**fields, "exc": exc} if exc else fields)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO    server.engine [rank 0/2]: message` in local time, then the traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s%(origin)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        rank = getattr(record, "rank", None)
        record.origin = "" if rank is None else f" [rank {rank}/{getattr(record, 'world_size', None)}]"
        return super().format(record)


class RecordFields(logging.Filter):
    """Gives records that lack them the rank, world size and model of this process."""

    def __init__(self, rank: int | None, world_size: int, model: str) -> None:
        super().__init__()
        self._fields = dict(zip(_RANK_FIELDS, (rank, world_size, model), strict=True))

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in self._fields.items():
            record.__dict__.setdefault(name, value)
        return True


class ServerLog(RotatingFileHandler):
    """server.log. What cannot be written there (no permission, full disk) goes to stderr, after one warning.

    Each record tries the file again. Nothing that happens to a line reaches its author: stderr may be on that disk.
    """

    def __init__(self, path: Path) -> None:
        # delay: the file is opened by the first record, so all that can go wrong ends in handleError.
        super().__init__(path, maxBytes=MAX_LOG_BYTES, backupCount=NUM_OLD_LOGS, encoding="utf-8", delay=True)
        self._warned = False

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Called for each record. Where somebody has removed or renamed the file, it is made again."""
        if self.stream is not None and not self._is_the_file(self.stream):
            self.stream.close()
            self.stream = None  # pyright: ignore[reportAttributeAccessIssue]  # as before the first record
        return bool(super().shouldRollover(record))

    def _is_the_file(self, stream: TextIO) -> bool:
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno()))
        except FileNotFoundError:
            return False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None  # pyright: ignore[reportAttributeAccessIssue]  # as before the first record
        with contextlib.suppress(OSError):  # closing writes what is left in the buffer
            if stream:
                stream.close()
        with contextlib.suppress(OSError, ValueError):  # full like the file, a reader that is gone, or closed
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                warning = f"warning: {self.baseFilename} cannot be written ({reason}); the log goes to stderr"
                print(warning, file=sys.stderr)
            print(self.format(record), file=sys.stderr, flush=True)


def printable(text: str, limit: int = 500) -> str:
    """Text of others as a line of the log may hold it: no longer than that, and nothing in it that ends the line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}…"


def setup_api_logging(settings: Settings, log_file: Path, *, to_stderr: bool = False) -> None:
    """Sends every record of this process to `log_file` (rotated) in the user's format, and to stderr too if asked.

    Calling it again replaces the handlers of the call before.
    """
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter()
    handlers: list[logging.Handler] = [ServerLog(log_file)]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    _install(handlers, formatter, settings.log_level, RecordFields(None, settings.world_size_hint, settings.model_name))


def setup_rank_logging(level: str, rank: int, world_size: int, model: str, *, stream: TextIO | None = None) -> None:
    """Sends every record of this process as one JSON line to `stream` (default: stderr), for `relay_rank_line`."""
    _install([logging.StreamHandler(stream)], JsonFormatter(), level, RecordFields(rank, world_size, model))


def relay_rank_line(line: str) -> str:
    """Logs a line of the ring's output here: a record of ours as it was, anything else as a warning of logger `ring`.

    Anything else is what MLX, Python or ssh print. A progress bar overwrites itself with carriage returns: its last
    state counts, and it may stand before a record on the same line. Returns what the line says.
    """
    text, start, record_text = line.rstrip("\r\n").partition(_LINE_START)
    record = _parse_record(start + record_text) if start else None
    if record is None:
        text += start + record_text
    if other := text.rstrip().rpartition("\r")[2].strip():
        logging.getLogger("ring").warning("%s", other)
    if record is None:
        return other
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
    return record.getMessage()


def _parse_record(text: str) -> logging.LogRecord | None:
    """The record a rank's `JsonFormatter` wrote, or None."""
    try:
        fields = json.loads(text)
        return logging.makeLogRecord(
            {
                "name": fields["logger"],
                "levelname": fields["level"],
                "levelno": logging.getLevelNamesMapping()[fields["level"]],
                "msg": fields["message"],
                "created": (created := datetime.fromisoformat(fields["time"]).timestamp()),
                "msecs": int(created % 1 * 1000),
                "exc_text": fields.get("exc"),
                **{name: fields[name] for name in _RANK_FIELDS},
            }
        )
    except (ValueError, KeyError, TypeError):
        return None


def _install(handlers: list[logging.Handler], formatter: logging.Formatter, level: str, fields: RecordFields) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(fields)
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "DEBUG" else logging.WARNING)
