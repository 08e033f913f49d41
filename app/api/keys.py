"""Keys over HTTP, for a tenant's own administrators: list, make, rotate, revoke. The operator has `understudy keys`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from sqlalchemy import select

from app import keys, limits
from app.api.deps import KeyDep, PageDep, SessionDep, needs, newest_first, owned, problems
from app.api.schemas import PageRead, Read
from app.errors import (
    BadRequest,
    KeyEnded,
    NotFound,
    TooLarge,
    TooManyKeys,
    Unauthorized,
    Unprocessable,
    UnsupportedMedia,
)
from app.models import ApiKey
from app.options import Options, Text

router = APIRouter(prefix="/keys", tags=["keys"])

MOST_KEYS = 100
"""Working keys of one tenant that its administrators may make; requests are counted by key."""
ADMIN = needs("admin")


class KeyCreate(Options):
    """A key to make."""

    name: Annotated[Text, Field(min_length=1, max_length=200)]
    """What it is for."""
    scope: Literal["read", "write", "admin"] = "read"
    days: Annotated[float | None, Field(gt=0, le=3650)] = None
    """How long it works; for ever when null."""


class KeyRotate(Options):
    """How long the old key goes on working."""

    grace_hours: Annotated[float, Field(ge=0, le=keys.LONGEST_GRACE_HOURS, strict=True)] = keys.GRACE_HOURS


class KeyRead(Read):
    """A key, without the key."""

    id: str
    name: str
    scope: str
    limits: dict[str, int | None]
    """What differs from the server's usual limits; null means no limit."""
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To the minute."""


class KeyMade(KeyRead):
    """A key that has just been made."""

    key: str
    """Shown this once and kept nowhere."""

    @classmethod
    def of(cls, made: tuple[ApiKey, str]) -> KeyMade:
        """The row and the key together."""
        row, key = made
        return cls.model_validate({**KeyRead.model_validate(row).model_dump(), "key": key})


@router.get("", response_model=PageRead[KeyRead], openapi_extra=ADMIN, responses=problems(Unauthorized, Unprocessable))
def list_keys(session: SessionDep, key: KeyDep, page: PageDep) -> dict[str, Any]:
    """The tenant's keys, newest first, also those that have ended."""
    return newest_first(session, select(ApiKey).where(ApiKey.tenant == key.tenant), ApiKey, page)


@router.post(
    "", status_code=201, response_model=KeyMade, openapi_extra=ADMIN,
    responses=problems(BadRequest, Unauthorized, TooManyKeys, TooLarge, UnsupportedMedia, Unprocessable),
)  # fmt: skip
def create_key(body: KeyCreate, request: Request, session: SessionDep, key: KeyDep) -> KeyMade:
    """Make a key for the same tenant, with the limits of the key that asks."""
    _refuse_too_many(session, key)
    made = keys.create(session, key.tenant, body.name, days=body.days, scope=body.scope, limits=key.limits)
    request.state.object_id = made[0].id
    return KeyMade.of(made)


@router.post(
    "/{key_id}/rotate", status_code=201, response_model=KeyMade, openapi_extra=ADMIN,
    responses=problems(BadRequest, Unauthorized, NotFound, KeyEnded, TooLarge, UnsupportedMedia, Unprocessable),
)  # fmt: skip
def rotate_key(key_id: str, body: KeyRotate, session: SessionDep, key: KeyDep) -> KeyMade:
    """Make a key in the place of another, which goes on working for the grace period."""
    old = owned(session, ApiKey, key_id, key.tenant)
    _refuse_too_many(session, key)
    return KeyMade.of(keys.rotate(session, old, grace_hours=body.grace_hours))


@router.delete("/{key_id}", status_code=204, openapi_extra=ADMIN, responses=problems(Unauthorized, NotFound))
def revoke_key(key_id: str, session: SessionDep, key: KeyDep) -> Response:
    """End a key at once."""
    keys.revoke(session, owned(session, ApiKey, key_id, key.tenant).id)
    return Response(status_code=204)


def _refuse_too_many(session: SessionDep, key: ApiKey) -> None:
    limits.lock(session, key.tenant)
    if keys.working(session, key.tenant) >= MOST_KEYS:
        raise TooManyKeys(f"This tenant has {MOST_KEYS} working keys, the most it may make; revoke one first.")
