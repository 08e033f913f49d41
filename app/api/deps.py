"""What a route may ask for by name: the session, the storage, the caller, a page, an idempotent answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import keys, limits
from app.api.schemas import ProblemRead
from app.config import Settings, settings
from app.db import READERS, Result, get_session, read, session_scope
from app.errors import Forbidden, KeyReused, NotFound, Problem, RequestInFlight, Unauthorized
from app.models import ApiKey, Base, IdempotencyKey, now
from app.storage import Storage, storage

Row = TypeVar("Row", bound=Base)

SessionDep = Annotated[Session, Depends(get_session, scope="function")]


# What does not wait is a coroutine: FastAPI would take a thread for a plain function, and a thread costs more than these.
async def current_storage() -> Storage:
    """The storage the settings name."""
    return storage()


async def current_settings() -> Settings:
    """The settings of this process."""
    return settings()


StorageDep = Annotated[Storage, Depends(current_storage)]
SettingsDep = Annotated[Settings, Depends(current_settings)]

bearer = HTTPBearer(auto_error=False, description="An API key, made by `understudy keys create`.")


def needs(scope: str) -> dict[str, Any]:
    """The `openapi_extra=` of a route whose scope is not the one that its method tells."""
    return {"x-scope": scope}


def scope_needed(method: str, route: Any) -> str:
    """What a key must be allowed for a route: to read or, where the method may change something, to write."""
    extra: dict[str, Any] = getattr(route, "openapi_extra", None) or {}
    usual = "read" if method in ("GET", "HEAD") else "write"
    return str(extra.get("x-scope", usual))


async def current_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> ApiKey:
    """The caller's key, counted and found wide enough. Raises Unauthorized, RateLimited and Forbidden.

    It is looked up in a transaction of its own, for none may stay open while a file streams in, or while the request
    waits for a thread. A key that was just looked up, and a request that was counted beforehand, wait for nobody.
    """
    if credentials is None:
        raise Unauthorized
    key = keys.known(credentials.credentials)
    if key is None:
        key = await run_in_threadpool(_look_up, credentials.credentials)
    request.state.key_id, request.state.tenant = key.id, key.tenant
    if not limits.is_counted(key):
        await run_in_threadpool(limits.count_request, key)
    needed = scope_needed(request.method, request.scope.get("route"))
    if not keys.includes(key.scope, needed):
        raise Forbidden(f"This needs a key of scope {needed}; this one's is {key.scope}.", needed_scope=needed)
    return key


def _look_up(shown: str) -> ApiKey:
    with session_scope() as session:
        key = keys.authenticate(session, shown)
        if key is None:
            raise Unauthorized("This API key is not known, or has expired or been revoked.")
        session.expunge(key)
    keys.remember(key)
    return key


KeyDep = Annotated[ApiKey, Depends(current_key)]


async def current_tenant(key: KeyDep) -> str:
    """The tenant whose key this is."""
    return key.tenant


TenantDep = Annotated[str, Depends(current_tenant)]


async def only_known_parameters(request: Request) -> None:
    """Refuse what the query holds and the OpenAPI document does not name for the route. Raises RequestValidationError."""
    if not request.query_params:
        return
    document = await run_in_threadpool(request.app.openapi)  # the first time, it takes half a second to write
    operations = document["paths"][request.scope["route"].path]
    operation = operations["get" if request.method == "HEAD" else request.method.lower()]
    taken = [parameter for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    names = [parameter["name"] for parameter in taken]
    maps = [parameter["name"] for parameter in taken if parameter.get("style") == "deepObject"]
    shown = [f"{name}[key]" if name in maps else name for name in names]
    unknown = [name for name in request.query_params if name not in names and name.partition("[")[0] not in maps]
    if unknown:
        raise RequestValidationError(
            [
                {"type": "unknown_parameter", "loc": ("query", name), "msg": "unknown", "ctx": {"taken": shown}}
                for name in unknown
            ]
        )


_readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")


async def reading(work: Callable[[Session], Result]) -> Result:
    """What `work` reads, as app.db.read, in threads kept for that: however much else goes on, looking stays possible."""
    return await asyncio.get_running_loop().run_in_executor(_readers, read, work)


def owned(session: Session, model: type[Row], row_id: str, tenant: str) -> Row:
    """The tenant's row of that id. Raises NotFound, also when it is another tenant's."""
    row = session.get(model, row_id) if "\x00" not in row_id else None
    if row is None or row.tenant != tenant:  # type: ignore[attr-defined]
        raise NotFound
    return row


@dataclass(frozen=True)
class Page:
    """Which part of a list: `limit` rows after the row with id `after`."""

    limit: int
    after: str | None


async def page(
    limit: Annotated[int, Query(ge=1, le=100, description="How many to return.")] = 20,
    after: Annotated[
        str | None, Query(pattern=r"^[a-z]+_[0-9a-f]{32}$", description="`next` of the page before this one.")
    ] = None,
) -> Page:
    return Page(limit, after)


PageDep = Annotated[Page, Depends(page)]


def newest_first(session: Session, query: Select[Row], model: type[Row], page: Page) -> dict[str, Any]:
    """One page of `query`, newest first, by key and never by offset."""
    if page.after is not None:
        query = query.where(model.id < page.after)  # type: ignore[attr-defined]
    rows: Sequence[Row] = session.scalars(query.order_by(model.id.desc()).limit(page.limit + 1)).all()  # type: ignore[attr-defined]
    kept = list(rows[: page.limit])
    has_more = len(rows) > page.limit
    return {"data": kept, "has_more": has_more, "next": kept[-1].id if has_more else None}  # type: ignore[attr-defined]


# --- idempotency ----------------------------------------------------------------------------------------------------

IdempotencyDep = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$",
           description="Sending the same request again with the same key returns the first answer."),
]  # fmt: skip


def request_hash(*parts: Any) -> str:
    """A hash of everything that makes two requests the same request."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def is_replay(session: Session, request: Request, tenant: str) -> bool:
    """Whether the request carries an Idempotency-Key that was used on this path before."""
    key = request.headers.get("idempotency-key")
    return key is not None and bool(
        session.scalar(
            select(IdempotencyKey.id).where(
                IdempotencyKey.tenant == tenant,
                IdempotencyKey.path == request.url.path,
                IdempotencyKey.key == key.replace("\x00", ""),
            )
        )
    )


