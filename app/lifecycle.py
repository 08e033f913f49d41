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

Labeling is shared by many workers: each claims a shard and its writes hold only while the shard's `attempt` is its
own. The jobs of a comparison share one label set: whoever labels, labels for all that wait for it. Training belongs to one worker: a claim raises the job's `attempt`, and every write asks for it. A worker that
lost its lease finds out at its next write, or heartbeat, and stops. Nothing here commits; app/db.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    String,
    Subquery,
    Table,
    any_,
    bindparam,
    delete,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session, lazyload
from sqlalchemy.orm.attributes import set_committed_value

from app import endpoints, waves, webhooks
from app.config import settings
from app.errors import IllegalMove, NotFound
from app.models import (
    PHASES,
    Comparison,
    Dataset,
    Job,
    JobEvent,
    JobMetric,
    JobPhase,
    LabelSet,
    LabelShard,
    TenantTurn,
    new_id,
    now,
)
from app.options import JobSpec, needs_confidence
from app.preflight import Plan
from app.queue import LABEL, TRAIN, enqueue_on_commit

TERMINAL = ("succeeded", "failed", "cancelled")
HELD = ("running", "pausing", "cancelling")
"""Statuses in which a worker may hold the job."""
LABELED = ("queued", "running", "paused")
"""Statuses in which a shard that was claimed may be finished: a pause, and the wait after it, waste no labels."""
WAITING = (Job.status.in_(LABELED), or_(Job.phase.is_(None), Job.phase == "labeling"))
"""Of a job that needs labels and does not have all of them yet."""
PHASE_WEIGHTS = {"labeling": 0.25, "training": 0.6, "evaluating": 0.1, "packaging": 0.05}
FAILED_ROW_RETRIES = 1
LABEL_MESSAGES = 16
"""At most this many workers are called to a labeling at once; more join through the sweep."""
LONGEST_LINE = 50
"""How many jobs a worker tries before it gives a message up."""


class LeaseLost(Exception):
    """The job, or shard, is no longer this worker's: cancelled, or given to another."""


class WorkFailed(Exception):
    """A job cannot go on, for a reason its owner should read."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


# --- asking ---------------------------------------------------------------------------------------------------------


def is_terminal(job: Job) -> bool:
    """Whether nothing more will happen to the job by itself or by a worker."""
    return job.status in TERMINAL


def progress(job: Job) -> float:
    """From 0 to 1, by the rows each phase has done; 1 only when the job has succeeded."""
    if job.status == "succeeded":
        return 1.0
    done = sum(
        PHASE_WEIGHTS[phase.name]
        * (1.0 if phase.finished_at else min(1.0, phase.done / phase.total if phase.total else 0.0))
        for phase in job.phases
    )
    return round(min(done, 0.999), 4)


def eta_seconds(job: Job) -> float | None:
    """Seconds until the end, by the pace so far; null while there is no pace, and at the end."""
    fraction = progress(job)
    if job.status != "running" or job.started_at is None or fraction < 0.02:
        return None
    elapsed = (now() - job.started_at).total_seconds()
    return round(elapsed * (1 - fraction) / fraction, 1)


_COUNTED = (LabelShard.rows_from_cache, LabelShard.rows_failed, LabelShard.tokens, LabelShard.tokens_saved)
_TIMED = (LabelShard.seconds, LabelShard.seconds_saved)
_SIZE = LabelShard.stop - LabelShard.start
_OF_TRAIN: dict[str, ColumnElement[Any]] = {
    "asked": func.sum(_SIZE).filter(LabelShard.status.not_in(("withheld", "skipped")), LabelShard.split == "train"),
    "withheld": func.sum(_SIZE).filter(LabelShard.status == "withheld"),
    "done": func.sum(LabelShard.rows_done).filter(LabelShard.split == "train"),
    "tokens": func.sum(LabelShard.tokens).filter(LabelShard.split == "train"),
    "cost": func.sum(LabelShard.cost).filter(LabelShard.split == "train"),
}
"""What waves are told by; all are null where there is no such shard."""
_SPENT = (
    select(
        *(func.coalesce(func.sum(column), 0).label(column.key) for column in (*_COUNTED, *_TIMED)),
        func.sum(LabelShard.cost).label("cost"),
        *(total.label(f"train_{name}") for name, total in _OF_TRAIN.items()),
    )
    .where(LabelShard.label_set_id == Job.label_set_id)
    .correlate(Job)
    .lateral()
)
_PHASES = (
    select(func.jsonb_agg(func.to_jsonb(cast(Table, JobPhase.__table__).table_valued())))
    .where(JobPhase.job_id == Job.id)
    .correlate(Job)
    .scalar_subquery()
)
_SHOWN = (
    select(Job, LabelSet, _PHASES, *_SPENT.c)
    .join(LabelSet, LabelSet.id == Job.label_set_id)
    .join(_SPENT, true())
    .where(Job.id == any_(bindparam("ids", type_=ARRAY(String))))
    .options(lazyload(Job.phases))
    .execution_options(populate_existing=True)
)
"""Made once: to build a statement takes longer than to send it."""


@dataclass(frozen=True)
class Shown:
    """A job with all that its owner sees of it."""

    job: Job
    labeling: dict[str, Any]
    """What labeling has cost so far, added up over the job's shards by the database: there may be tens of thousands."""


