"""The audit log: who did, or tried, what, from where. One row per request that could change something, or was denied.

    done      it was carried out
    refused   it was malformed, or did not fit the state of things
    denied    no key, a key of too narrow a scope, or a limit that was reached
    failed    a mistake of ours, or a part that was away

Rows hold ids and never what was sent: no key, no text, no name. They are only added to; the migration has a trigger
that refuses changes. The API writes a row before its answer leaves, so nobody is told of a change that is not recorded.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import structlog
from prometheus_client import Counter
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db import session_scope
from app.models import AuditEntry

DENIED = (401, 403, 429)
SAFE = ("GET", "HEAD", "OPTIONS")
TELLING = ("read_secret",)
"""Reads that are recorded like changes, because they hand out a secret."""
DENIED_A_MINUTE = 60
"""At most this many denied requests a minute are recorded by one API process, lest a flood of them fill the disk."""

UNRECORDED = Counter("understudy_audit_unrecorded", "Denied requests beyond what the audit log takes in a minute.")

log = structlog.get_logger()


def outcome_of(status: int) -> str:
    """What an HTTP status means here."""
    if status in DENIED:
        return "denied"
    return "done" if status < 400 else "refused" if status < 500 else "failed"


def is_recorded(method: str, scope: str, action: str | None, status: int) -> bool:
    """Whether a request belongs in the log: all that may change something, and all that was denied.

    `scope` is what the route needs of a key: one that a reader may call, such as a prediction, changes nothing.
    """
    if action is None:
        return False
    if (method in SAFE or scope == "read") and action not in TELLING:
        return status in DENIED and _denied.take()
    return status not in DENIED or _denied.take()


def record(**values: Any) -> None:
    """Write a row in a transaction of its own. A database that is away is told in the log: the request has failed too."""
    try:
        with session_scope() as session:
            add(session, **values)
    except SQLAlchemyError as error:
        log.error("audit_failed", error=type(error).__name__, **values)


def add(session: Session, *, action: str, outcome: str = "done", **values: Any) -> None:
    """Add a row to the transaction at hand. Columns: tenant, key_id, request_id, object_id, status, address."""
    session.add(AuditEntry(action=action, outcome=outcome, **values))


class _Allowance:
    """So many a minute."""

    def __init__(self, most: int) -> None:
        self.most, self.left, self.minute = most, most, 0
        self.lock = threading.Lock()

    def take(self) -> bool:
        with self.lock:
            minute = int(time.monotonic() // 60)
            if minute != self.minute:
                self.minute, self.left = minute, self.most
            self.left -= 1
            if self.left < 0:
                UNRECORDED.inc()
            return self.left >= 0


_denied = _Allowance(DENIED_A_MINUTE)
