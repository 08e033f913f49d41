"""Comparisons: several methods, each with several seeds, as jobs that share splits and labels; and the table they make.

Jobs whose teacher and rows are the same share one label set, so labeling is done once; from then on every job is a job
like any other. The table is computed from the jobs' rows and from their answers on the test set, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app import estimates, lifecycle, overview, predictions, preflight, statistics
from app.config import Settings
from app.errors import Fault, IllegalMove, InvalidSpec, field_faults
from app.models import TERMINAL, Comparison, Job, LabelSet, new_id, now
from app.options import Arm, ComparisonSpec, FeedsBack, JobSpec
from app.preflight import Faults, Plan
from app.storage import Storage

SHARED_BY_ALL = ("seed", "split_seed", "validation_share", "near_duplicates")
"""Training options that decide what a run is scored on, or that `seeds` names."""
MAX_RUNS = 256
ALONE = "teacher_alone"
"""The method whose row holds the teacher's scores."""


@dataclass(frozen=True)
class Plans:
    """What a checked comparison amounts to."""

    spec: ComparisonSpec
    plans: list[Plan]
    """One for each arm, with its first seed."""

    @property
    def warnings(self) -> list[dict[str, str]]:
        """Every arm's, each once."""
        found: list[dict[str, str]] = []
        for plan in self.plans:
            found += [warning for warning in plan.warnings if warning not in found]
        return found


# --- asking for one -------------------------------------------------------------------------------------------------


def job_specs(spec: ComparisonSpec) -> list[JobSpec]:
    """The job of each arm with its first seed. Raises InvalidSpec with pointers into the comparison."""
    faults = Faults()
    _check_shared(spec, faults)
    specs = []
    for position, arm in enumerate(spec.arms):
        try:
            specs.append(_job_spec(spec, arm))
        except ValidationError as error:
            faults += [_moved(fault, position, arm) for fault in field_faults(error.errors())]
    faults.refuse()
    return specs


def _check_shared(spec: ComparisonSpec, faults: Faults) -> None:
    if spec.labeling.waves is not None:
        faults.note(
            "/labeling/waves", "shared_by_all_arms",
            "the runs of a comparison share their labels, so no student can decide how many there are; leave it out",
        )  # fmt: skip
    if "seed" in spec.training.model_fields_set:
        faults.note("/training/seed", "shared_by_all_arms", "name the seeds in `seeds`, once for all arms")
    for position, arm in enumerate(spec.arms):
        for name in sorted(set(arm.training) & set(SHARED_BY_ALL)):
            place = "`seeds`" if name == "seed" else "the comparison's `training`"
            faults.note(
                f"/arms/{position}/training/{name}", "shared_by_all_arms",
                f"must be the same for all arms, or their scores cannot be compared; say it in {place}",
            )  # fmt: skip
    if (runs := len(spec.arms) * len(spec.seeds)) > MAX_RUNS:
        faults.note("/arms", "too_many_runs", f"arms x seeds are {runs} runs; at most {MAX_RUNS} are made")


def _job_spec(spec: ComparisonSpec, arm: Arm) -> JobSpec:
    split_seed = spec.seeds[0] if spec.training.split_seed is None else spec.training.split_seed
    feeds_back = any(isinstance(each.method, FeedsBack) for each in spec.arms)
    splits = {
        "split_seed": split_seed,
        "near_duplicates": "apart" if feeds_back else spec.training.near_duplicates,
    }
    shared = ("validation_dataset_id", "test_dataset_id", "metadata")
    whole = spec.model_dump(mode="json")
    return JobSpec.model_validate(
        {
            **{name: whole[name] for name in shared},
            "labels": whole["labels"],
            "budget": whole["budget"],
            "labeling": whole["labeling"],
            "dataset_id": arm.dataset_id or spec.dataset_id,
            "teacher": (arm.teacher or spec.teacher).model_dump(mode="json"),
            "method": arm.method.model_dump(mode="json"),
            "student": {**whole["student"], **arm.student},
            "training": {**whole["training"], **arm.training, "seed": spec.seeds[0], **splits},
            "name": f"{spec.name or 'comparison'}: {arm.name}, seed {spec.seeds[0]}"[:200],
        }
    )


