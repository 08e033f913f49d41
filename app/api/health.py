"""Is the service alive, is it ready, and what is it doing: open to everyone, telling nobody's secrets."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from app.api.schemas import Health
from app.db import session_scope
from app.models import JOB_STATUSES, Job, now
from app.queue import broker_is_reachable

router = APIRouter(tags=["service"])

JOBS = Gauge("understudy_jobs", "Jobs by status.", ["status"])
WAIT = Gauge("understudy_longest_wait_seconds", "Age of the oldest job that no worker has begun yet; 0: there is none.")


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=Health)
def healthz() -> dict[str, Any]:
    """The process answers."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=Health, responses={503: {"model": Health, "description": "Not ready."}})
def readyz() -> Any:
    """Requests can be served. A broker that is away delays jobs but refuses none, so it does not count."""
    checks = {"database": "ok", "broker": "ok" if broker_is_reachable() else "unreachable"}
    try:
        with session_scope() as session:
            session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
    except SQLAlchemyError:
        checks["database"] = "unreachable"
    ready = checks["database"] == "ok"
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics() -> Response:
    """Figures for Prometheus."""
    with session_scope() as session:
        by_status = session.execute(select(Job.status, func.count()).group_by(Job.status))
        counts = {status: count for status, count in by_status}  # noqa: C416 - dict() of rows is untyped
        not_begun = (Job.status == "queued", Job.started_at.is_(None))
        oldest = session.scalar(select(func.min(Job.created_at)).where(*not_begun))
    WAIT.set((now() - oldest).total_seconds() if oldest else 0)
    for status in JOB_STATUSES:
        JOBS.labels(status).set(counts.get(status, 0))
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
