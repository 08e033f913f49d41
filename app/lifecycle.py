"""Job states, the legal moves between them, and the verbs that make them.

              submit                claim                     finish
    (client) ───────▶ queued ─────────────────▶ running ─────────────────▶ succeeded
                      │  ▲  ▲                   │  │  │ fail
             cancel   │  │  │ resume / retry    │  │  └─────────────────▶ failed
                      ▼  │  │                   │  │ pause
               cancelled │  └──────── paused ◀─ pausing
                      ▲  │ worker lost, next    │
                      │  │ wave of labels       │
                      └──┴───── cancelling ◀────┘ cancel

Labeling is shared by many workers (app/shards.py). Training belongs to one: a claim raises the job's `attempt`, and every
write asks for it. A worker that lost its lease finds out at its next write, or heartbeat, and stops. Nothing here commits;
app/db.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import turns, waves, webhooks
from app.config import settings
from app.errors import IllegalMove, NotFound
from app.models import (
    HELD,
    PHASES,
    TERMINAL,
    Comparison,
    Dataset,
    Job,
    JobEvent,
    JobMetric,
    JobPhase,
    LabelSet,
    LabelShard,
    new_id,
    now,
)
from app.preflight import Plan
from app.queue import LABEL, TRAIN, enqueue_on_commit

LABELED = ("queued", "running", "paused")
"""Statuses in which a shard that was claimed may be finished: a pause, and the wait after it, waste no labels."""
WAITING = (Job.status.in_(LABELED), or_(Job.phase.is_(None), Job.phase == "labeling"))
"""Of a job that needs labels and does not have all of them yet."""
LABEL_MESSAGES = 16
"""At most this many workers are called to a labeling at once; more join through the sweep."""


class LeaseLost(Exception):
    """The job, or shard, is no longer this worker's: cancelled, or given to another."""


class WorkFailed(Exception):
    """A job cannot go on, for a reason its owner should read."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


def is_terminal(job: Job) -> bool:
    """Whether nothing more will happen to the job by itself or by a worker."""
    return job.status in TERMINAL


# --- the record -----------------------------------------------------------------------------------------------------


def emit(session: Session, job_id: str, type: str, message: str, *, level: str = "info", **data: Any) -> None:
    """Record an event under the next number of the job. Takes the job's row lock, so numbers have no gaps."""
    seq = session.scalar(
        update(Job)
        .where(Job.id == job_id)
        .values(event_seq=Job.event_seq + 1)
        .returning(Job.event_seq)
        .execution_options(synchronize_session=False)
    )
    session.add(JobEvent(job_id=job_id, seq=seq, type=type, level=level, message=message, data=data))


def record_metrics(session: Session, job_id: str, step: int, epoch: float, values: dict[str, float | None]) -> None:
    """Write points of several series at one step; a resumed run writes the same points again."""
    moment = now()
    rows = [
        {"job_id": job_id, "name": name, "step": step, "epoch": epoch, "value": value, "at": moment}
        for name, value in values.items()
    ]
    statement = insert(JobMetric).values(rows)
    statement = statement.on_conflict_do_update(
        index_elements=["job_id", "name", "step"],
        set_={"value": statement.excluded.value, "epoch": statement.excluded.epoch, "at": statement.excluded.at},
    )
    session.execute(statement)


def start_phase(session: Session, job_id: str, name: str, total: int) -> None:
    """The job enters a phase, or enters it again after a worker was lost."""
    values = {
        "job_id": job_id,
        "name": name,
        "position": PHASES.index(name),
        "started_at": now(),
        "total": total,
        "done": 0,
    }
    statement = insert(JobPhase).values(values)
    # A phase that is entered again keeps its beginning.
    again = {"total": total, "finished_at": None}
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "name"], set_=again))


def advance_phase(session: Session, job_id: str, name: str, done: int, *, finished: bool = False) -> None:
    """Note how far a phase has come."""
    values: dict[str, Any] = {"done": done}
    if finished:
        values["finished_at"] = now()
    session.execute(update(JobPhase).where(JobPhase.job_id == job_id, JobPhase.name == name).values(values))


def warn(session: Session, job: Job, warnings: list[dict[str, str]]) -> None:
    """Add to the job's warnings, with an event for each."""
    job.warnings = [*job.warnings, *warnings]
    for warning in warnings:
        facts = {name: value for name, value in warning.items() if name != "message"}
        emit(session, job.id, "job.warning", warning["message"], level="warning", **facts)


# --- the client's verbs ---------------------------------------------------------------------------------------------