def check(session: Session, tenant: str, spec: ComparisonSpec, settings: Settings) -> Plans:
    """The plans of a comparison whose jobs can all succeed. Raises InvalidSpec with every reason why they cannot."""
    faults = Faults()
    preflight.check_webhook(spec.webhook, settings, faults)
    plans = []
    for position, (arm, job_spec) in enumerate(zip(spec.arms, job_specs(spec), strict=True)):
        try:
            plans.append(preflight.check(session, tenant, job_spec, settings))
        except InvalidSpec as error:
            moved = [_moved(fault, position, arm) for fault in error.errors]
            faults += [fault for fault in moved if fault not in faults]
    faults.refuse()
    return Plans(spec, plans)


def _moved(fault: Fault, position: int, arm: Arm) -> Fault:
    """A fault of an arm's job, with a pointer to where the comparison says it."""
    parts = (fault["pointer"] or "").split("/")[1:]
    own = (
        parts[:1] == ["method"]
        or (parts[:1] == ["dataset_id"] and arm.dataset_id is not None)
        or (parts[:1] == ["teacher"] and arm.teacher is not None)
        or (len(parts) > 1 and parts[0] in ("student", "training") and parts[1] in getattr(arm, parts[0]))
    )
    return {**fault, "pointer": f"/arms/{position}{fault['pointer']}"} if own else fault


def _labels_key(plan: Plan) -> tuple[Any, ...]:
    """Equal for arms that can share their labels."""
    return plan.fingerprint, *((split, plan.datasets[split].id) for split in plan.splits_to_label)


def dry_run(session: Session, storage: Storage, tenant: str, plans: Plans) -> dict[str, Any]:
    """As a job's, for all runs together: each set of labels is counted once."""
    sets: dict[tuple[Any, ...], dict[str, Any]] = {}
    for plan in plans.plans:
        if (key := _labels_key(plan)) not in sets:
            sets[key] = estimates.dry_run(session, plan, estimates.need(session, storage, tenant, plan))
    told = list(sets.values())
    counts = ("rows_to_label", "rows_cached", "teacher_tokens", "labeling_seconds")
    sums = {name: sum(entry[name] for entry in told) for name in counts}
    costs = [entry["cost"] for entry in told if entry["cost"] is not None]
    trained = [estimates.training_seconds(session, plan) for plan in plans.plans]
    training = len(plans.spec.seeds) * sum(seconds for seconds, _ in trained)
    is_guess = {
        "labeling_basis": any(entry["labeling_basis"] == "default_rate" for entry in told),
        "training_basis": not all(is_known for _, is_known in trained),
    }
    return {
        **told[0],
        **sums,
        "cost": sum(costs) if costs else None,
        "training_seconds": round(training, 1),
        "estimated_seconds": round(sums["labeling_seconds"] + training, 1),
        **{name: "default_rate" if guess else "earlier_jobs" for name, guess in is_guess.items()},
        "estimate_basis": "default_rates" if any(is_guess.values()) else "measured",
        "measurement_note": "Comparisons are not measured; ask for a dry run of one of their jobs.",
        "warnings": plans.warnings,
    }


def submit(session: Session, tenant: str, plans: Plans) -> Comparison:
    """Store the comparison and its jobs, one for each arm and seed."""
    spec = plans.spec
    comparison = Comparison(
        id=new_id("cmp"), tenant=tenant, name=spec.name, spec=spec.model_dump(mode="json"), metadata_=spec.metadata,
        warnings=plans.warnings,
    )  # fmt: skip
    session.add(comparison)
    session.flush()
    shared: dict[tuple[Any, ...], LabelSet] = {}
    for seed in spec.seeds:  # one seed of everything first: a comparison that is cancelled half-way is still a table
        for arm, plan in zip(spec.arms, plans.plans, strict=True):
            name = f"{spec.name or comparison.id}: {arm.name}, seed {seed}"[:200]
            training = plan.spec.training.model_copy(update={"seed": seed})
            its_plan = replace(plan, spec=plan.spec.model_copy(update={"training": training, "name": name}))
            key = _labels_key(plan)
            job = lifecycle.submit(
                session, tenant, its_plan, shared=shared.get(key), comparison_id=comparison.id, arm=arm.name
            )
            shared[key] = job.label_set
    session.refresh(comparison)
    return comparison


