"""Comparisons over HTTP: several methods and seeds on one set of splits and labels, and the table they make."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from app import comparisons, limits, retention, tables
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
    request_hash,
)
from app.api.schemas import ComparisonBrief, ComparisonRead, DryRunRead, PageRead
from app.errors import (
    BadRequest,
    Conflict,
    IllegalMove,
    InvalidSpec,
    NotFound,
    TooLarge,
    Unauthorized,
    Unprocessable,
    UnsupportedMedia,
)
from app.models import Comparison, Job
from app.options import ComparisonSpec

router = APIRouter(prefix="/comparisons", tags=["comparisons"])

RETRY_AFTER_SECONDS = 5
MEDIA_TYPES = {"markdown": "text/markdown", "csv": "text/csv", "latex": "application/x-latex"}


@router.post(
    "",
    status_code=202,
    response_model=ComparisonRead,
    responses={
        200: {"model": DryRunRead, "description": "With dry_run=true: what all runs together would need."},
        **problems(BadRequest, Unauthorized, Conflict, TooLarge, UnsupportedMedia, InvalidSpec),
    },
)
def create_comparison(
    spec: ComparisonSpec,
    request: Request,
    session: SessionDep,
    storage: StorageDep,
    settings: SettingsDep,
    key: KeyDep,
    idempotency_key: IdempotencyDep = None,
    dry_run: Annotated[bool, Query(description="Only tell what the runs would need.")] = False,
) -> Response:
    """Start one job for each arm and seed, once every one of them has been checked."""
    tenant = key.tenant
    comparisons.job_specs(spec)  # before anything is made of the parts that are free in form
    if dry_run:
        request.state.action = None  # nothing for the audit log
        plans = comparisons.check(session, tenant, spec, settings)
        told = DryRunRead.model_validate(comparisons.dry_run(session, storage, tenant, plans))
        return Response(told.model_dump_json(), media_type="application/json")

    def start() -> ComparisonRead:
        plans = comparisons.check(session, tenant, spec, settings)
        limits.check_jobs(session, key, len(plans.plans) * len(spec.seeds))
        return ComparisonRead.of(session, storage, comparisons.submit(session, tenant, plans))

    return idempotent(
        session, request, tenant, idempotency_key, request_hash(spec.model_dump(mode="json")), start, status=202,
        headers=lambda made: {"Location": f"/comparisons/{made['id']}", "Retry-After": str(RETRY_AFTER_SECONDS)},
    )  # fmt: skip


@router.get("", response_model=PageRead[ComparisonBrief], responses=problems(Unauthorized, Unprocessable))
def list_comparisons(session: SessionDep, tenant: TenantDep, page: PageDep) -> dict[str, Any]:
    """The comparisons, newest first, without their tables."""
    jobs = selectinload(Comparison.jobs).load_only(Job.comparison_id, Job.status, Job.started_at, Job.finished_at)
    found = newest_first(session, select(Comparison).options(jobs).where(Comparison.tenant == tenant), Comparison, page)
    return {**found, "data": [ComparisonBrief.brief(comparison) for comparison in found["data"]]}


@router.get("/{comparison_id}", response_model=ComparisonRead, responses=problems(Unauthorized, NotFound))
def read_comparison(
    comparison_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep, response: Response
) -> ComparisonRead:
    """One comparison with its table, as far as its runs have come."""
    told = _read(session, storage, comparison_id, tenant)
    if not told.is_terminal:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return told


@router.get(
    "/{comparison_id}/table",
    response_class=Response,
    responses={
        200: {"content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()}},
        **problems(Unauthorized, NotFound, Unprocessable),
    },
)
def read_table(
    comparison_id: str,
    session: SessionDep,
    storage: StorageDep,
    tenant: TenantDep,
    format: Annotated[Literal["markdown", "csv", "latex"], Query(description="For reading, computing, or a paper.")] = "markdown",
) -> Response:  # fmt: skip
    """The table alone. CSV has every figure unrounded; Markdown and LaTeX are in per cent, mean ± deviation."""
    told = _read(session, storage, comparison_id, tenant).model_dump(mode="json")
    return Response(tables.WRITERS[format](told), media_type=f"{MEDIA_TYPES[format]}; charset=utf-8")


@router.post(
    "/{comparison_id}/cancel",
    status_code=202,
    response_model=ComparisonRead,
    responses=problems(Unauthorized, NotFound, IllegalMove),
)
def cancel_comparison(comparison_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> ComparisonRead:  # fmt: skip
    """End every run that has not ended; those that have keep their place in the table."""
    comparison = owned(session, Comparison, comparison_id, tenant)
    comparisons.cancel(session, comparison)
    session.flush()
    session.refresh(comparison)
    return ComparisonRead.of(session, storage, comparison)


@router.delete("/{comparison_id}", status_code=204, responses=problems(Unauthorized, NotFound, IllegalMove))
def delete_comparison(comparison_id: str, session: SessionDep, storage: StorageDep, tenant: TenantDep) -> None:
    """Delete a comparison whose runs have all ended, with its runs and all they left."""
    retention.delete_comparison(session, storage, owned(session, Comparison, comparison_id, tenant))


def _read(session: Session, storage: Any, comparison_id: str, tenant: str) -> ComparisonRead:
    return ComparisonRead.of(session, storage, owned(session, Comparison, comparison_id, tenant))