def show(session: Session, ids: Sequence[str]) -> list[Shown]:
    """The jobs of these ids, in their order; those that there are not are left out. One statement, for it is what is polled."""
    found = {}
    for job, label_set, phases, *sums in session.execute(_SHOWN, {"ids": list(ids)}):
        set_committed_value(job, "label_set", label_set)
        set_committed_value(job, "phases", sorted(map(_phase, phases or []), key=lambda phase: phase.position))
        found[job.id] = Shown(job, _labeling_figures(job, *sums))
    return [found[job_id] for job_id in ids if job_id in found]


def _phase(columns: dict[str, Any]) -> JobPhase:
    times = {name: columns[name] and datetime.fromisoformat(columns[name]) for name in ("started_at", "finished_at")}
    return JobPhase(**{**columns, **times})


def _labeling_figures(job: Job, *sums: Any) -> dict[str, Any]:
    *counts, seconds, saved, cost = sums[: -len(_OF_TRAIN)]
    of_train = sums[-len(_OF_TRAIN) :]
    return {
        "labels": [label["name"] for label in job.label_set.labels],
        "confidence_method": job.label_set.confidence_method,
        **{column.key: int(count) for column, count in zip(_COUNTED, counts, strict=True)},
        "seconds": round(seconds, 3),
        "cost": None if cost is None else round(cost, 6),
        "seconds_saved": round(saved, 3),
        **_labeling_pace(job),
        "gate": job.label_set.gate,
        "waves": _wave_figures(job, *of_train),
        "teacher": job.label_set.report,
    }


def _wave_figures(job: Job, asked: Any, withheld: Any, done: Any, tokens: Any, cost: float | None) -> Any:
    """How many train rows were asked about, and what the others would have cost at the same price a row; null without waves."""
    if not job.spec.get("labeling", {}).get("waves"):
        return None
    share = int(withheld or 0) / int(done) if done else 0.0
    return {
        "history": job.waves,
        "rows_asked": int(asked or 0),
        "rows_withheld": int(withheld or 0),
        "tokens_withheld": round(int(tokens or 0) * share),
        "cost_withheld": None if cost is None else round(cost * share, 6),
    }


def _labeling_pace(job: Job) -> dict[str, float | None]:
    """Rows a second of all workers together, from the first claim on; and seconds to go, while the job labels."""
    phase = next((phase for phase in job.phases if phase.name == "labeling"), None)
    pace: dict[str, float | None] = {"rows_per_second": None, "eta_seconds": None}
    if phase is None or phase.started_at is None or phase.done == 0:
        return pace
    elapsed = ((phase.finished_at or now()) - phase.started_at).total_seconds()
    elapsed -= sum(wave["seconds"] for wave in job.waves if wave["stopped"] is None)
    if elapsed > 0:
        pace["rows_per_second"] = round(phase.done / elapsed, 3)
        if job.status == "running" and phase.finished_at is None:
            pace["eta_seconds"] = round((phase.total - phase.done) * elapsed / phase.done, 1)
    return pace


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
        warnings=plan.warnings,
    )
    session.add(job)
    session.flush()
    rows = sum(shard.stop - shard.start for shard in shards)
    session.add(JobPhase(job_id=job.id, name="labeling", position=0, total=rows, done=0))
    emit(session, job.id, "job.queued", "Job accepted.", rows=rows, shards=len(shards))
    for warning in plan.warnings:
        facts = {name: value for name, value in warning.items() if name != "message"}
        emit(session, job.id, "job.warning", warning["message"], level="warning", **facts)
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
        rows = dataset.rows
        if split == "train" and (limit := plan.spec.budget.max_labeled_rows) is not None:
            rows = min(rows, limit)
        begin = 0
        for wave, end in enumerate(waves.ends(rows, plan.spec.labeling.waves if split == "train" else None), 1):
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
    _requeue(session, job)
    emit(session, job.id, "job.resumed", "Resumed: waiting for a worker.")


