"""Try a teacher on a few rows of a job that has not started, for a dry run; see app/measurements.py."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import structlog

from app import endpoints, labels, measurements
from app.config import settings
from app.db import session_scope
from app.lifecycle import WorkFailed
from app.models import Dataset, Measurement
from app.options import JobSpec, Label, needs_confidence
from app.storage import storage
from workers import artifacts, gate, labeling
from workers.failures import failure_of
from workers.reporter import Heartbeat
from workers.teachers.teacher import AskedToStop, Row, TeacherAway

log = structlog.get_logger()

WARM_UP_ROWS = 4
"""Asked first and not timed: what a teacher does only once would spoil the pace."""
LONGEST_SECONDS = 120.0
"""A server that does not answer is given up then."""


def measure(measurement_id: str, stopping: threading.Event) -> None:
    """Take a measurement, ask its teacher, and record what came of it. A message that comes late does nothing."""
    taken = measurements.take(measurement_id)
    if taken is None:
        return
    began = time.monotonic()

    def should_stop() -> bool:
        return stopping.is_set() or time.monotonic() > began + LONGEST_SECONDS

    try:
        result, fingerprint = _try(taken, should_stop)
        measurements.record(taken.id, "done", result, fingerprint)
    except Exception as error:
        if isinstance(error, TeacherAway):
            message = f"it is to be asked again in a while: {error}"
        elif isinstance(error, AskedToStop):
            message = "the worker was stopped, or the teacher took too long"
        else:
            message = failure_of(error, "labeling_failed").message
            if not isinstance(error, WorkFailed):
                log.error("measuring_failed", measurement=taken.id, exc_info=error)
        measurements.record(taken.id, "failed", {"message": message}, taken.fingerprint)


def _try(taken: Measurement, should_stop: Any) -> tuple[dict[str, Any], str]:
    """The result, and the fingerprint of the labels. Raises WorkFailed, TeacherAway or AskedToStop."""
    began = time.monotonic()
    spec = JobSpec.model_validate(taken.spec)
    names = [Label.model_validate(entry) for entry in taken.labels]
    teacher, fingerprint = labeling.ready_teacher(spec, names, taken.fingerprint, should_stop)
    load_seconds = time.monotonic() - began
    rows = _rows(taken)
    answers = labeling.Answers(taken.tenant, fingerprint, teacher, rows, owner=taken.id, bill=taken.id)

    def renew() -> None:
        with session_scope() as session:
            labels.renew_claims(session, taken.id, settings().lease_seconds)

    with Heartbeat(renew, lambda session: None):
        warm = min(WARM_UP_ROWS, len(rows) // 2)
        answers.ask(range(warm))
        timed_from, asked_before = time.monotonic(), _asked(answers)
        answers.ask(range(warm, len(rows)))
        seconds = time.monotonic() - timed_from
    asked = _asked(answers)
    timed = asked - asked_before
    if timed == 0:
        raise TeacherAway("another worker was asking about the same rows")
    failed = sum(error is not None for error in answers.errors)
    said = answers.dense(len(names))
    known = said[~np.isnan(said[:, 0])]
    is_sure = teacher.confidence_method != "none" and len(known) > 0
    result = {
        "rows": asked,
        "failed": failed,
        "load_seconds": round(load_seconds, 3),
        "seconds": round(seconds, 4),
        "rows_per_second": round(timed / seconds, 3),
        "tokens_per_row": round(sum(answers.tokens) / asked, 2),
        "cost": answers.cost,
        "confidence_method": teacher.confidence_method,
        "confidence": _spread(known.max(axis=1)) if is_sure else None,
        "teacher": teacher.report(),
        "note": _note(spec, teacher.confidence_method, said, rows, answers.errors) or teacher.report().get("note"),
    }
    return result, fingerprint


def _asked(answers: labeling.Answers) -> int:
    """Rows that the teacher was asked about, and not the cache."""
    return sum(source == "teacher" for source in answers.sources)


def _rows(taken: Measurement) -> list[Row]:
    """The sample's rows."""
    with session_scope() as session:
        dataset = session.get_one(Dataset, taken.dataset_id)
    return artifacts.rows_at(storage(), dataset, sorted(taken.rows))


def _spread(confidences: np.ndarray) -> dict[str, float]:
    """Least, quartiles and greatest of the rows' confidences."""
    values = np.quantile(confidences, [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(("min", "p25", "median", "p75", "max"), np.round(values, 4).tolist(), strict=True))


def _note(
    spec: JobSpec, confidence_method: str, said: np.ndarray, rows: list[Row], errors: list[str | None]
) -> str | None:
    """What the sample says against the job, where it does."""
    if confidence_method == "none" and needs_confidence(spec.method):
        return endpoints.no_confidence(spec.method.kind)
    try:
        gate.refuse_a_constant(
            said, [f"{row.text}\0{row.text_pair}" for row in rows], [text for text in errors if text]
        )
    except WorkFailed as useless:
        return useless.message
    return None
