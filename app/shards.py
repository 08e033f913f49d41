"""Labeling, shared by any number of workers: each claims a shard, and its writes hold only while the shard's `attempt` is its own.

The jobs of a comparison share one label set: whoever labels, labels for all that wait for it. The last shard sends them on
to training; from there a student of a wave sends its job back for more labels.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from app import endpoints, turns, waves
from app.config import settings
from app.lifecycle import (
    LABEL_MESSAGES,
    LABELED,
    WAITING,
    LeaseLost,
    emit,
    fail_locked,
    lease,
    record_metrics,
    requeue,
    waiting_for,
)
from app.models import Job, JobEvent, JobMetric, JobPhase, LabelSet, LabelShard, now
from app.options import JobSpec, needs_confidence
from app.queue import LABEL, TRAIN, enqueue_on_commit

FAILED_ROW_RETRIES = 1


def claim(session: Session, job_id: str, worker: str) -> LabelShard | None:
    """The next shard of the job nobody works on, now this worker's; None when there is none for it.

    Claiming the first shard starts the job. A shard that has lost `max_attempts` workers fails every job that waits
    for it.
    """
    waiting = begin_labeling(session, job_id, worker)
    if not waiting:
        return None
    _apply_budget(session, waiting)
    shard = session.scalars(
        select(LabelShard)
        .where(LabelShard.label_set_id == waiting[0].label_set_id, turns.IS_OPEN)
        .order_by(LabelShard.index)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).one_or_none()
    if shard is None:
        _advance_if_labeled(session, waiting)
        return None
    if shard.status == "claimed":
        shard.lost_workers += 1
        emit(
            session, job_id, "worker.lost",
            f"A worker was lost while it labeled rows {shard.start} to {shard.stop - 1}; they are labeled again.",
            level="warning", worker=shard.worker, attempt=shard.attempt,
        )  # fmt: skip
    if shard.lost_workers >= settings().max_attempts:
        for each in waiting:
            fail_locked(session, each, "worker_lost", _suspects(shard))
        return None
    shard.status, shard.attempt, shard.worker = "claimed", shard.attempt + 1, worker
    shard.lease_expires_at = lease()
    if shard.answered_attempt is None:  # what an earlier attempt has done is counted again, from the cache
        shard.rows_done, shard.tokens, shard.seconds = 0, shard.tokens_in_vain, shard.seconds_in_vain
    session.flush()
    turns.take_turn(session, waiting[0].tenant, LABEL)
    return shard


def _suspects(shard: LabelShard) -> str:
    start, stop = shard.busy_start, shard.busy_stop
    if start is None or stop is None:
        start, stop = shard.start, shard.stop
    rows = f"Row {start}" if stop == start + 1 else f"Rows {start} to {stop - 1}"
    return (
        f"{rows} of the {shard.split} set (dataset {shard.dataset_id}) cost {shard.lost_workers} workers their life, one after "
        f"the other; GET /datasets/{shard.dataset_id}/rows?after={start - 1}&limit={min(stop - start, 100)} shows them."
    )


def begin_labeling(session: Session, job_id: str, worker: str) -> list[Job]:
    """The jobs that wait for the labels this job waits for, locked, and this one running; none when it does not wait."""
    label_set_id = session.scalar(select(Job.label_set_id).where(Job.id == job_id))
    waiting = waiting_for(session, label_set_id, lock=True)
    job = next((job for job in waiting if job.id == job_id and job.status in ("queued", "running")), None)
    if job is None:
        return []
    if job.status == "queued" or job.phase is None:
        job.status, job.phase = "running", "labeling"
        job.started_at = job.started_at or now()
        phase = session.get(JobPhase, (job.id, "labeling"))
        if phase is not None and phase.started_at is None:
            phase.started_at = now()
            emit(session, job.id, "job.started", "A worker started labeling.", worker=worker)
        session.flush()
    return waiting


def keep_labeling(session: Session, label_set_id: str) -> None:
    """Raises LeaseLost when no job is to be labeled with these labels just now: paused, cancelled, or gone on."""
    if not any(job.status in ("queued", "running") for job in waiting_for(session, label_set_id)):
        raise LeaseLost


def pass_gate(session: Session, label_set_id: str, verdict: dict[str, Any]) -> None:
    """Record what the first rows told of the teacher, once; the first worker to know says so."""
    waiting = waiting_for(session, label_set_id, lock=True)
    label_set = session.get_one(LabelSet, label_set_id, with_for_update=True)
    if label_set.gate is not None:
        return
    label_set.gate = verdict
    facts = {name: value for name, value in verdict.items() if name != "message"}
    for job in waiting:
        emit(session, job.id, "labeling.gate", verdict["message"], **facts)


def note_cost(session: Session, label_set_id: str, cost: float) -> None:
    """Put what the gate's questions cost on the bill of the first shard."""
    session.execute(
        update(LabelShard)
        .where(LabelShard.label_set_id == label_set_id, LabelShard.index == 0)
        .values(cost=func.coalesce(LabelShard.cost, 0.0) + cost)
        .execution_options(synchronize_session=False)
    )