def retry(session: Session, job: Job) -> None:
    """Try a failed or cancelled job again, from its last saved state. Raises IllegalMove."""
    lock(session, job)
    if job.status not in ("failed", "cancelled"):
        raise IllegalMove(f"Only a failed or cancelled job can be retried; this one is {job.status}.")
    ids = [job.dataset_id, job.validation_dataset_id, job.test_dataset_id]
    if session.scalar(select(func.count()).where(Dataset.id.in_(ids), Dataset.tenant != job.tenant)):
        raise IllegalMove("A dataset of this job has been deleted; upload it again and start a new job.")
    job.error, job.finished_at, job.lost_workers = None, None, 0
    if not _waiting_for(session, job.label_set_id):  # else the claimed shards are being labeled, for another arm
        session.execute(
            update(LabelShard)
            .where(LabelShard.label_set_id == job.label_set_id, LabelShard.status == "claimed")
            .values(status="pending", lease_expires_at=None, lost_workers=0)
        )
    _requeue(session, job)
    emit(session, job.id, "job.retried", "Retried: waiting for a worker.")


def lock(session: Session, job: Job) -> None:
    """Lock the job's row and read it anew. Raises NotFound when it has been deleted meanwhile."""
    if session.get(Job, job.id, with_for_update=True, populate_existing=True) is None:
        raise NotFound


def lock_all(session: Session, jobs: Sequence[Job]) -> list[Job]:
    """The rows of several jobs, locked in the order of their ids, as whoever locks several does."""
    query = select(Job).where(Job.id.in_([job.id for job in jobs])).order_by(Job.id).with_for_update()
    return list(session.scalars(query, execution_options={"populate_existing": True}))


def _is_trained_now(job: Job) -> bool:
    return job.lease_expires_at is not None and job.status in HELD


def _requeue(session: Session, job: Job) -> None:
    job.status, job.enqueued_at, job.lease_expires_at, job.worker = "queued", now(), None, None
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


# --- whose turn it is -----------------------------------------------------------------------------------------------


def in_turn(session: Session, task: str, named: str | None = None) -> list[str]:
    """The jobs that wait for a worker, in the order in which one should try to claim them.

    A message says that there is work, not which is next: with the first come first served, one tenant's hundred jobs
    would starve another's one. So each tenant is in line with one job, then each with its second, and so on; the tenant
    with the least work of this kind in workers' hands comes first, and of equals the one whose last turn is longest ago.
    A tenant's own jobs stand in line by age, but for the one that the message has `named`.
    """
    work = _labeling_now() if task == LABEL else _training_now()
    waits = _waits_for_labelers() if task == LABEL else _waits_for_a_trainer()
    place = func.row_number().over(partition_by=Job.tenant, order_by=(Job.id != (named or ""), Job.id))
    line = select(Job.id, Job.tenant, place.label("place")).where(*waits).subquery()
    query = (
        select(line.c.id)
        .outerjoin(work, work.c.tenant == line.c.tenant)
        .outerjoin(TenantTurn, (TenantTurn.tenant == line.c.tenant) & (TenantTurn.task == task))
        .order_by(line.c.place, func.coalesce(work.c.count, 0), TenantTurn.at.nulls_first(), line.c.id)
        .limit(LONGEST_LINE)
    )
    return list(session.scalars(query))


def _labeling_now() -> Subquery:
    live = (LabelShard.status == "claimed") & (LabelShard.lease_expires_at >= func.now())
    joined = select(LabelSet.tenant, func.count().label("count")).join(LabelSet.shards)
    return joined.where(live).group_by(LabelSet.tenant).subquery()


