"""Uploads in parts: begin, send the parts in any order and as often as needed, complete; what a cut loses is one part.

    POST /uploads ──▶ pending ── complete ──▶ completed (the dataset is there)
                       │  ▲ │
                 parts └──┘ └── cancel ─────▶ cancelled

An upload that nobody goes on with expires: the scheduler removes it with its parts (app/retention.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field
from sqlalchemy import event
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import limits, records, spool
from app.api.datasets import DatasetRead, UploadOptions, stored_rows
from app.api.deps import (
    IdempotencyDep,
    KeyDep,
    SessionDep,
    SettingsDep,
    StorageDep,
    TenantDep,
    idempotent,
    owned,
    problems,
    request_hash,
)
from app.api.schemas import Read
from app.api.uploads import ReceivedFile, format_of, receive_part
from app.config import Settings
from app.db import session_scope, try_lock
from app.errors import (
    BadRequest,
    Conflict,
    DigestMismatch,
    EmptyFile,
    IllegalMove,
    InvalidRows,
    NotFound,
    RequestInFlight,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMedia,
)
from app.formats import Format
from app.models import Dataset, Upload, UploadPart, new_id, now
from app.options import Options, Text
from app.rows import MAX_COLUMN_NAME_CHARACTERS
from app.storage import COPY_BYTES, Storage

router = APIRouter(prefix="/uploads", tags=["uploads"])

MAX_PARTS = 10_000
DIGEST = re.compile(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/=]+):")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ColumnName = Annotated[Text, Field(max_length=MAX_COLUMN_NAME_CHARACTERS)] | None


class UploadCreate(Options):
    """The file that will come; the options are those of POST /datasets."""

    name: Annotated[Text, Field(min_length=1, max_length=300)]
    """The file's name; it becomes the dataset's."""
    bytes: Annotated[int, Field(ge=1, le=2**62)]
    """Of the whole file, as it is sent."""
    mime_type: Annotated[Text, Field(max_length=200)] | None = None
    """As Content-Type of POST /datasets; left out, the name tells."""
    sha256: Sha256 | None = None
    """Of the whole file, in hex; checked when the upload is completed."""
    text_column: ColumnName = None
    text_pair_column: ColumnName = None
    label_column: ColumnName = None
    confidence_column: ColumnName = None
    distribution_column: ColumnName = None
    on_error: records.OnError = "reject"


class UploadComplete(Options):
    """What completes an upload; may be left out."""

    part_ids: Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=MAX_PARTS)] | None = None
    """The parts of the file in their order; left out: all, by their numbers."""
    sha256: Sha256 | None = None
    """Of the whole file, in hex, where it was not known at the beginning."""


class PartRead(Read):
    id: str
    number: int
    """Where it stands in the file, from 1."""
    bytes: int
    sha256: str
    created_at: datetime


class UploadRead(Read):
    """An upload and the parts that have arrived."""

    id: str
    name: str
    bytes: int
    """Of the whole file, as announced."""
    format: str
    sha256: str | None
    status: Literal["pending", "completed", "cancelled"]
    dataset_id: str | None
    """What it has become, once completed."""
    max_part_bytes: int
    """How large one part may be."""
    parts: list[PartRead]
    created_at: datetime
    expires_at: datetime
    """When it is removed, unless another part arrives before."""

    @classmethod
    def of(cls, upload: Upload, settings: Settings) -> UploadRead:
        """The upload as its owner sees it."""
        values = {name: getattr(upload, name) for name in cls.model_fields if name != "max_part_bytes"}
        return cls.model_validate({**values, "max_part_bytes": settings.max_part_bytes})


@router.post(
    "",
    status_code=201,
    response_model=UploadRead,
    responses=problems(BadRequest, Unauthorized, Conflict, TooLarge, UnsupportedMedia, Unprocessable),
)
def create_upload(
    body: UploadCreate, request: Request, session: SessionDep, settings: SettingsDep, key: KeyDep,
    idempotency_key: IdempotencyDep = None,
) -> Response:  # fmt: skip
    """Begin an upload in parts."""
    if body.bytes > settings.max_upload_bytes:
        raise TooLarge(f"The upload is larger than {settings.max_upload_bytes:,} bytes, the most this server accepts.")
    most = MAX_PARTS * settings.max_part_bytes
    if body.bytes > most:
        raise TooLarge(f"{MAX_PARTS:,} parts of {settings.max_part_bytes:,} bytes hold {most:,} bytes.")
    format = format_of(body.mime_type or "", body.name)

    def begin() -> UploadRead:
        limits.check_room(session, key, body.bytes)
        upload = Upload(
            id=new_id("up"), tenant=key.tenant, name=body.name, bytes=body.bytes, format=format, sha256=body.sha256,
            options=body.model_dump(exclude={"name", "bytes", "mime_type", "sha256"}), status="pending",
            expires_at=_expiry(settings),
        )  # fmt: skip
        session.add(upload)
        session.flush()
        session.refresh(upload)
        return UploadRead.of(upload, settings)

    return idempotent(
        session, request, key.tenant, idempotency_key, request_hash(body.model_dump(mode="json")), begin, status=201,
        headers=lambda upload: {"Location": f"/uploads/{upload['id']}"},
    )  # fmt: skip


@router.get("/{upload_id}", response_model=UploadRead, responses=problems(Unauthorized, NotFound))
def read_upload(upload_id: str, session: SessionDep, settings: SettingsDep, tenant: TenantDep) -> UploadRead:
    """One upload, with the parts that have arrived: after a cut, send the others."""
    return UploadRead.of(owned(session, Upload, upload_id, tenant), settings)


PART_BODY = {
    "requestBody": {
        "required": True,
        "description": "The part's bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/{upload_id}/parts",
    status_code=201,
    response_model=PartRead,
    openapi_extra=PART_BODY,
    responses=problems(BadRequest, Unauthorized, NotFound, IllegalMove, TooLarge, Unprocessable, Unavailable),
)
async def add_part(
    upload_id: str,
    request: Request,
    key: KeyDep,
    storage: StorageDep,
    settings: SettingsDep,
    number: Annotated[int, Query(ge=1, le=MAX_PARTS, description="Where the part stands in the file, from 1.")],
    content_digest: Annotated[
        str | None, Header(description="`sha-256=:<base64>:` of this part (RFC 9530); checked.")
    ] = None,
) -> PartRead:
    """Send a part. Sent again it does no harm; sent again with other bytes, it replaces the first."""
    expected = _sha256_of(content_digest)
    await run_in_threadpool(_refuse_unless_pending, upload_id, key.tenant)
    with limits.uploading(key), spool.directory() as directory:
        path = directory / "part"
        size, sha256 = await receive_part(request, path, most_bytes=settings.max_part_bytes)
        if size == 0:
            raise EmptyFile("The part is empty.")
        if expected not in (None, sha256):
            raise DigestMismatch(f"The part's SHA-256 is {sha256}, but Content-Digest says {expected}; send it again.")
        part = UploadPart(id=new_id("part"), upload_id=upload_id, number=number, bytes=size, sha256=sha256)
        return await run_in_threadpool(_keep_part, storage, settings, part, path)


def _refuse_unless_pending(upload_id: str, tenant: str) -> None:
    with session_scope() as session:
        _pending(owned(session, Upload, upload_id, tenant))


def _keep_part(storage: Storage, settings: Settings, part: UploadPart, path: Path) -> PartRead:
    """Store a part. Each sending has a file of its own, so that two at once cannot take each other's away."""
    storage.put(part.key, path)
    added = False
    try:
        with session_scope() as session:
            upload = _locked(session, part.upload_id)
            known = session.get(UploadPart, (part.upload_id, part.number))
            if known is not None and known.sha256 == part.sha256:
                return PartRead.model_validate(known)
            others = sum(other.bytes for other in upload.parts if other.number != part.number)
            if (total := others + part.bytes) > upload.bytes:
                raise TooLarge(f"With this part {total:,} bytes have come, and {upload.bytes:,} were announced.")
            if known is not None:
                session.delete(known)
                session.flush()
            added = True
            session.add(part)
            upload.expires_at = _expiry(settings)
            session.flush()
            read = PartRead.model_validate(part)
    finally:
        if not added:
            storage.delete(part.key)
    if known is not None:
        storage.delete(known.key)
    return read


