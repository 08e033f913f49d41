"""The tasks: claim, call, record. A message means that there is work; sent twice it does no harm."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.orm import Session

from app import lifecycle, queue, turns
from app.config import settings
from app.db import AWAY, patiently, session_scope
from app.errors import StorageAway
from app.lifecycle import LeaseLost, WorkFailed
from app.models import Job
from workers.celery_app import celery, stopping, worker_name
from workers.failures import failure_of
from workers.reporter import GivenUp, Heartbeat, Reporter, Stopped

log = structlog.get_logger()


def limit_threads() -> None:
    """Give the models the CPU threads the operator wants; several workers on one machine would fight over the cores."""
    import torch

    if (threads := settings().threads) is not None:
        torch.set_num_threads(threads)


@celery.task(name=queue.LABEL)
def label(job_id: str) -> None:
    """One turn of labeling, for the job whose turn it is; where that leaves rows, another message comes after it."""
    from workers.labeling import label_job

    limit_threads()
    for next_id in _in_turn(queue.LABEL):
        with structlog.contextvars.bound_contextvars(job_id=next_id, task="label"):
            began = time.monotonic()
            if label_job(next_id, worker_name(), stopping, seconds=settings().turn_seconds):
                if time.monotonic() >= began + settings().turn_seconds:
                    queue.send(queue.LABEL, next_id)
                return


@celery.task(name=queue.TRAIN)
def train(job_id: str) -> None:
    """Train the student of the job whose turn it is, if there is one that no other worker trains."""
    for next_id in _in_turn(queue.TRAIN, job_id):
        with structlog.contextvars.bound_contextvars(job_id=next_id, task="train"), claimed(next_id) as held:
            if held is not None:
                from workers.pipeline import run_job

                limit_threads()
                run_job(*held)
        if held is not None:
            return


@celery.task(name=queue.MEASURE)
def measure(measurement_id: str) -> None:
    """Try a teacher on a few rows, for a dry run that waits for it."""
    from workers.measuring import measure

    limit_threads()
    with structlog.contextvars.bound_contextvars(measurement_id=measurement_id, task="measure"):
        measure(measurement_id, stopping)


def _in_turn(task: str, named: str | None = None) -> list[str]:
    return patiently(lambda session: turns.in_turn(session, task, named))


@contextmanager
def claimed(job_id: str) -> Iterator[tuple[Job, Reporter] | None]:
    """Hold the job for the block, and record how it ended; None when there is nothing to hold."""

    def claim(session: Session) -> Job | None:
        job = lifecycle.claim(session, job_id, worker_name())
        if job is not None:
            session.expunge(job)
        return job

    job = patiently(claim)
    if job is None:
        yield None
        return
    attempt = job.attempt

    def renew() -> str:
        with session_scope() as session:
            return lifecycle.renew(session, job_id, attempt)

    def let_go(session: Session) -> None:
        lifecycle.stop(session, lifecycle.held(session, job_id, attempt))

    with Heartbeat(renew, let_go) as heartbeat:
        try:
            yield job, Reporter(job_id, attempt, heartbeat, stopping)
        except Exception as error:
            try:
                _record_end(job_id, attempt, error)
            except LeaseLost:
                log.info("lease_lost", attempt=attempt)


def _record_end(job_id: str, attempt: int, error: Exception) -> None:
    """Let the job stop, or fail with a reason, for what ended its work. Raises LeaseLost when that is another's now."""
    if isinstance(error, LeaseLost):
        raise error
    if isinstance(error, Stopped | GivenUp):
        patiently(lambda session: lifecycle.stop(session, lifecycle.held(session, job_id, attempt)))
        return
    if isinstance(error, StorageAway):
        patiently(lambda session: lifecycle.wait_for_storage(session, lifecycle.held(session, job_id, attempt)))
        return
    if isinstance(error, AWAY):
        log.error("database_stayed_away", attempt=attempt, error=str(error))
        raise LeaseLost  # nothing can be recorded: the lease runs out, and the sweep brings the job back
    failure = failure_of(error, "internal_error")
    # The frames hold the student and its batch, and memory may be what is lacking.
    traceback.clear_frames(error.__traceback__)
    if not isinstance(error, WorkFailed):
        log.error("training_failed", attempt=attempt, code=failure.code, exc_info=error)
    patiently(lambda session: lifecycle.fail(session, job_id, failure.code, failure.message, attempt=attempt))
