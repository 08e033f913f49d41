"""Jobs over HTTP: start, look, steer; events, metrics and the samples ledger."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy import bindparam, false, select
from sqlalchemy.orm import Session, lazyload, load_only
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from app import estimates, keys, labels, ledger, lifecycle, limits, measurements, overview, preflight, retention
from app.api import polls
from app.api.deps import (
    IdempotencyDep,
    KeyDep,
    PageDep,
    SessionDep,
    SettingsDep,
    StorageDep,
    TenantDep,
    idempotent,
    newest_first,
    owned,
    problems,
    reading,
    request_hash,
)
from app.api.schemas import (
    DryRunRead,
    EventPage,
    EventRead,
    JobRead,
    LabelReportRead,
    PageRead,
    SamplePage,
    SampleRead,
    SeriesPage,
)
from app.errors import (
    BadRequest,
    Conflict,
    IllegalMove,
    InvalidSpec,
    NotFound,
    NotReady,
    TooLarge,
    Unauthorized,
    Unprocessable,
    UnsupportedMedia,
)
from app.models import TERMINAL, ApiKey, Job, JobEvent, JobMetric
from app.options import JobSpec

router = APIRouter(prefix="/jobs", tags=["jobs"])

RETRY_AFTER_SECONDS = 2
EVENT_POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15
METADATA_FILTER = re.compile(r"metadata\[([\w.\-]{1,64})\]")
BY_METADATA = {
    "name": "metadata", "in": "query", "style": "deepObject", "explode": True,
    "description": "Only jobs that carry this: `metadata[key]=value`, which may be repeated.",
    "schema": {
        "type": "object", "propertyNames": {"pattern": r"^[\w.\-]{1,64}$"},
        "additionalProperties": {"type": "string"},
    },
}  # fmt: skip
Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]


@router.post(
    "",
    status_code=202,
    response_model=JobRead,
    responses={
        200: {"model": DryRunRead, "description": "With dry_run=true: what the job would need; no job is stored."},
        **problems(BadRequest, Unauthorized, Conflict, TooLarge, UnsupportedMedia, InvalidSpec),
    },
)
def create_job(
    spec: JobSpec,
    request: Request,
    session: SessionDep,
    storage: StorageDep,
    settings: SettingsDep,
    key: KeyDep,
    idempotency_key: IdempotencyDep = None,
    dry_run: Annotated[bool, Query(description="Only tell what the job would need.")] = False,
    measure: Annotated[
        bool, Query(description="In a dry run: have a worker ask the teacher about a few rows, where one is free.")
    ] = True,
) -> Response:
    """Start a distillation job, once everything that can be checked beforehand has been."""
    tenant = key.tenant
    if dry_run:
        # For the audit log: only a dry run that has the teacher asked may cost something.
        request.state.action = "measure_teacher" if measure and spec.teacher.kind != "dataset" else None
        plan = preflight.check(session, tenant, spec, settings)
        need = estimates.need(session, storage, tenant, plan)
        told = estimates.dry_run(session, plan, need)
        session.expunge_all()
        session.rollback()  # no transaction is open, and no dataset held, while a worker is waited for
        if measure:
            told = estimates.measured(told, measurements.measure(tenant, plan, need.train_rows))
        return Response(DryRunRead.model_validate(told).model_dump_json(), media_type="application/json")

    def start() -> JobRead:
        plan = preflight.check(session, tenant, spec, settings)
        limits.check_jobs(session, key)
        return _shown(session, lifecycle.submit(session, tenant, plan).id)

    return idempotent(
        session, request, tenant, idempotency_key, request_hash(spec.model_dump(mode="json")), start, status=202,
        headers=lambda job: {"Location": f"/jobs/{job['id']}", "Retry-After": str(RETRY_AFTER_SECONDS)},
    )  # fmt: skip


@router.get(
    "",
    response_model=PageRead[JobRead],
    responses=problems(Unauthorized, Unprocessable),
    openapi_extra={"parameters": [BY_METADATA]},
)
def list_jobs(
    request: Request,
    session: SessionDep,
    tenant: TenantDep,
    page: PageDep,
    status: Annotated[Status | None, Query()] = None,
    method: Annotated[str | None, Query(max_length=64, pattern=r"^\w+$")] = None,
) -> dict[str, Any]:
    """The jobs, newest first. `metadata[key]=value` keeps those that carry it."""
    query = select(Job).options(load_only(Job.id), lazyload(Job.phases)).where(Job.tenant == tenant)
    if status is not None:
        query = query.where(Job.status == status)
    if method is not None:
        query = query.where(Job.method == method)
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata"):
            match = METADATA_FILTER.fullmatch(name)
            if match is None:
                raise Unprocessable(f"{name[:100]!r} is no filter; write metadata[key]=value, as keys are in a job.")
            # No metadata holds a NUL, and PostgreSQL refuses to be asked about one.
            query = query.where(false() if "\x00" in value else Job.metadata_.contains({match[1]: value}))
    found = newest_first(session, query, Job, page)
    ids = [job.id for job in found["data"]]
    return {**found, "data": [JobRead.of(shown) for shown in overview.show(session, ids)]}


@router.get("/{job_id}", response_model=JobRead, responses=problems(Unauthorized, NotFound))
async def read_job(job_id: str, tenant: TenantDep) -> Response:
    """One job: status, progress, selection, scores."""
    # This is what is asked most by far, so it is written out already: `response_model` would check the answer once more.
    found = await polls.look(job_id)
    if found is None or found.tenant != tenant:
        raise NotFound
    headers = {} if found.is_terminal else {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return Response(found.body, headers=headers, media_type="application/json")


def _shown(session: Session, job_id: str) -> JobRead:
    return JobRead.of(*overview.show(session, [job_id]))


def _move(verb: Any, job_id: str, session: Session, tenant: str) -> JobRead:
    verb(session, owned(session, Job, job_id, tenant))
    return _shown(session, job_id)


MOVE: dict[str, Any] = {
    "status_code": 202, "response_model": JobRead, "responses": problems(Unauthorized, NotFound, IllegalMove),
}  # fmt: skip


@router.post("/{job_id}/cancel", **MOVE)
def cancel_job(job_id: str, session: SessionDep, tenant: TenantDep) -> JobRead:
    """End a job. A training stops at its next step."""
    return _move(lifecycle.cancel, job_id, session, tenant)


@router.post("/{job_id}/pause", **MOVE)
def pause_job(job_id: str, session: SessionDep, tenant: TenantDep) -> JobRead:
    """Hold a job; its state is saved and its worker is free."""
    return _move(lifecycle.pause, job_id, session, tenant)


@router.post("/{job_id}/resume", **MOVE)
def resume_job(job_id: str, session: SessionDep, tenant: TenantDep) -> JobRead:
    """Let a paused job go on."""
    return _move(lifecycle.resume, job_id, session, tenant)


@router.post("/{job_id}/retry", **MOVE)
def retry_job(job_id: str, session: SessionDep, key: KeyDep) -> JobRead:
    """Try a failed or cancelled job again, from its last saved state."""
    owned(session, Job, job_id, key.tenant)
    limits.check_jobs(session, key)
    return _move(lifecycle.retry, job_id, session, key.tenant)


@router.delete("/{job_id}", status_code=204, responses=problems(Unauthorized, NotFound, IllegalMove))
def delete_job(job_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> None:
    """Delete a job that has ended, with its events, metrics, ledger, labels and checkpoints."""
    retention.delete_job(session, storage, owned(session, Job, job_id, tenant))


# --- events ---------------------------------------------------------------------------------------------------------


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **problems(Unauthorized, NotFound, Unprocessable),
    },
)
async def list_events(
    job_id: str,
    key: KeyDep,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events with a greater seq.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[int | None, Header(ge=0, le=2**31 - 1)] = None,
) -> Any:
    """What happened to the job, as pages, or live with `Accept: text/event-stream`."""
    await reading(lambda session: owned(session, Job, job_id, key.tenant))
    if "text/event-stream" in accept:
        start = after if last_event_id is None else last_event_id
        return LiveEvents(key, _live_events(job_id, key.id, start))
    events = await reading(lambda session: _events_after(session, job_id, after, limit + 1))
    has_more = len(events) > limit
    shown = events[:limit]
    return {"data": shown, "has_more": has_more, "next": shown[-1].seq if has_more else None}


_STATUS = (
    select(Job.status, Job.event_seq)
    .join(ApiKey, ApiKey.id == bindparam("key_id"))
    .where(Job.id == bindparam("job_id"), *keys.WORKS)
)
_EVENTS = (
    select(JobEvent)
    .where(JobEvent.job_id == bindparam("job_id"), JobEvent.seq > bindparam("seq"))
    .order_by(JobEvent.seq)
    .limit(bindparam("limit"))
)


def _events_after(session: Session, job_id: str, seq: int, limit: int) -> list[JobEvent]:
    return list(session.scalars(_EVENTS, {"job_id": job_id, "seq": seq, "limit": limit}))


def _poll(session: Session, job_id: str, key_id: str, seq: int) -> tuple[list[JobEvent], bool]:
    """The next events, and whether they are the last. The status is read first: no event comes after one that is final."""
    found = session.execute(_STATUS, {"job_id": job_id, "key_id": key_id}).one_or_none()
    if found is None:  # the job was deleted, or the key has been revoked or has expired
        return [], True
    status, last = found
    events = _events_after(session, job_id, seq, 100) if last > seq else []
    return events, status in TERMINAL and len(events) < 100


class LiveEvents(EventSourceResponse):
    """A stream that counts as its tenant's until it ends, however it ends. Raises TooManyStreams in place of its first byte."""

    def __init__(self, key: ApiKey, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(events, ping=KEEP_ALIVE_SECONDS)
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with limits.streaming(self.key):
            await super().__call__(scope, receive, send)


async def _live_events(job_id: str, key_id: str, seq: int) -> AsyncIterator[dict[str, Any]]:
    """The events from `seq` on, as they come. Between two looks it holds no thread and no connection."""
    while True:
        events, last = await reading(partial(_poll, job_id=job_id, key_id=key_id, seq=seq))
        for event in events:
            seq = event.seq
            data = EventRead.model_validate(event).model_dump(mode="json")
            yield {"id": str(seq), "event": event.type, "data": orjson.dumps(data).decode()}
        if last:
            return
        await asyncio.sleep(EVENT_POLL_SECONDS)


# --- metrics and samples --------------------------------------------------------------------------------------------


@router.get("/{job_id}/metrics", response_model=SeriesPage, responses=problems(Unauthorized, NotFound, Unprocessable))
def read_metrics(
    job_id: str,
    session: SessionDep,
    tenant: TenantDep,
    name: Annotated[list[str] | None, Query(description="Which series; may be repeated. All when left out.")] = None,
    from_step: Annotated[int, Query(ge=0, le=2**62)] = 0,
    to_step: Annotated[int | None, Query(ge=0, le=2**62)] = None,
) -> dict[str, Any]:
    """The metric series by step."""
    job = owned(session, Job, job_id, tenant)
    names = sorted(session.scalars(select(JobMetric.name).where(JobMetric.job_id == job.id).distinct()))
    wanted = [entry for entry in names if name is None or entry in name]
    # Columns and not rows of the model: with many labels there are a hundred thousand points.
    columns = (JobMetric.name, JobMetric.step, JobMetric.epoch, JobMetric.value, JobMetric.at)
    query = select(*columns).where(JobMetric.job_id == job.id, JobMetric.name.in_(wanted), JobMetric.step >= from_step)
    if to_step is not None:
        query = query.where(JobMetric.step <= to_step)
    points: dict[str, list[Any]] = {entry: [] for entry in wanted}
    for point in session.execute(query.order_by(JobMetric.name, JobMetric.step)):
        points[point.name].append(point)
    return {"data": [{"name": entry, "points": points[entry]} for entry in wanted], "names": names}


@router.get(
    "/{job_id}/samples", response_model=SamplePage, responses=problems(Unauthorized, NotFound, NotReady, Unprocessable)
)
def list_samples(
    job_id: str,
    session: SessionDep,
    storage: StorageDep,
    tenant: TenantDep,
    decision: Annotated[Literal["selected", "rejected"] | None, Query()] = None,
    label: Annotated[str | None, Query(max_length=200, description="Only rows the teacher gave this label.")] = None,
    order: Annotated[ledger.Order, Query(description="`-` puts the largest first.")] = "row",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[int, Query(ge=0, le=2**62, description="`next` of the page before this one.")] = 0,
) -> SamplePage:
    """Why every row was used or not: what the teacher said, the thresholds it met, how often it was selected."""
    job = owned(session, Job, job_id, tenant)
    names = [entry["name"] for entry in job.label_set.labels]
    try:
        with storage.open(ledger.key(job.id)) as stream:
            rows, has_more = ledger.page(
                stream, names, decision=decision, label=label, order=order, start=after, limit=limit
            )
    except FileNotFoundError:
        raise NotReady("The ledger is written at the end of the first epoch; ask again later.") from None
    return SamplePage(
        data=[SampleRead.model_validate(row) for row in rows],
        has_more=has_more,
        next=str(after + limit) if has_more else None,
    )


@router.get(
    "/{job_id}/labels/report", response_model=LabelReportRead, responses=problems(Unauthorized, NotFound, NotReady)
)
def read_label_report(job_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> Any:
    """How good the teacher's labels are, as far as can be told, and which rows a person should look at."""
    job = owned(session, Job, job_id, tenant)
    try:
        return orjson.loads(storage.read(labels.report_key(job.id)))
    except FileNotFoundError:
        raise NotReady("The label report is written when the student is evaluated, after its training.") from None