@router.post(
    "/{upload_id}/complete",
    status_code=201,
    response_model=DatasetRead,
    responses=problems(BadRequest, Unauthorized, NotFound, RequestInFlight, TooLarge, InvalidRows, Unavailable),
)
def complete_upload(
    upload_id: str,
    key: KeyDep,
    storage: StorageDep,
    settings: SettingsDep,
    response: Response,
    body: UploadComplete | None = None,
) -> DatasetRead:
    """Put the parts together, check the whole and every row of it, as POST /datasets does; the dataset.

    Completing it again answers with the same dataset.
    """
    with try_lock(f"upload {upload_id}") as is_alone, limits.uploading(key):
        if not is_alone:
            raise RequestInFlight("This upload is being completed; ask again shortly.")
        dataset = _complete(upload_id, key.tenant, storage, settings, body or UploadComplete())
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


def _complete(upload_id: str, tenant: str, storage: Storage, settings: Settings, wish: UploadComplete) -> DatasetRead:
    with session_scope() as session:
        upload = owned(session, Upload, upload_id, tenant)
        if upload.status == "completed":
            return DatasetRead.model_validate(owned(session, Dataset, upload.dataset_id or "", tenant))
        parts = _in_order(_pending(upload), wish.part_ids)
    options = UploadOptions(name=upload.name, **upload.options)
    with spool.directory() as directory:
        file = _assembled(upload, parts, storage, directory / "upload")
        for expected in (upload.sha256, wish.sha256):
            if expected not in (None, file.sha256):
                raise DigestMismatch(
                    f"The file's SHA-256 is {file.sha256}, not {expected}. Compare the parts' with yours "
                    f"(GET /uploads/{upload_id}) and send those that differ again."
                )
        with stored_rows(tenant, storage, settings, options, file) as keep, session_scope() as session:
            current = _locked(session, upload_id)
            dataset = keep(session)
            current.status, current.dataset_id = "completed", dataset.id
            read = DatasetRead.model_validate(dataset)
    storage.delete_all(upload.folder)
    return read


