"""Datasets over HTTP: upload, look, delete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import limits, records, retention, spool
from app.api.deps import (
    IdempotencyDep,
    KeyDep,
    PageDep,
    SessionDep,
    SettingsDep,
    StorageDep,
    TenantDep,
    idempotent,
    is_replay,
    newest_first,
    owned,
    problems,
    request_hash,
)
from app.api.schemas import PageRead, Read
from app.api.uploads import CONTENT_TYPES, ReceivedFile, receive
from app.config import Settings
from app.db import session_scope
from app.errors import (
    BadRequest,
    Conflict,
    DatasetInUse,
    InvalidRows,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMedia,
)
from app.models import ApiKey, Dataset, new_id, now
from app.options import Text
from app.rows import MAX_COLUMN_NAME_CHARACTERS, Columns, Limits
from app.storage import Storage

router = APIRouter(prefix="/datasets", tags=["datasets"])


class WarningRead(Read):
    code: str
    message: str


class DatasetRead(Read):
    """A dataset as its owner sees it."""

    id: str
    name: str
    rows: int
    bytes: int
    """Of the file as it was received."""
    sha256: str
    """Of the file as it was received, in hex."""
    columns: list[str]
    """Every column of the file, used or not."""
    label_counts: dict[str, int]
    """Rows per label; a label that only distributions name counts 0."""
    duplicates: int
    """Rows whose text and text_pair stood in an earlier row."""
    skipped: int
    """Bad rows left out with on_error=skip."""
    has_text_pair: bool
    warnings: list[WarningRead]
    created_at: datetime


class RowRead(Read):
    row: int
    """Position in the dataset, from 0."""
    line: int
    """Where it stood in the upload, from 1."""
    text: str
    text_pair: str | None
    label: str | None
    confidence: float | None
    distribution: dict[str, float] | None


class RowsPage(Read):
    data: list[RowRead]
    has_more: bool
    next: int | None
    """Send it as `after` for the next page."""


def key_with_room(request: Request, key: KeyDep) -> ApiKey:
    """The caller's key. Raises StorageFull at once where the file is told to be larger than the room that is left."""
    length = request.headers.get("content-length", "")
    told = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
    with session_scope() as session:
        if not is_replay(session, request, key.tenant):
            limits.check_room(session, key, told)
    return key


ColumnName = Annotated[Text | None, Query(max_length=MAX_COLUMN_NAME_CHARACTERS)]


@dataclass(frozen=True)
class UploadOptions:
    """The query of POST /datasets. A column named "" is left out, one not named is looked for under its usual names."""

    name: Annotated[Text | None, Query(max_length=300, description="What to call it; the file's name by default.")] = (
        None
    )
    text_column: ColumnName = None
    text_pair_column: ColumnName = None
    label_column: ColumnName = None
    confidence_column: ColumnName = None
    distribution_column: ColumnName = None
    on_error: Annotated[
        records.OnError, Query(description="What one bad row does: refuse the file, or be left out.")
    ] = "reject"

    def columns(self) -> Columns:
        """The columns as the reader wants them."""
        return Columns(
            self.text_column, self.text_pair_column, self.label_column, self.confidence_column, self.distribution_column
        )


BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
    "additionalProperties": False,
}
UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "description": "JSONL, CSV, TSV or Parquet, plain or gzipped (told by the first bytes, whatever the name).",
        "content": {"multipart/form-data": {"schema": FORM}, **dict.fromkeys(CONTENT_TYPES, BINARY)},
    }
}


@router.post(
    "",
    status_code=201,
    response_model=DatasetRead,
    openapi_extra=UPLOAD_BODY,
    responses=problems(BadRequest, Unauthorized, Conflict, TooLarge, UnsupportedMedia, InvalidRows, Unavailable),
)
async def create_dataset(
    request: Request,
    key: Annotated[ApiKey, Depends(key_with_room)],
    storage: StorageDep,
    settings: SettingsDep,
    options: Annotated[UploadOptions, Depends()],
    idempotency_key: IdempotencyDep = None,
) -> Response:
    """Upload a dataset. Every row is checked; one answer names all that is wrong, line by line."""
    with limits.uploading(key), spool.directory() as directory:
        path = directory / "upload"
        file = await receive(request, path, name=options.name, most_bytes=settings.max_upload_bytes)
        return await run_in_threadpool(_store, request, key, storage, settings, options, file, idempotency_key)


