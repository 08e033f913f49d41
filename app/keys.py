"""API keys: made, checked, revoked. The database holds a SHA-256 of each; 256 random bits need no slow hash."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.models import ApiKey, new_id, now

PREFIX = "us_"
TENANT = re.compile(r"[a-z0-9][a-z0-9\-_]{0,62}")


def hash_of(key: str) -> bytes:
    """What the database keeps of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def create(session: Session, tenant: str, name: str, *, days: int | None = None) -> tuple[ApiKey, str]:
    """A new key for a tenant: its row, and the key itself, which is never to be had again.

    Raises ValueError for a tenant name that is not 1 to 63 lower-case letters, digits, '-' or '_'.
    """
    if not TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant!r}: use 1 to 63 lower-case letters, digits, '-' or '_'")
    key = PREFIX + secrets.token_urlsafe(32)
    expires_at = now() + timedelta(days=days) if days else None
    row = ApiKey(id=new_id("key"), tenant=tenant, name=name, hash=hash_of(key), expires_at=expires_at)
    session.add(row)
    session.flush()
    return row, key


def authenticate(session: Session, key: str) -> ApiKey | None:
    """The row of a key that is known, unexpired and not revoked.

    Looking up the hash leaks nothing useful through timing: an attacker cannot choose the hash's prefix.
    """
    row = session.scalars(select(ApiKey).where(ApiKey.hash == hash_of(key))).one_or_none()
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now()):
        return None
    return row


def revoke(session: Session, key_id: str) -> bool:
    """End a key. False when there is none of that id."""
    moved = session.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
    )
    return bool(moved.rowcount)  # type: ignore[attr-defined]