def _in_order(upload: Upload, ids: list[str] | None) -> list[UploadPart]:
    """The parts of the whole file. Raises Unprocessable where one is missing, unknown, or the bytes do not add up."""
    parts = list(upload.parts)
    if ids is None:
        missing = sorted(set(range(1, (parts[-1].number if parts else 1) + 1)) - {part.number for part in parts})
        if missing:
            others = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
            raise Unprocessable(f"Part {missing[0]} has not come{others}; send what is missing.")
    else:
        known = {part.id: part for part in parts}
        for id in ids:
            if id not in known:
                raise Unprocessable(f"part_ids: {id!r} is no part of this upload, or was replaced by a later one.")
        if len(set(ids)) < len(ids):
            raise Unprocessable("part_ids: a part is named twice.")
        parts = [known[id] for id in ids]
    if (total := sum(part.bytes for part in parts)) != upload.bytes:
        raise Unprocessable(f"The parts hold {total:,} bytes, and {upload.bytes:,} were announced.")
    return parts


def _assembled(upload: Upload, parts: Sequence[UploadPart], storage: Storage, path: Path) -> ReceivedFile:
    digest = hashlib.sha256()
    try:
        with path.open("wb") as whole:
            for part in parts:
                with storage.open(part.key) as stream:
                    while chunk := stream.read(COPY_BYTES):
                        digest.update(chunk)
                        whole.write(chunk)
    except FileNotFoundError:
        raise IllegalMove("The upload was cancelled, or a part replaced, while it was being completed.") from None
    return ReceivedFile(path, cast(Format, upload.format), upload.name, upload.bytes, digest.hexdigest())


@router.post("/{upload_id}/cancel", response_model=UploadRead, responses=problems(Unauthorized, NotFound, IllegalMove))
def cancel_upload(
    upload_id: str, session: SessionDep, storage: StorageDep, settings: SettingsDep, tenant: TenantDep
) -> UploadRead:
    """Give an upload up; its parts are removed."""
    upload = owned(session, Upload, upload_id, tenant)
    session.refresh(upload, with_for_update=True)
    if upload.status == "completed":
        raise IllegalMove("The upload is complete; delete its dataset instead.")
    upload.status = "cancelled"
    for part in upload.parts:
        session.delete(part)
    session.flush()
    session.expire(upload, ["parts"])
    event.listen(session, "after_commit", lambda _: storage.delete_all(upload.folder), once=True)
    return UploadRead.of(upload, settings)


def _locked(session: Session, upload_id: str) -> Upload:
    """The upload with its row locked. Raises IllegalMove, or NotFound when it has expired meanwhile."""
    upload = session.get(Upload, upload_id, with_for_update=True)
    if upload is None:
        raise NotFound
    return _pending(upload)


def _pending(upload: Upload) -> Upload:
    if upload.status != "pending":
        raise IllegalMove(f"The upload is {upload.status}; begin another.")
    return upload


def _expiry(settings: Settings) -> datetime:
    return now() + timedelta(seconds=settings.upload_expires_seconds)


def _sha256_of(content_digest: str | None) -> str | None:
    """The SHA-256 in hex out of a Content-Digest header (RFC 9530); None where there is none. Raises BadRequest."""
    if content_digest is None:
        return None
    match = DIGEST.search(content_digest)
    try:
        digest = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise BadRequest("Content-Digest must hold `sha-256=:<base64 of 32 bytes>:`.")
    return digest.hex()
