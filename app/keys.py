"""API keys: made, checked, rotated, revoked. The database holds a SHA-256 of each; 256 random bits need no slow hash."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from datetime import timedelta
from typing import Any

from sqlalchemy import event, func, or_, select, update
from sqlalchemy.orm import Session

from app.errors import KeyEnded
from app.models import SCOPES, ApiKey, new_id, now

PREFIX = "us_"
TENANT = re.compile(r"[a-z0-9][a-z0-9\-_]{0,62}")
GRACE_HOURS = 24
"""How long a rotated key goes on working unless told otherwise."""
LONGEST_GRACE_HOURS = 24 * 30
USED_EVERY = timedelta(minutes=1)
"""`last_used_at` is written no more often than this."""
KNOWN_SECONDS = 2.0
"""How long a process goes by what it last read of a key. What another process changes takes effect within this time."""
MOST_KNOWN = 10_000

WORKS = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
"""Of a key that was not revoked and has not expired."""

_known: dict[bytes, tuple[float, ApiKey]] = {}
"""By hash: when a key was read, and its row."""


def hash_of(key: str) -> bytes:
    """What the database keeps of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def includes(scope: str, needed: str) -> bool:
    """Whether a key of this scope may do what the other one is needed for: admin includes write, and write read."""
    return SCOPES.index(scope) >= SCOPES.index(needed)


def create(
    session: Session, tenant: str, name: str, *, days: float | None = None, scope: str = "write",
    limits: dict[str, Any] | None = None,
) -> tuple[ApiKey, str]:  # fmt: skip
    """A new key for a tenant: its row, and the key itself, which is never to be had again.

    Raises ValueError for a tenant name that is not 1 to 63 lower-case letters, digits, '-' or '_', or an unknown scope.
    """
    if not TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant!r}: use 1 to 63 lower-case letters, digits, '-' or '_'")
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: use {', '.join(SCOPES)}")
    key = PREFIX + secrets.token_urlsafe(32)
    expires_at = now() + timedelta(days=days) if days else None
    row = ApiKey(
        id=new_id("key"), tenant=tenant, name=name, hash=hash_of(key), scope=scope, limits=limits or {},
        created_at=now(), expires_at=expires_at,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row, key


def authenticate(session: Session, key: str) -> ApiKey | None:
    """The row of a key that is known, unexpired and not revoked.

    The look-up is by hash, which leaks nothing useful through timing: nobody can choose what a key hashes to. What
    was found is compared again in constant time.
    """
    wanted = hash_of(key)
    row = session.scalars(select(ApiKey).where(ApiKey.hash == wanted)).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, wanted) or has_ended(row):
        return None
    if row.last_used_at is None or row.last_used_at < now() - USED_EVERY:
        _note_use(session, row.id)
    return row


def known(key: str) -> ApiKey | None:
    """The row of a working key that this process has just read; None: ask the database."""
    read_at, row = _known.get(hash_of(key), (-KNOWN_SECONDS, None))
    if row is None or time.monotonic() - read_at >= KNOWN_SECONDS or has_ended(row):
        return None
    return row


def remember(row: ApiKey) -> None:
    """Go by this row for KNOWN_SECONDS. It must be detached from its session."""
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[row.hash] = time.monotonic(), row


def forget() -> None:
    """Read every key anew when it is next shown."""
    _known.clear()


def _forget_after_commit(session: Session) -> None:
    event.listen(session, "after_commit", lambda _: forget(), once=True)


def _note_use(session: Session, key_id: str) -> None:
    # Requests of one key come side by side: one that finds the row locked has nothing to add.
    free = select(ApiKey.id).where(ApiKey.id == key_id).with_for_update(skip_locked=True)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id.in_(free))
        .values(last_used_at=func.now())
        .execution_options(synchronize_session=False)
    )


def has_ended(row: ApiKey) -> bool:
    """Whether the key was revoked or has expired."""
    return row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now())


def working(session: Session, tenant: str) -> int:
    """How many keys of the tenant work."""
    return session.scalar(select(func.count()).where(ApiKey.tenant == tenant, *WORKS)) or 0


def rotate(session: Session, row: ApiKey, *, grace_hours: float = GRACE_HOURS) -> tuple[ApiKey, str]:
    """A new key in the place of an old one, which works for `grace_hours` more: same tenant, name, scope and limits.

    Where the old one was to expire, the new one lives as long as the old one was made for. Raises KeyEnded.
    """
    session.refresh(row, with_for_update=True)
    if has_ended(row):
        raise KeyEnded
    lifetime = row.expires_at - row.created_at if row.expires_at else None
    made, key = create(session, row.tenant, row.name, scope=row.scope, limits=row.limits)
    if lifetime is not None:
        made.expires_at = now() + lifetime
    _forget_after_commit(session)
    until = now() + timedelta(hours=grace_hours)
    row.expires_at = until if row.expires_at is None else min(row.expires_at, until)
    session.flush()
    return made, key


def revoke(session: Session, key_id: str) -> bool:
    """End a key. False when there is none of that id that could be ended."""
    _forget_after_commit(session)
    moved = session.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
    )
    return bool(moved.rowcount)  # type: ignore[attr-defined]