def _training_now() -> Subquery:
    live = Job.status.in_(HELD) & (Job.lease_expires_at >= func.now())
    return select(Job.tenant, func.count().label("count")).where(live).group_by(Job.tenant).subquery()


def _waits_for_labelers() -> tuple[ColumnElement[bool], ...]:
    shards = select(LabelShard.index).where(LabelShard.label_set_id == Job.label_set_id)
    claimed = shards.where(LabelShard.status == "claimed")
    # Where none is open, the job waits for somebody to find that out and send it on to training.
    return (
        Job.status.in_(("queued", "running")),
        or_(Job.phase.is_(None), Job.phase == "labeling"),
        or_(
            shards.where(LabelShard.status == "pending").exists(),
            claimed.where(LabelShard.lease_expires_at < func.now()).exists(),
            ~claimed.exists(),
        ),
    )


def _waits_for_a_trainer() -> tuple[ColumnElement[bool], ...]:
    return (
        Job.status.in_(("queued", "running")),
        Job.phase.in_(PHASES[1:]),
        or_(Job.lease_expires_at.is_(None), Job.lease_expires_at < func.now()),
    )


def _take_turn(session: Session, tenant: str, task: str) -> None:
    moment = func.clock_timestamp()
    statement = insert(TenantTurn).values(tenant=tenant, task=task, at=moment)
    session.execute(statement.on_conflict_do_update(index_elements=["tenant", "task"], set_={"at": moment}))


# --- labeling: many workers, one shard each -------------------------------------------------------------------------


def claim_shard(session: Session, job_id: str, worker: str) -> LabelShard | None:
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
        .where(
            LabelShard.label_set_id == waiting[0].label_set_id,
            or_(
                LabelShard.status == "pending",
                (LabelShard.status == "claimed") & (LabelShard.lease_expires_at < func.now()),
            ),
        )
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
            _fail(session, each, "worker_lost", _suspects(shard))
        return None
    shard.status, shard.attempt, shard.worker = "claimed", shard.attempt + 1, worker
    shard.lease_expires_at = _lease()
    if shard.answered_attempt is None:  # what an earlier attempt has done is counted again, from the cache
        shard.rows_done, shard.tokens, shard.seconds = 0, shard.tokens_in_vain, shard.seconds_in_vain
    session.flush()
    _take_turn(session, waiting[0].tenant, LABEL)
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
    waiting = _waiting_for(session, label_set_id, lock=True)
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
    if not any(job.status in ("queued", "running") for job in _waiting_for(session, label_set_id)):
        raise LeaseLost


def pass_gate(session: Session, label_set_id: str, verdict: dict[str, Any]) -> None:
    """Record what the first rows told of the teacher, once; the first worker to know says so."""
    waiting = _waiting_for(session, label_set_id, lock=True)
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
    for job in _waiting_for(session, label_set_id, lock=True):
        _fail(session, job, code, message, **evidence)


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


def _waiting_for(session: Session, label_set_id: str | None, *, lock: bool = False) -> list[Job]:
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


def renew_shard(session: Session, shard: LabelShard, so_far: dict[str, Any] | None = None) -> str:
    """Keep a shard, and show its rows_done, tokens and seconds. "paused" when every job that needs it is, else "running".

    Raises LeaseLost when it is another's now, or no job needs it any longer.
    """
    jobs = select(Job.id).where(Job.label_set_id == shard.label_set_id)
    needed = jobs.where(Job.status.in_(LABELED)).exists()
    running = jobs.where(Job.status.in_(("queued", "running"))).exists()
    values: dict[str, Any] = {"lease_expires_at": _lease()}
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


def release_shard(session: Session, shard: LabelShard, *, call: bool = False) -> None:
    """Give a shard back unfinished, without counting the attempt as a lost worker; `call` another, if a job runs."""
    if call:
        # A job that was resumed before its shard came back has called its workers too early.
        for job in _waiting_for(session, shard.label_set_id):
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
    for job in _waiting_for(session, label_set_id, lock=True):
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
    for job in _waiting_for(session, label_set_id, lock=True):
        method = JobSpec.model_validate(job.spec).method
        if needs_confidence(method):
            _fail(session, job, "confidence_missing", endpoints.no_confidence(method.kind))


