"""Structured logs: one JSON object a line, with the request or job it belongs to, and without secrets."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict

SECRETS = re.compile(r"\bus_[A-Za-z0-9_\-]{43}|\bwhsec_[A-Za-z0-9+/=_\-]{20,}|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
"""API keys, webhook secrets, and the user and password of a URL. Strangers choose what it is matched with (a path, say), so each
part must be able to end in one place alone: else a line takes the square of its length."""


def without_secrets(_logger: object, _method: str, line: EventDict) -> EventDict:
    """The line with what looks like a secret blotted out. Nothing writes one knowingly; other people's errors may."""
    return {name: SECRETS.sub("***", value) if isinstance(value, str) else value for name, value in line.items()}


class Stderr:
    """stderr for log lines: one that cannot be written, for want of room say, must not end the work it tells about."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def configure_logging() -> None:
    """Send structlog to stderr as JSON lines."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            without_secrets,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, Stderr())),
        cache_logger_on_first_use=False,
    )