def _store(
    request: Request, key: ApiKey, storage: Storage, settings: Settings, options: UploadOptions, file: ReceivedFile,
    idempotency_key: str | None,
) -> Response:  # fmt: skip
    with stored_rows(key.tenant, storage, settings, options, file) as keep, session_scope() as session:

        def add() -> DatasetRead:
            limits.check_room(session, key, file.bytes)
            return DatasetRead.model_validate(keep(session))

        return idempotent(
            session, request, key.tenant, idempotency_key, request_hash(file.sha256, file.format, vars(options)), add,
            status=201, headers=lambda body: {"Location": f"/datasets/{body['id']}"},
        )  # fmt: skip


@contextmanager
def stored_rows(
    tenant: str, storage: Storage, settings: Settings, options: UploadOptions, file: ReceivedFile
) -> Iterator[Callable[[Session], Dataset]]:
    """Check every row of a received file and store them; what is yielded adds the dataset's row, in your transaction.

    File first, row second: a file without a row is harmless, a row without its file is not. Rows that no dataset was
    added for are removed again. Raises InvalidRows and its kin.
    """
    sizes = Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)})
    rows = file.path.with_name("rows.parquet")
    columns, on_error = options.columns(), options.on_error
    ingest = records.ingest_apart if file.format == "parquet" else records.ingest
    found = ingest(file.path, rows, format=file.format, columns=columns, on_error=on_error, limits=sizes)

    dataset = Dataset(
        id=new_id("ds"), tenant=tenant, name=options.name or _name_of(file), rows=found.rows, bytes=file.bytes,
        sha256=file.sha256, columns=found.columns, label_counts=found.label_counts, duplicates=found.duplicates,
        skipped=found.skipped, has_text_pair=found.has_text_pair, warnings=list(found.warnings), created_at=now(),
    )  # fmt: skip
    kept = False

    def keep(session: Session) -> Dataset:
        nonlocal kept
        kept = True
        session.add(dataset)
        session.flush()
        return dataset

    storage.put(dataset.key, rows)
    try:
        yield keep
    finally:
        if not kept:
            storage.delete(dataset.key)


def _name_of(file: ReceivedFile) -> str:
    name = (file.file_name or "").replace("\\", "/").rpartition("/")[2].replace("\x00", "").strip()
    return name[:300] or f"dataset.{file.format}"


@router.get("", response_model=PageRead[DatasetRead], responses=problems(Unauthorized, Unprocessable))
def list_datasets(session: SessionDep, tenant: TenantDep, page: PageDep) -> dict[str, Any]:
    """The datasets, newest first."""
    return newest_first(session, select(Dataset).where(Dataset.tenant == tenant), Dataset, page)


@router.get("/{dataset_id}", response_model=DatasetRead, responses=problems(Unauthorized, NotFound))
def read_dataset(dataset_id: str, session: SessionDep, tenant: TenantDep) -> Dataset:
    """One dataset: rows, labels, warnings."""
    return owned(session, Dataset, dataset_id, tenant)


@router.get("/{dataset_id}/rows", response_model=RowsPage, responses=problems(Unauthorized, NotFound, Unprocessable))
def list_rows(
    dataset_id: str,
    session: SessionDep,
    storage: StorageDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[int, Query(ge=-1, le=2**62, description="Only rows after this one.")] = -1,
) -> dict[str, Any]:
    """The rows as they were read."""
    dataset = owned(session, Dataset, dataset_id, tenant)
    start = after + 1
    try:
        with storage.open(dataset.key) as stream:
            entries = records.read_rows(stream, start, start + limit).to_pylist()
    except FileNotFoundError:
        session.expire(dataset)
        owned(session, Dataset, dataset_id, tenant)  # raises NotFound where it was deleted a moment ago
        raise
    rows = [
        {**entry, "row": row, "distribution": entry["distribution"] and dict(entry["distribution"])}
        for row, entry in enumerate(entries, start)
    ]
    has_more = start + len(rows) < dataset.rows and bool(rows)
    return {"data": rows, "has_more": has_more, "next": rows[-1]["row"] if has_more else None}


@router.delete("/{dataset_id}", status_code=204, responses=problems(Unauthorized, NotFound, DatasetInUse))
def delete_dataset(dataset_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> None:
    """Delete a dataset and its rows. A job that has not ended holds it: 409."""
    retention.delete_dataset(session, storage, owned(session, Dataset, dataset_id, tenant))