def fail_labeling(session: Session, label_set_id: str, code: str, message: str, **evidence: Any) -> None:
    """End the jobs that wait for these labels."""
    for job in waiting_for(session, label_set_id, lock=True):
        fail_locked(session, job, code, message, **evidence)


def _count_rows(session: Session, label_set_id: str) -> None:
    """Bring the labeling phase of the jobs that wait up to the rows that are done."""
    done = select(func.coalesce(func.sum(LabelShard.rows_done), 0)).where(LabelShard.label_set_id == label_set_id)
    waiting = select(Job.id).where(Job.label_set_id == label_set_id, *WAITING)
    session.execute(
        update(JobPhase)
        .where(JobPhase.job_id.in_(waiting), JobPhase.name == "labeling")
        .values(done=done.scalar_subquery())
        .execution_options(synchronize_session=False)
    )


def _apply_budget(session: Session, waiting: list[Job]) -> None:
    """Skip the train shards nobody has claimed once the budget is spent; the jobs go on with what is labeled."""
    job = waiting[0]  # arms of a comparison have one budget
    for name, spent, limit in _spent_budgets(session, job):
        skipped = session.scalars(
            update(LabelShard)
            .where(
                LabelShard.label_set_id == job.label_set_id, LabelShard.split == "train",
                LabelShard.status.in_(("pending", "withheld")), LabelShard.answered_attempt.is_(None),
            )
            .values(status="skipped")
            .returning(LabelShard.stop - LabelShard.start)
            .execution_options(synchronize_session=False)
        ).all()  # fmt: skip
        for each in waiting if skipped else ():
            emit(
                session, each.id, "budget.reached", level="warning", rows=sum(skipped),
                message=f"budget.{name} is spent ({spent:g} of {limit:g}); {sum(skipped)} rows stay unlabeled and training goes on without them.",
            )  # fmt: skip


def _spent_budgets(session: Session, job: Job) -> list[tuple[str, float, float]]:
    """The limits that are reached: name, spent, limit."""
    limits = {"max_teacher_tokens": LabelShard.tokens, "max_seconds": LabelShard.seconds}
    reached = []
    for name, column in limits.items():
        if (limit := job.spec["budget"].get(name)) is None:
            continue
        spent = session.scalar(select(func.sum(column)).where(LabelShard.label_set_id == job.label_set_id)) or 0
        if spent >= limit:
            reached.append((name, spent, limit))
    return reached


def _still_held(shard: LabelShard) -> tuple[ColumnElement[bool], ...]:
    """The shard's row, while it is claimed by the very attempt that `shard` was read in: the fence of every write."""
    return (
        LabelShard.label_set_id == shard.label_set_id,
        LabelShard.index == shard.index,
        LabelShard.attempt == shard.attempt,
        LabelShard.status == "claimed",
    )


