"""Checkpoints over HTTP: what there is, and the tar itself with ranges, a strong ETag and its digest."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from sqlalchemy import select

from app import retention
from app.api.deps import KeyDep, PageDep, SessionDep, StorageDep, TenantDep, needs, newest_first, owned, problems
from app.api.schemas import CheckpointRead, PageRead, Read
from app.db import session_scope
from app.errors import (
    BadRequest,
    NotFound,
    NotReady,
    RangeNotSatisfiable,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMedia,
)
from app.models import Checkpoint, Dataset, Job
from app.options import Options, Text
from app.predict import shelf
from app.storage import Storage

router = APIRouter(tags=["checkpoints"])

CHUNK_BYTES = 256 * 1024
PREDICTORS = ThreadPoolExecutor(2, "predictor")
WAITING = threading.BoundedSemaphore(16)
PredictText = Annotated[Text, Field(min_length=1, max_length=20_000)]
ONE_RANGE = re.compile(r"bytes=\s*(\d{0,40})-(\d{0,40})\s*")
TAR: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The part that was asked for.", "content": {"application/x-tar": {}}},
    304: {"description": "Unchanged."},
    **problems(Unauthorized, NotFound, RangeNotSatisfiable),
}


@router.get(
    "/jobs/{job_id}/checkpoints", response_model=PageRead[CheckpointRead], responses=problems(Unauthorized, NotFound)
)
def list_checkpoints(job_id: str, session: SessionDep, tenant: TenantDep, page: PageDep) -> dict[str, Any]:
    """The checkpoints of a job, newest first."""
    job = owned(session, Job, job_id, tenant)
    found = newest_first(session, select(Checkpoint).where(Checkpoint.job_id == job.id), Checkpoint, page)
    return {**found, "data": [_read(checkpoint, job.best_checkpoint_id) for checkpoint in found["data"]]}


@router.get("/checkpoints/{checkpoint_id}", response_model=CheckpointRead, responses=problems(Unauthorized, NotFound))
def read_checkpoint(checkpoint_id: str, session: SessionDep, tenant: TenantDep) -> CheckpointRead:
    """One checkpoint: scores, size, digest, and its files with theirs."""
    checkpoint = owned(session, Checkpoint, checkpoint_id, tenant)
    return _read(checkpoint, session.scalar(select(Job.best_checkpoint_id).where(Job.id == checkpoint.job_id)))


@router.head("/checkpoints/{checkpoint_id}/download", include_in_schema=False)
@router.get("/checkpoints/{checkpoint_id}/download", response_class=Response, responses=TAR)
def download_checkpoint(
    checkpoint_id: str, request: Request, session: SessionDep, storage: StorageDep, tenant: TenantDep,
    range: Annotated[str | None, Header()] = None, if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:  # fmt: skip
    """The checkpoint as one tar; unpacked it loads with `AutoModelForSequenceClassification.from_pretrained`."""
    checkpoint = owned(session, Checkpoint, checkpoint_id, tenant)
    return _send(storage, checkpoint, request, range, if_range, if_none_match)


@router.head("/jobs/{job_id}/checkpoint", include_in_schema=False)
@router.get("/jobs/{job_id}/checkpoint", response_class=Response, responses={**TAR, **problems(NotReady)})
def download_best(
    job_id: str, request: Request, session: SessionDep, storage: StorageDep, tenant: TenantDep,
    range: Annotated[str | None, Header()] = None, if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:  # fmt: skip
    """The best checkpoint of a job, as one tar."""
    job = owned(session, Job, job_id, tenant)
    if job.best_checkpoint_id is None:
        raise NotReady(f"The job is {job.status} and has no checkpoint.")
    checkpoint = owned(session, Checkpoint, job.best_checkpoint_id, tenant)
    return _send(storage, checkpoint, request, range, if_range, if_none_match)


class PredictRequest(Options):
    """A few texts for the student."""

    texts: Annotated[list[PredictText], Field(min_length=1, max_length=64)]
    text_pairs: Annotated[list[PredictText], Field(max_length=64)] | None = None
    """The second text of each, where the student was trained on pairs."""


class PredictionRead(Read):
    label: str
    probabilities: dict[str, float]
    """Per class, calibrated: softmax(logits / temperature)."""
    confidence: float
    """The largest of them."""
    abstain: bool | None
    """Whether the confidence lies below the threshold; null where the checkpoint was never calibrated."""


class PredictionsRead(Read):
    data: list[PredictionRead]
    temperature: float
    threshold: float | None
    """Null where no threshold reaches the target accuracy, so that the student always abstains."""


@router.post(
    "/checkpoints/{checkpoint_id}/predict",
    response_model=PredictionsRead,
    openapi_extra=needs("read"),
    responses=problems(BadRequest, Unauthorized, NotFound, TooLarge, UnsupportedMedia, Unprocessable, Unavailable),
)
async def predict(checkpoint_id: str, body: PredictRequest, storage: StorageDep, key: KeyDep) -> PredictionsRead:
    """Classify a few texts with a checkpoint, here and now; for many, download it."""
    # Threads of their own, so that however many predictions wait, every other request is served.
    if not WAITING.acquire(blocking=False):
        raise Unavailable("Too many predictions are waiting; try again shortly.")
    try:
        return await asyncio.wrap_future(PREDICTORS.submit(_predict, checkpoint_id, key.tenant, storage, body))
    finally:
        WAITING.release()


def _predict(checkpoint_id: str, tenant: str, storage: Storage, body: PredictRequest) -> PredictionsRead:
    with session_scope() as session:
        checkpoint = owned(session, Checkpoint, checkpoint_id, tenant)
        on_pairs = session.scalar(
            select(Dataset.has_text_pair).join(Job, Job.dataset_id == Dataset.id).where(Job.id == checkpoint.job_id)
        )
    if on_pairs and body.text_pairs is None:
        raise Unprocessable("This student was trained on pairs of texts; send `text_pairs`, one for each text.")
    if not on_pairs and body.text_pairs is not None:
        raise Unprocessable("This student was trained on single texts; leave `text_pairs` out.")
    if body.text_pairs is not None and len(body.text_pairs) != len(body.texts):
        raise Unprocessable(f"{len(body.texts)} texts but {len(body.text_pairs)} text_pairs; send one for each text.")
    try:
        student = shelf().take(checkpoint, storage)
    except FileNotFoundError:
        raise NotFound from None
    found = student.predict(body.texts, body.text_pairs)
    return PredictionsRead(
        data=[PredictionRead.model_validate(entry) for entry in found],
        temperature=student.temperature, threshold=student.threshold,
    )  # fmt: skip


@router.delete("/checkpoints/{checkpoint_id}", status_code=204, responses=problems(Unauthorized, NotFound))
def delete_checkpoint(checkpoint_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> None:
    """Delete a checkpoint and its tar; the job stays, with its scores."""
    retention.delete_checkpoint(session, storage, owned(session, Checkpoint, checkpoint_id, tenant))


def _read(checkpoint: Checkpoint, best: str | None) -> CheckpointRead:
    values = {name: getattr(checkpoint, name) for name in CheckpointRead.model_fields if name != "is_best"}
    return CheckpointRead.model_validate({**values, "is_best": best == checkpoint.id})


def _send(
    storage: Storage, checkpoint: Checkpoint, request: Request, range: str | None, if_range: str | None,
    if_none_match: str | None,
) -> Response:  # fmt: skip
    etag = f'"{checkpoint.sha256}"'
    digest = base64.b64encode(bytes.fromhex(checkpoint.sha256)).decode()
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f'attachment; filename="{checkpoint.id}.tar"',
        "Cache-Control": "private, no-transform",
    }
    if if_none_match is not None and (if_none_match.strip() == "*" or etag in if_none_match):
        return Response(status_code=304, headers=headers)
    first, last = 0, checkpoint.bytes - 1
    status = 200
    # Only GET has ranges (RFC 9110, 14.2).
    if range is not None and request.method == "GET" and (if_range is None or if_range.strip() == etag):
        part = requested_part(range, checkpoint.bytes)
        if part is not None:
            first, last = part
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{checkpoint.bytes}"
    headers["Content-Length"] = str(last - first + 1)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="application/x-tar")
    body = _read_part(storage, checkpoint.key, first, last)
    return StreamingResponse(body, status, headers, media_type="application/x-tar")


def requested_part(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header; None when it asks for several parts or is not in bytes (RFC 9110: ignore).

    Raises RangeNotSatisfiable when it lies outside the file.
    """
    match = ONE_RANGE.fullmatch(header)
    if match is None or match.groups() == ("", ""):
        return None
    begin, end = match.groups()
    if begin == "":
        length = int(end)
        first, last = max(0, size - length), size - 1
        outside = length == 0
    else:
        first, last = int(begin), min(int(end) if end else size - 1, size - 1)
        if end and int(end) < first:
            return None
        outside = first >= size
    if outside:
        raise RangeNotSatisfiable(f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"})
    return first, last


def _read_part(storage: Storage, key: str, first: int, last: int) -> Iterator[bytes]:
    with storage.open(key) as stream:
        stream.seek(first)
        remaining = last - first + 1
        while remaining > 0:
            chunk = stream.read(min(CHUNK_BYTES, remaining))
            if not chunk:
                raise OSError(f"{key} is shorter than its row says")
            remaining -= len(chunk)
            yield chunk