def finish_shard(session: Session, shard: LabelShard, figures: dict[str, Any]) -> None:
    """Record that a shard's file is written. The last one sends the jobs on to training. Raises LeaseLost."""
    waiting = _waiting_for(session, shard.label_set_id, lock=True)
    if not waiting:
        raise LeaseLost
    written = {name: value for name, value in figures.items() if value is not None}
    if "cost" in written:
        written["cost"] = func.coalesce(LabelShard.cost, 0.0) + written["cost"]
    finished = session.execute(
        update(LabelShard)
        .where(
            *_still_held(shard),
        )
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


def fail_shard(session: Session, shard: LabelShard, code: str, message: str) -> None:
    """End the jobs that wait for a shard for what happened to it, unless it has been given to another worker since."""
    waiting = _waiting_for(session, shard.label_set_id, lock=True)
    current = session.get(LabelShard, (shard.label_set_id, shard.index), populate_existing=True)
    if current is None or (current.status, current.attempt) != ("claimed", shard.attempt):
        return
    for job in waiting:
        _fail(session, job, code, message)


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
        job.phase, job.enqueued_at = "training", now()
        phase = session.get(JobPhase, (job.id, "labeling"), populate_existing=True)
        if phase is not None:
            phase.started_at, phase.finished_at = phase.started_at or now(), now()
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
        each.enqueued_at = now()
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
    _requeue(session, job)
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


# --- training: one worker, one attempt ------------------------------------------------------------------------------


def _lease() -> Any:
    return func.now() + timedelta(seconds=settings().lease_seconds)


def claim(session: Session, job_id: str, worker: str) -> Job | None:
    """The job, now this worker's to train; None when it is not waiting for one. A second message is thus harmless."""
    job = session.scalars(
        select(Job)
        .where(Job.id == job_id, *_waits_for_a_trainer())
        # Waits for whoever writes the row just now: to skip it would waste the message, and the sweep sends the next
        # one only after a while.
        .with_for_update()
    ).one_or_none()
    if job is None:
        return None
    if job.lease_expires_at is not None and _lost_a_worker(session, job):
        return None
    job.status, job.attempt, job.worker = "running", job.attempt + 1, worker
    job.lease_expires_at = _lease()
    job.started_at = job.started_at or now()
    emit(session, job.id, "job.claimed", f"Attempt {job.attempt} began.", attempt=job.attempt, worker=worker)
    _take_turn(session, job.tenant, TRAIN)
    session.flush()
    session.refresh(job)
    return job


def renew(session: Session, job_id: str, attempt: int) -> str:
    """Keep a job, and learn its status. Raises LeaseLost."""
    status = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(HELD))
        .values(lease_expires_at=_lease())
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
        emit(session, job.id, "job.paused", "Paused; its state is saved.")
    else:
        _requeue(session, job)
        emit(session, job.id, "job.requeued", "The worker is shutting down; another goes on from the saved state.")


def wait_for_storage(session: Session, job: Job) -> None:
    """The worker of a held job cannot read or write its files: the sweep calls another after a while."""
    if job.status in ("pausing", "cancelling"):
        stop(session, job)
        return
    job.status, job.enqueued_at, job.lease_expires_at, job.worker = "queued", now(), None, None
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
    _fail(session, job, code, message)


def _fail(session: Session, job: Job, code: str, message: str, **evidence: Any) -> None:
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
    _fail(
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
                _requeue(session, job)
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
        open_shards = _claimable_shards(session, job) if labeling else 1
        if open_shards == 0 and _live_shards(session, job):
            continue
        touched += 1
        job.enqueued_at = now()
        enqueue_on_commit(session, task, job.id, copies=max(1, min(open_shards, LABEL_MESSAGES)))
    return touched


def _claimable_shards(session: Session, job: Job) -> int:
    return (
        session.scalar(
            select(func.count())
            .select_from(LabelShard)
            .where(
                LabelShard.label_set_id == job.label_set_id,
                or_(
                    LabelShard.status == "pending",
                    (LabelShard.status == "claimed") & (LabelShard.lease_expires_at < func.now()),
                ),
            )
        )
        or 0
    )


def _live_shards(session: Session, job: Job) -> int:
    return (
        session.scalar(
            select(func.count())
            .select_from(LabelShard)
            .where(
                LabelShard.label_set_id == job.label_set_id,
                LabelShard.status == "claimed",
                LabelShard.lease_expires_at >= func.now(),
            )
        )
        or 0
    )