def renew(session: Session, shard: LabelShard, so_far: dict[str, Any] | None = None) -> str:
    """Keep a shard, and show its rows_done, tokens and seconds. "paused" when every job that needs it is, else "running".

    Raises LeaseLost when it is another's now, or no job needs it any longer.
    """
    jobs = select(Job.id).where(Job.label_set_id == shard.label_set_id)
    needed = jobs.where(Job.status.in_(LABELED)).exists()
    running = jobs.where(Job.status.in_(("queued", "running"))).exists()
    values: dict[str, Any] = {"lease_expires_at": lease()}
    if shard.answered_attempt is None:  # else its rows are counted already
        values.update(so_far or {})
    is_running = session.scalar(
        update(LabelShard)
        .where(*_still_held(shard), needed)
        .values(values)
        .returning(running)
        .execution_options(synchronize_session=False)
    )
    if is_running is None:
        raise LeaseLost
    _count_rows(session, shard.label_set_id)
    return "running" if is_running else "paused"


def note_rows(session: Session, shard: LabelShard, start: int, stop: int) -> None:
    """Note that the worker is about to label rows `start` to `stop`: where it is lost, these are the suspects. Raises LeaseLost."""
    noted = session.execute(
        update(LabelShard)
        .where(*_still_held(shard))
        .values(busy_start=start, busy_stop=stop)
        .execution_options(synchronize_session=False)
    )
    if not noted.rowcount:  # type: ignore[attr-defined]
        raise LeaseLost


def note_spent(
    session: Session, shard: LabelShard, so_far: dict[str, Any], *, cost: float | None, tokens_in_vain: int,
    seconds_in_vain: float,
) -> None:  # fmt: skip
    """Put on the shard's bill what an attempt has spent that does not finish it.

    What it paid for answers is found again with them, in the cache; what it paid in vain would be forgotten.
    """
    values: dict[str, Any] = {
        "tokens_in_vain": LabelShard.tokens_in_vain + tokens_in_vain,
        "seconds_in_vain": LabelShard.seconds_in_vain + seconds_in_vain,
    }
    if cost is not None:
        values["cost"] = func.coalesce(LabelShard.cost, 0.0) + cost
    if shard.answered_attempt is None:  # else its rows are counted already
        values.update(so_far)
    session.execute(
        update(LabelShard).where(*_still_held(shard)).values(values).execution_options(synchronize_session=False)
    )
    _count_rows(session, shard.label_set_id)


def release(session: Session, shard: LabelShard, *, call: bool = False) -> None:
    """Give a shard back unfinished, without counting the attempt as a lost worker; `call` another, if a job runs."""
    if call:
        # A job that was resumed before its shard came back has called its workers too early.
        for job in waiting_for(session, shard.label_set_id):
            if job.status in ("queued", "running"):
                enqueue_on_commit(session, LABEL, job.id)
                break
    session.execute(
        update(LabelShard)
        .where(*_still_held(shard))
        .values(status="pending", lease_expires_at=None, worker=None, busy_start=None, busy_stop=None)
        .execution_options(synchronize_session=False)
    )


def note_away(session: Session, label_set_id: str, what: str, reason: str) -> None:
    """Tell that labeling waits for `what`, the teacher or the storage, once for each time it is away; the sweep calls workers again."""
    for job in waiting_for(session, label_set_id, lock=True):
        last = session.scalars(
            select(JobEvent.type)
            .where(JobEvent.job_id == job.id, JobEvent.type.in_((f"{what}.away", "labeling.shard")))
            .order_by(JobEvent.seq.desc())
            .limit(1)
        ).one_or_none()
        if last != f"{what}.away":
            emit(session, job.id, f"{what}.away", f"Labeling waits for the {what}: {reason}.", level="warning")