def cancel(session: Session, comparison: Comparison) -> None:
    """End every run that has not ended. Raises IllegalMove when all have."""
    jobs = lifecycle.lock_all(session, comparison.jobs)
    if all(lifecycle.is_terminal(job) for job in jobs) and not any(job.status == "cancelled" for job in jobs):
        raise IllegalMove("Every run of this comparison has ended; there is nothing to cancel.")
    for job in jobs:
        if not lifecycle.is_terminal(job):
            lifecycle.cancel(session, job)


# --- how it stands --------------------------------------------------------------------------------------------------


def status(jobs: Sequence[Job]) -> str:
    """One word for several jobs. Ended with at least one success is `succeeded`: what failed stands in the table."""
    found = {job.status for job in jobs}
    if found <= set(TERMINAL):
        return lifecycle.joint_end(found)
    live = found - set(TERMINAL)
    if live == {"paused"}:
        return "paused"
    return "queued" if found == {"queued"} else "running"


def progress(jobs: Sequence[Job]) -> float:
    """From 0 to 1, the mean over the runs; a run that has failed or was cancelled has nothing left to do."""
    parts = [1.0 if lifecycle.is_terminal(job) else overview.progress(job) for job in jobs]
    return round(sum(parts) / len(parts), 4)


def eta_seconds(jobs: Sequence[Job]) -> float | None:
    """Seconds until the last run ends, by the pace so far; null while there is no pace, and at the end."""
    fraction, began = progress(jobs), [job.started_at for job in jobs if job.started_at]
    if status(jobs) != "running" or not began or fraction < 0.02:
        return None
    return round((now() - min(began)).total_seconds() * (1 - fraction) / fraction, 1)


# --- the table ------------------------------------------------------------------------------------------------------


def table(storage: Storage, comparison: Comparison) -> dict[str, Any]:
    """The arms in order with their runs and scores, and the teacher's own scores."""
    jobs = comparison.jobs
    names = [arm["name"] for arm in comparison.spec["arms"]]
    runs = {name: [job for job in jobs if job.arm == name] for name in names}
    ranks = _ranks(runs)
    return {
        "teacher": _teacher(
            [job for arm in comparison.spec["arms"] if not arm["teacher"] for job in runs[arm["name"]]]
        ),
        "arms": [
            {
                **_row(name, runs[name]),
                "method": arm["method"]["kind"],
                "rank": ranks.get(name),
                "teacher": _teacher(runs[name]) if arm["teacher"] and arm["method"]["kind"] != ALONE else None,
                "difference": None if name == names[0] else _difference(storage, runs[names[0]], runs[name]),
            }
            for name, arm in zip(names, comparison.spec["arms"], strict=True)
        ],
    }


def _row(name: str, jobs: Sequence[Job]) -> dict[str, Any]:
    runs = [_run(job) for job in jobs]
    done = [run for run in runs if run["status"] == "succeeded"]
    row: dict[str, Any] = {"name": name, "status": status(jobs), "progress": progress(jobs), "runs": runs}
    for figure in ("accuracy", "macro_f1"):
        known = [run[figure] for run in done if run[figure] is not None]
        mean, deviation = statistics.spread(known) if known else (None, None)
        is_drawn = jobs[0].method != ALONE  # no seed changes what a teacher says
        row[figure] = {"mean": mean, "sd": deviation if is_drawn else None, "runs": len(known)}
    for figure in ("seen", "selected", "share", "seconds"):
        known = [run[figure] for run in done if run[figure] is not None]
        row[figure] = sum(known) / len(known) if known else None
    row["gpu_memory_bytes"] = max((run["gpu_memory_bytes"] for run in done if run["gpu_memory_bytes"]), default=None)
    return row


