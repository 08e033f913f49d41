"""Before a job starts, a labeling worker tries its teacher on a few of its rows: what a dry run tells is then measured.

The API stores what is to be tried, sends a message, and looks for the result for a while. What the teacher said is in
the label cache then, as of any row, so a job does not pay for it again; and every dry run of the same teacher and rows
uses the result for an hour.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import delete, func, or_, select, update

from app import queue
from app.config import settings
from app.db import session_scope
from app.models import Dataset, Measurement, new_id
from app.preflight import Plan

SAMPLE_ROWS = 32
PICKUP_SECONDS = 3.0
"""A worker that is free takes a message at once."""
LOOK_SECONDS = 0.1
FRESH = timedelta(hours=1)
LONGEST = timedelta(minutes=10)
"""A measurement that is under way for longer has lost its worker."""
AT_ONCE = 4
"""Dry runs of one API process that wait for a worker at the same moment; each holds a thread."""

_waiting = threading.BoundedSemaphore(AT_ONCE)


class Found(NamedTuple):
    """What a worker measured."""

    result: dict[str, Any] | None
    """As workers/measuring.py makes it; null where nothing was measured."""
    note: str | None
    """Why there is no result, or what it means for the job."""


def measure(tenant: str, plan: Plan, rows: list[int]) -> Found:
    """Have a worker try the plan's teacher on train rows of these numbers. No transaction may be open: it may take a while."""
    limit = settings().measure_seconds
    if plan.spec.teacher.kind == "dataset" or not rows:
        return Found(None, "There is no train row that the teacher would be asked about.")
    if limit == 0:
        return Found(None, "This server's settings have measure_seconds = 0: dry runs are not measured.")
    if not _waiting.acquire(blocking=False):
        return Found(None, "Several dry runs are being measured just now; ask again in a while.")
    try:
        begun = _begin(tenant, plan, rows)
        return begun if isinstance(begun, Found) else _wait(begun, limit)
    finally:
        _waiting.release()


def _begin(tenant: str, plan: Plan, rows: list[int]) -> str | Found:
    """The id of a measurement of this teacher and dataset, a new one where none is fresh; or why there can be none."""
    dataset_id = plan.datasets["train"].id
    with session_scope() as session:
        session.execute(delete(Measurement).where(Measurement.created_at < func.now() - FRESH))
        known = session.scalar(
            select(Measurement.id)
            .where(
                Measurement.tenant == tenant, Measurement.fingerprint == plan.fingerprint,
                Measurement.dataset_id == dataset_id,
                or_(
                    Measurement.status == "done",
                    (Measurement.status == "running") & (Measurement.created_at > func.now() - LONGEST),
                ),
            )
            .order_by(Measurement.created_at.desc())
            .limit(1)
        )  # fmt: skip
        if known is not None:
            return known
        if session.get(Dataset, dataset_id, with_for_update={"read": True}) is None:
            return Found(None, "The dataset was deleted meanwhile.")
        new = Measurement(
            id=new_id("ms"), tenant=tenant, fingerprint=plan.fingerprint, dataset_id=dataset_id, rows=rows,
            spec=plan.spec.model_dump(mode="json"), labels=[label.model_dump(mode="json") for label in plan.labels],
        )  # fmt: skip
        session.add(new)
        session.flush()
        id = new.id
    if queue.send(queue.MEASURE, id):
        return id
    _withdraw(id)
    return Found(None, "The broker is away, so no worker can be asked to measure; the figures are estimates.")


def _wait(id: str, limit: float) -> Found:
    began = time.monotonic()
    while True:
        with session_scope() as session:
            row = session.execute(
                select(Measurement.status, Measurement.result).where(Measurement.id == id)
            ).one_or_none()
        if row is None:
            return Found(None, "The dataset was deleted meanwhile.")
        status, result = row
        if status == "done":
            return Found(result, result["note"])
        if status == "failed":
            return Found(None, f"A worker tried the teacher and it did not work: {result['message']}")
        waited = time.monotonic() - began
        if status == "waiting" and waited > min(PICKUP_SECONDS, limit) and _withdraw(id):
            return Found(None, "No labeling worker was free to measure; the figures are estimates.")
        if waited > limit:
            return Found(
                None,
                f"The worker was not done after {limit:g} s, as when it has to load a large model; ask again in a while, "
                "its result is kept for an hour.",
            )
        time.sleep(LOOK_SECONDS)


def _withdraw(id: str) -> bool:
    """Whether the measurement is gone: no worker had taken it."""
    with session_scope() as session:
        gone = session.execute(delete(Measurement).where(Measurement.id == id, Measurement.status == "waiting"))
        return bool(gone.rowcount)  # type: ignore[attr-defined]


# --- the worker's side ----------------------------------------------------------------------------------------------


def take(id: str) -> Measurement | None:
    """The measurement, now this worker's; None when it was withdrawn or another has it."""
    with session_scope() as session:
        taken = session.scalars(
            update(Measurement)
            .where(Measurement.id == id, Measurement.status == "waiting")
            .values(status="running")
            .returning(Measurement)
        ).one_or_none()
        if taken is not None:
            session.expunge(taken)
        return taken


def record(id: str, status: str, result: dict[str, Any], fingerprint: str) -> None:
    """Keep what was found, under the fingerprint that the teacher turned out to have."""
    with session_scope() as session:
        session.execute(
            update(Measurement)
            .where(Measurement.id == id)
            .values(status=status, result=result, fingerprint=fingerprint)
        )