def fail_for_want_of_confidence(session: Session, label_set_id: str) -> None:
    """End the jobs on these labels whose method needs a confidence: the teacher turned out to give none."""
    for job in waiting_for(session, label_set_id, lock=True):
        method = JobSpec.model_validate(job.spec).method
        if needs_confidence(method):
            fail_locked(session, job, "confidence_missing", endpoints.no_confidence(method.kind))


def finish(session: Session, shard: LabelShard, figures: dict[str, Any]) -> None:
    """Record that a shard's file is written. The last one sends the jobs on to training. Raises LeaseLost."""
    waiting = waiting_for(session, shard.label_set_id, lock=True)
    if not waiting:
        raise LeaseLost
    written = {name: value for name, value in figures.items() if value is not None}
    if "cost" in written:
        written["cost"] = func.coalesce(LabelShard.cost, 0.0) + written["cost"]
    finished = session.execute(
        update(LabelShard)
        .where(*_still_held(shard))
        .values(
            status="done", lease_expires_at=None, answered_attempt=shard.attempt, rows_done=shard.stop - shard.start,
            tokens_in_vain=0, seconds_in_vain=0.0, **written,
        )
        .execution_options(synchronize_session=False)
    )  # fmt: skip
    if not finished.rowcount:  # type: ignore[attr-defined]
        raise LeaseLost
    _count_rows(session, shard.label_set_id)
    again = " again" if shard.answered_attempt is not None else ""
    for job in waiting:
        emit(session, job.id, "labeling.shard", f"Rows {shard.start} to {shard.stop - 1} of the {shard.split} set are labeled{again}.",
             split=shard.split, start=shard.start, stop=shard.stop, **figures)  # fmt: skip
        session.expire(job, ["event_seq"])
    _advance_if_labeled(session, waiting)


def fail(session: Session, shard: LabelShard, code: str, message: str) -> None:
    """End the jobs that wait for a shard for what happened to it, unless it has been given to another worker since."""
    waiting = waiting_for(session, shard.label_set_id, lock=True)
    current = session.get(LabelShard, (shard.label_set_id, shard.index), populate_existing=True)
    if current is None or (current.status, current.attempt) != ("claimed", shard.attempt):
        return
    for job in waiting:
        fail_locked(session, job, code, message)


def _advance_if_labeled(session: Session, waiting: list[Job]) -> None:
    """From labeling to training, once no shard is open. The jobs' rows are locked, so this happens once.

    A job that is paused stays where it is: it finds its labels done when it goes on.
    """
    open_shards = session.scalar(
        select(func.count())
        .select_from(LabelShard)
        .where(LabelShard.label_set_id == waiting[0].label_set_id, LabelShard.status.in_(("pending", "claimed")))
    )
    if open_shards or _try_failed_rows_again(session, waiting):
        return
    withheld = _rows_withheld(session, waiting[0])
    message = "Every row is labeled."
    if withheld:
        message = f"{withheld} rows are held back until a student has learned from the others."
    for job in waiting:
        if job.status == "paused":
            continue
        job.phase, job.enqueued_at = "training", func.now()
        phase = session.get(JobPhase, (job.id, "labeling"), populate_existing=True)
        if phase is not None:
            moment = now()  # a run that another has labeled for took no time, and has no pace
            phase.started_at, phase.finished_at = phase.started_at or moment, moment
        emit(session, job.id, "labeling.finished", message)
        enqueue_on_commit(session, TRAIN, job.id)


def _try_failed_rows_again(session: Session, waiting: list[Job]) -> bool:
    """Open the shards with failed rows once more, when all others are done; not for rows whose failure is the dataset's."""
    job = waiting[0]
    if job.spec["teacher"]["kind"] == "dataset" or _spent_budgets(session, job):
        return False
    failed = session.scalars(
        update(LabelShard)
        .where(
            LabelShard.label_set_id == job.label_set_id, LabelShard.status == "done", LabelShard.rows_failed > 0,
            LabelShard.retries < FAILED_ROW_RETRIES,
        )
        .values(status="pending", retries=LabelShard.retries + 1, worker=None)
        .returning(LabelShard.rows_failed)
        .execution_options(synchronize_session=False)
    ).all()  # fmt: skip
    if not failed:
        return False
    message = f"The teacher failed on {sum(failed)} rows; it is asked about them once more."
    for each in waiting:
        emit(session, each.id, "labeling.retry", message, level="warning", rows=sum(failed), shards=len(failed))
        each.enqueued_at = func.now()
    enqueue_on_commit(session, LABEL, job.id, copies=min(len(failed), LABEL_MESSAGES))
    return True