def submit(
    session: Session, tenant: str, plan: Plan, *, shared: LabelSet | None = None, comparison_id: str | None = None,
    arm: str | None = None,
) -> Job:  # fmt: skip
    """Store a job that preflight has checked, cut its rows into shards, and call workers once that is committed.

    `shared` is the label set of another job with the same teacher and rows: nothing is labeled twice for the two.
    """
    spec = plan.spec
    label_set = shared or _new_label_set(session, tenant, plan)
    shards = label_set.shards
    job = Job(
        id=new_id("job"),
        tenant=tenant,
        name=spec.name,
        method=spec.method.kind,
        spec=spec.model_dump(mode="json"),
        metadata_=spec.metadata,
        dataset_id=spec.dataset_id,
        validation_dataset_id=spec.validation_dataset_id,
        test_dataset_id=spec.test_dataset_id,
        label_set_id=label_set.id,
        comparison_id=comparison_id,
        arm=arm,
        warnings=[],
    )
    session.add(job)
    session.flush()
    rows = sum(shard.stop - shard.start for shard in shards)
    session.add(JobPhase(job_id=job.id, name="labeling", position=0, total=rows, done=0))
    emit(session, job.id, "job.queued", "Job accepted.", rows=rows, shards=len(shards))
    warn(session, job, plan.warnings)
    # A job that shares its labels needs one call of its own, for the case that it is the only one left.
    enqueue_on_commit(session, LABEL, job.id, copies=1 if shared else max(1, min(len(shards), LABEL_MESSAGES)))
    session.flush()
    session.refresh(job)
    return job


def _new_label_set(session: Session, tenant: str, plan: Plan) -> LabelSet:
    label_set = LabelSet(
        id=new_id("ls"),
        tenant=tenant,
        fingerprint=plan.fingerprint,
        labels=[label.model_dump(mode="json") for label in plan.labels],
    )
    session.add(label_set)
    session.flush()
    session.add_all(_cut(plan, label_set.id))
    session.flush()
    return label_set


def _cut(plan: Plan, label_set_id: str) -> list[LabelShard]:
    shards: list[LabelShard] = []
    for split in plan.splits_to_label:
        dataset = plan.datasets[split]
        begin = 0
        for wave, end in enumerate(
            waves.ends(plan.rows_of(split), plan.spec.labeling.waves if split == "train" else None), 1
        ):
            for start in range(begin, end, settings().shard_rows):
                shards.append(
                    LabelShard(
                        label_set_id=label_set_id,
                        index=len(shards),
                        dataset_id=dataset.id,
                        split=split,
                        start=start,
                        stop=min(start + settings().shard_rows, end),
                        wave=wave,
                        status="pending" if wave == 1 else "withheld",
                    )
                )
            begin = end
    return shards


def cancel(session: Session, job: Job) -> None:
    """End a job: at once where no worker trains it, else as soon as its worker notices. Raises IllegalMove."""
    lock(session, job)
    if job.status in ("cancelling", "cancelled"):
        return
    if job.status in TERMINAL:
        raise IllegalMove(f"The job has already {job.status}; there is nothing to cancel.")
    if _is_trained_now(job):
        job.status = "cancelling"
        emit(session, job.id, "job.cancelling", "Cancelling: the worker stops at its next step.")
    else:
        _end(session, job, "cancelled")
        emit(session, job.id, "job.cancelled", "Cancelled.")


def pause(session: Session, job: Job) -> None:
    """Hold a job where it is. Raises IllegalMove."""
    lock(session, job)
    if job.status in ("pausing", "paused"):
        return
    if job.status not in ("queued", "running"):
        raise IllegalMove(f"Only a queued or running job can be paused; this one is {job.status}.")
    if _is_trained_now(job):
        job.status = "pausing"
        emit(session, job.id, "job.pausing", "Pausing: the worker saves its state at its next step.")
    else:
        job.status = "paused"
        emit(session, job.id, "job.paused", "Paused.")


def resume(session: Session, job: Job) -> None:
    """Let a paused job go on from where it was. Raises IllegalMove."""
    lock(session, job)
    if job.status != "paused":
        raise IllegalMove(f"Only a paused job can be resumed; this one is {job.status}.")
    requeue(session, job)
    emit(session, job.id, "job.resumed", "Resumed: waiting for a worker.")