def idempotent(
    session: Session, request: Request, tenant: str, key: str | None, fingerprint: str, answer: Callable[[], BaseModel],
    *, status: int, headers: Callable[[Any], dict[str, str]] = lambda body: {},
) -> Response:  # fmt: skip
    """Answer once per key: the stored answer where there is one, else `answer()`, stored in the same transaction.

    Raises KeyReused when the key was used for another request and RequestInFlight when two arrive together.
    """

    def respond(body: dict[str, Any], extra: dict[str, str]) -> Response:
        return Response(orjson.dumps(body), status, extra, media_type="application/json")

    if key is None:
        body = answer().model_dump(mode="json", by_alias=True)
        return respond(body, headers(body))
    path = request.url.path
    values = {"tenant": tenant, "path": path, "key": key, "request_hash": fingerprint, "created_at": now()}
    made = session.scalar(insert(IdempotencyKey).values(values).on_conflict_do_nothing().returning(IdempotencyKey.id))
    row = session.scalars(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant == tenant, IdempotencyKey.path == path, IdempotencyKey.key == key
        )
    ).one_or_none()
    if row is None:
        raise RequestInFlight
    if made is None:
        if row.request_hash != fingerprint:
            raise KeyReused
        if row.status is None or row.body is None:
            raise RequestInFlight
        return respond(row.body, {**(row.headers or {}), "Idempotent-Replayed": "true"})
    body = answer().model_dump(mode="json", by_alias=True)
    extra = headers(body)
    row.status, row.body, row.headers = status, body, extra
    return respond(body, extra)


def problems(*kinds: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may raise these problems, for the OpenAPI document."""
    return {kind.status: {"model": ProblemRead, "description": (kind.__doc__ or "").strip()} for kind in kinds}