# --- waves: back to labeling when a student asks for more -----------------------------------------------------------


def _rows_withheld(session: Session, job: Job) -> int:
    rows = func.coalesce(func.sum(LabelShard.stop - LabelShard.start), 0)
    of_set = LabelShard.label_set_id == job.label_set_id
    return int(session.scalar(select(rows).where(of_set, LabelShard.status == "withheld")) or 0)


def end_wave(session: Session, job: Job, shown: dict[str, Any]) -> bool:
    """Record what the student of a held job has shown of the labels so far. True when the job now waits for more of them.

    shown: `wave` and what waves.reason_to_stop reads. Shown again, after a worker was lost, it changes nothing.
    """
    if any(wave["wave"] == shown["wave"] for wave in job.waves):
        return False
    wish = JobSpec.model_validate(job.spec).labeling.waves
    assert wish is not None
    _apply_budget(session, [job])
    withheld = _rows_withheld(session, job)
    reason = waves.reason_to_stop([*job.waves, shown], wish) if withheld else "there are no more rows to ask about"
    labeling = session.get_one(JobPhase, (job.id, "labeling"), populate_existing=True)
    seconds = (now() - (labeling.finished_at or now())).total_seconds()
    job.waves = [*job.waves, {**shown, "seconds": round(seconds, 3), "stopped": reason}]
    figures = {"wave_selected": float(shown["selected"])}
    if shown["macro_f1"] is not None:
        figures["wave_macro_f1"] = shown["macro_f1"]
    # By rows instead of steps: the series are learning curves.
    record_metrics(session, job.id, shown["rows"], float(shown["wave"]), {**figures})
    told = f"Wave {shown['wave']}, {shown['rows']} rows asked about: {shown['selected']} selected"
    told += ", nothing to score yet" if shown["macro_f1"] is None else f", validation macro-F1 {shown['macro_f1']:.4f}"
    if reason is not None:
        labeling.total = labeling.done
        job.metrics = {**job.metrics, **figures}
        emit(session, job.id, "labeling.stopped", f"{told}. No more rows are asked about: {reason}.",
             **shown, rows_withheld=withheld)  # fmt: skip
        return False
    rows = _open_next_wave(session, job)
    labeling.finished_at = None
    # The next student starts anew, and so do its figures; what this one was stays in `waves` and in the events.
    of_steps = ~JobMetric.name.startswith("wave_", autoescape=True)
    session.execute(delete(JobMetric).where(JobMetric.job_id == job.id, of_steps))
    session.execute(delete(JobPhase).where(JobPhase.job_id == job.id, JobPhase.name == "training"))
    job.phase, job.selection, job.metrics, job.lost_workers = "labeling", None, figures, 0
    emit(session, job.id, "labeling.wave", f"{told}. {rows} more rows are asked about.", **shown, rows_more=rows)
    requeue(session, job)
    return True


def _open_next_wave(session: Session, job: Job) -> int:
    of_set = (LabelShard.label_set_id == job.label_set_id, LabelShard.status == "withheld")
    opened = session.scalars(
        update(LabelShard)
        .where(*of_set, LabelShard.wave == select(func.min(LabelShard.wave)).where(*of_set).scalar_subquery())
        .values(status="pending")
        .returning(LabelShard.stop - LabelShard.start)
        .execution_options(synchronize_session=False)
    )
    return sum(opened.all())