def _run(job: Job) -> dict[str, Any]:
    scores = _scores(job, "student") or {}
    selection = job.selection or {}
    return {
        "seed": job.spec["training"]["seed"],
        "job_id": job.id,
        "status": job.status,
        "progress": overview.progress(job),
        "error": job.error,
        "accuracy": scores.get("accuracy"),
        "macro_f1": scores.get("macro_f1"),
        "seen": selection.get("seen"),
        "selected": selection.get("selected"),
        "share": selection.get("ratio"),
        "seconds": job.metrics.get("training_seconds"),
        "gpu_memory_bytes": job.metrics.get("gpu_memory_bytes"),
    }


def _scores(job: Job, model: str) -> dict[str, Any] | None:
    if job.method == ALONE:
        model = "teacher"
    scores: dict[str, Any] | None = ((job.evaluation or {}).get("test") or {}).get(model)
    return scores


def _teacher(jobs: Sequence[Job]) -> dict[str, Any] | None:
    """The scores on the test set of the teacher that these jobs have in common, once a run has looked at them."""
    scores = next((scores for job in jobs if (scores := _scores(job, "teacher"))), None)
    names = ("accuracy", "accuracy_interval", "macro_f1", "macro_f1_interval")
    return scores and {name: scores[name] for name in names}


def _ranks(runs: dict[str, list[Job]]) -> dict[str, float]:
    """By macro-F1, averaged over the seeds that every arm has finished; arms of which no run can succeed are left out."""
    scores = {
        name: _macro_f1_by_seed(jobs) for name, jobs in runs.items() if status(jobs) not in ("failed", "cancelled")
    }
    seeds = sorted(set.intersection(*(set(each) for each in scores.values()))) if len(scores) > 1 else []
    if not seeds:
        return {}
    blocks = [[each[seed] for each in scores.values()] for seed in seeds]
    return dict(zip(scores, statistics.average_ranks(blocks), strict=True))


def _macro_f1_by_seed(jobs: Sequence[Job]) -> dict[int, float]:
    scored = [(job, _scores(job, "student")) for job in jobs if job.status == "succeeded"]
    return {job.spec["training"]["seed"]: scores["macro_f1"] for job, scores in scored if scores}


def _difference(storage: Storage, first: Sequence[Job], other: Sequence[Job]) -> dict[str, Any] | None:
    """Paired bootstrap of an arm against the first one, over the seeds that both have finished."""
    answered = [
        {job.spec["training"]["seed"]: job for job in jobs if job.status == "succeeded" and _scores(job, "student")}
        for jobs in (first, other)
    ]
    seeds = sorted(answered[0].keys() & answered[1].keys())
    if not seeds:
        return None
    # A job that is tried again answers anew, so its attempt is part of what names its answers.
    firsts, others = (tuple((jobs[seed].id, jobs[seed].attempt) for seed in seeds) for jobs in answered)
    return _bootstrapped(storage, firsts, others)


Answered = tuple[tuple[str, int], ...]


@lru_cache(maxsize=1024)
def _bootstrapped(storage: Storage, first: Answered, other: Answered) -> dict[str, Any] | None:
    tables = [_answers(storage, job_id) for job_id, _ in (*first, *other)]
    if any(table is None or table.num_rows != tables[0].num_rows for table in tables):  # type: ignore[union-attr]
        return None
    names = pc.unique(pa.concat_arrays([_column(table, name) for table in tables for name in ("gold", "student")]))
    gold, *answers = (
        np.asarray(pc.index_in(_column(table, name), names), np.int64)
        for table, name in [(tables[0], "gold"), *((table, "student") for table in tables)]
    )
    outcome = statistics.paired_bootstrap(gold, answers[: len(first)], answers[len(first) :])
    return {
        "seeds": len(first),
        **{name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in outcome.items()},
    }


def _answers(storage: Storage, job_id: str) -> pa.Table | None:
    try:
        with storage.open(predictions.key(job_id)) as stream:
            return predictions.read(stream)
    except FileNotFoundError:
        return None


def _column(table: Any, name: str) -> pa.Array:
    return table.column(name).combine_chunks().cast(pa.string())