def retry(session: Session, job: Job) -> None:
    """Try a failed or cancelled job again, from its last saved state. Raises IllegalMove."""
    lock(session, job)
    if job.status not in ("failed", "cancelled"):
        raise IllegalMove(f"Only a failed or cancelled job can be retried; this one is {job.status}.")
    ids = [job.dataset_id, job.validation_dataset_id, job.test_dataset_id]
    # Held until the commit, as by POST /jobs, so that nobody deletes one in between.
    owners = session.scalars(select(Dataset.tenant).where(Dataset.id.in_(ids)).with_for_update(read=True))
    if set(owners) != {job.tenant}:
        raise IllegalMove("A dataset of this job has been deleted; upload it again and start a new job.")
    job.error, job.finished_at, job.lost_workers = None, None, 0
    if not waiting_for(session, job.label_set_id):  # else the claimed shards are being labeled, for another arm
        session.execute(
            update(LabelShard)
            .where(LabelShard.label_set_id == job.label_set_id, LabelShard.status == "claimed")
            .values(status="pending", lease_expires_at=None, lost_workers=0)
        )
    requeue(session, job)
    emit(session, job.id, "job.retried", "Retried: waiting for a worker.")


def lock(session: Session, job: Job) -> None:
    """Lock the job's row and read it anew. Raises NotFound when it has been deleted meanwhile."""
    if session.get(Job, job.id, with_for_update=True, populate_existing=True) is None:
        raise NotFound


def lock_all(session: Session, jobs: Sequence[Job]) -> list[Job]:
    """The rows of several jobs, locked in the order of their ids, as whoever locks several does."""
    query = select(Job).where(Job.id.in_([job.id for job in jobs])).order_by(Job.id).with_for_update()
    return list(session.scalars(query, execution_options={"populate_existing": True}))


def waiting_for(session: Session, label_set_id: str | None, *, lock: bool = False) -> list[Job]:
    """The jobs that need these labels and do not have all of them yet: one job, or several arms of a comparison.

    Locked in the order of their ids, so that two workers cannot block each other in a circle.
    """
    query = (
        select(Job)
        .where(Job.label_set_id == label_set_id, *WAITING)
        .order_by(Job.id)
        .execution_options(populate_existing=True)
    )
    return list(session.scalars(query.with_for_update(of=Job) if lock else query))


def _is_trained_now(job: Job) -> bool:
    return job.lease_expires_at is not None and job.status in HELD


def requeue(session: Session, job: Job) -> None:
    """Put a job in line for a worker, from where it was."""
    job.status, job.enqueued_at, job.lease_expires_at, job.worker = "queued", func.now(), None, None
    labeling = job.phase in (None, "labeling")
    enqueue_on_commit(session, LABEL if labeling else TRAIN, job.id, copies=LABEL_MESSAGES if labeling else 1)


def _end(session: Session, job: Job, status: str) -> None:
    job.status, job.finished_at, job.lease_expires_at, job.worker = status, now(), None, None
    webhooks.note_end(session, job, status)
    session.flush()
    if job.comparison_id is not None:
        _end_comparison(session, job.comparison_id)


def _end_comparison(session: Session, comparison_id: str) -> None:
    """Where this was the comparison's last run, tell its end."""
    # Locked after the runs, and always last: of two runs that end at once, the second sees that the first has.
    comparison = session.get_one(Comparison, comparison_id, with_for_update={"key_share": True})
    statuses = set(session.scalars(select(Job.status).where(Job.comparison_id == comparison_id)))
    if statuses <= set(TERMINAL):
        webhooks.note_end(session, comparison, joint_end(statuses))
        session.flush()


def joint_end(statuses: set[str]) -> str:
    """One word for several jobs that have ended: with at least one success it is `succeeded`."""
    return next(name for name in ("succeeded", "failed", "cancelled") if name in statuses)


# --- training: one worker, one attempt ------------------------------------------------------------------------------


def lease() -> ColumnElement[Any]:
    """When a lease that is taken or renewed now runs out."""
    return func.now() + timedelta(seconds=settings().lease_seconds)


def claim(session: Session, job_id: str, worker: str) -> Job | None:
    """The job, now this worker's to train; None when it is not waiting for one. A second message is thus harmless."""
    job = session.scalars(
        select(Job)
        .where(Job.id == job_id, *turns.waits_for_a_trainer())
        # Waits for whoever writes the row just now: to skip it would waste the message, and the sweep sends the next
        # one only after a while.
        .with_for_update()
    ).one_or_none()
    if job is None:
        return None
    if job.lease_expires_at is not None and _lost_a_worker(session, job):
        return None
    job.status, job.attempt, job.worker = "running", job.attempt + 1, worker
    job.lease_expires_at = lease()
    job.started_at = job.started_at or now()
    emit(session, job.id, "job.claimed", f"Attempt {job.attempt} began.", attempt=job.attempt, worker=worker)
    turns.take_turn(session, job.tenant, TRAIN)
    session.flush()
    session.refresh(job)
    return job


def renew(session: Session, job_id: str, attempt: int) -> str:
    """Keep a job, and learn its status. Raises LeaseLost."""
    status = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(HELD))
        .values(lease_expires_at=lease())
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    )
    if status is None:
        raise LeaseLost
    return str(status)


