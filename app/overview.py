"""A job as its owner sees it: how far it has come, how long it will take, and what labeling has cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, String, Table, any_, bindparam, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session, lazyload
from sqlalchemy.orm.attributes import set_committed_value

from app.models import Job, JobPhase, LabelSet, LabelShard, now

PHASE_WEIGHTS = {"labeling": 0.25, "training": 0.6, "evaluating": 0.1, "packaging": 0.05}


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