def held(session: Session, job_id: str, attempt: int) -> Job:
    """The job with its row locked, while it is this attempt's. Raises LeaseLost."""
    job = session.scalars(
        select(Job).where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(HELD)).with_for_update()
    ).one_or_none()
    if job is None:
        raise LeaseLost
    return job


def finish(session: Session, job: Job) -> None:
    """A held job has its checkpoint: it has succeeded, even if a pause or cancel came a moment too late."""
    _end(session, job, "succeeded")
    emit(session, job.id, "job.succeeded", "Finished.", checkpoint_id=job.best_checkpoint_id)


def stop(session: Session, job: Job) -> None:
    """The worker of a held job has stopped, as it was asked to, or because it is shutting down."""
    if job.status == "cancelling":
        _end(session, job, "cancelled")
        emit(session, job.id, "job.cancelled", "Cancelled.")
    elif job.status == "pausing":
        job.status, job.lease_expires_at, job.worker = "paused", None, None
        emit(session, job.id, "job.paused", "Paused; it goes on from its saved state.")
    else:
        requeue(session, job)
        emit(session, job.id, "job.requeued", "The worker is shutting down; another goes on from the saved state.")


def wait_for_storage(session: Session, job: Job) -> None:
    """The worker of a held job cannot read or write its files: the sweep calls another after a while."""
    if job.status in ("pausing", "cancelling"):
        stop(session, job)
        return
    job.status, job.enqueued_at, job.lease_expires_at, job.worker = "queued", func.now(), None, None
    message = "The storage does not answer; the job goes on from its last saved state when it does."
    emit(session, job.id, "storage.away", message, level="warning")


def fail(session: Session, job_id: str, code: str, message: str, *, attempt: int | None = None) -> None:
    """End a job with the reason, unless it has ended already or belongs to a later attempt."""
    job = session.get(Job, job_id, with_for_update=True)
    if job is None or job.status in TERMINAL or (attempt is not None and job.attempt != attempt):
        return
    if job.status == "cancelling":
        stop(session, job)
        return
    fail_locked(session, job, code, message)


def fail_locked(session: Session, job: Job, code: str, message: str, **evidence: Any) -> None:
    """End a job whose row is locked with the reason."""
    job.error = {"code": code, "message": message, "phase": job.phase}
    _end(session, job, "failed")
    emit(session, job.id, "job.failed", message, level="error", code=code, phase=job.phase, **evidence)


def _lost_a_worker(session: Session, job: Job) -> bool:
    """Note that a lease ran out. True when that was once too often and the job has failed."""
    job.lost_workers += 1
    emit(
        session, job.id, "worker.lost", "The worker was lost; the job goes on from its last saved state.",
        level="warning", worker=job.worker, attempt=job.attempt,
    )  # fmt: skip
    if job.lost_workers < settings().max_attempts:
        return False
    fail_locked(
        session,
        job,
        "worker_lost",
        f"{job.lost_workers} workers were lost while they ran this job; see the workers' logs.",
    )
    return True


# --- the scheduler's sweep ------------------------------------------------------------------------------------------


def sweep(session: Session, idle: set[str]) -> int:
    """Find what a lost worker or a lost message left behind and set it going again. How many jobs it touched.

    `idle` names the tasks whose queue is empty: only then can a message that is waited for have been lost.
    """
    touched = 0
    expired = session.scalars(
        select(Job).where(Job.status.in_(HELD), Job.lease_expires_at < func.now()).with_for_update(skip_locked=True)
    )
    for job in expired.all():
        touched += 1
        if job.status == "running":
            if not _lost_a_worker(session, job):
                requeue(session, job)
        else:
            stop(session, job)
    waiting_since = func.now() - timedelta(seconds=settings().requeue_seconds)
    waiting = session.scalars(
        select(Job)
        .where(Job.status.in_(("queued", "running")), Job.lease_expires_at.is_(None), Job.enqueued_at < waiting_since)
        .with_for_update(skip_locked=True)
    )
    for job in waiting.all():
        labeling = job.phase in (None, "labeling")
        task = LABEL if labeling else TRAIN
        if task not in idle:
            continue
        open_shards = _count_shards(session, job, turns.IS_OPEN) if labeling else 1
        if open_shards == 0 and _count_shards(session, job, turns.IS_LIVE):
            continue
        touched += 1
        job.enqueued_at = func.now()
        enqueue_on_commit(session, task, job.id, copies=max(1, min(open_shards, LABEL_MESSAGES)))
    return touched


def _count_shards(session: Session, job: Job, condition: ColumnElement[bool]) -> int:
    of_job = select(func.count()).where(LabelShard.label_set_id == job.label_set_id, condition)
    return session.scalar(of_job) or 0
