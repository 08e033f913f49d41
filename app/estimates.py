"""What a job would need, told before it starts: rows the cache lacks, tokens, seconds.

By what a worker measured on a few of the rows (app/measurements.py), else at the pace of earlier jobs, else at a guess.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import labels, waves
from app.config import settings
from app.measurements import SAMPLE_ROWS, Found
from app.models import Job, JobPhase, LabelSet, LabelShard
from app.options import TAKD, EndpointTeacher, LLMTeacher, TaughtByEncoder, TeacherAlone
from app.preflight import Plan
from app.storage import Storage

CHARACTERS_PER_TOKEN = 4
DEFAULT_LABEL_ROWS_PER_SECOND = 200.0
DEFAULT_TRAIN_ROWS_PER_SECOND = 60.0
MIN_MEASURED_ROWS = 100
INSTRUCTION_LENGTH = 70
"""Characters of the instruction that is used where the spec gives none."""
ANSWER_TOKENS = 4
"""Of a language model that answers with a label."""


@dataclass
class Need:
    """What the teacher has not said yet."""

    rows: int = 0
    cached: int = 0
    characters: int = 0
    """Of the texts alone."""
    train_rows: list[int] = field(default_factory=list)
    """Numbers of train rows among these, drawn at random, SAMPLE_ROWS at most."""


def need(session: Session, storage: Storage, tenant: str, plan: Plan) -> Need:
    """Count rows and cached rows exactly, in one pass over the texts."""
    found = Need()
    luck = random.Random(0)
    free = plan.spec.teacher.kind == "dataset"
    for split in plan.splits_to_label:
        dataset = plan.datasets[split]
        limit = plan.rows_of(split)
        seen = candidates = 0
        for batch in labels.texts_of(storage, dataset.key):
            batch = batch[: limit - seen]
            hashes = [labels.text_hash(text, pair) for text, pair in batch]
            known = set() if free else set(labels.look_up(session, tenant, plan.fingerprint, hashes))
            missing = [number for number, key in enumerate(hashes) if key not in known]
            found.cached += len(batch) - len(missing)
            found.rows += len(missing)
            found.characters += sum(len(batch[number][0]) + len(batch[number][1] or "") for number in missing)
            for number in missing if split == "train" else ():
                candidates += 1  # reservoir sampling: each so far is in the sample with the same probability
                place = luck.randrange(candidates)
                if len(found.train_rows) < SAMPLE_ROWS:
                    found.train_rows.append(seen + number)
                elif place < SAMPLE_ROWS:
                    found.train_rows[place] = seen + number
            seen += len(batch)
            if seen >= limit:
                break
    return found


def dry_run(session: Session, plan: Plan, need: Need) -> dict[str, Any]:
    """The figures as far as they can be told without a worker: tokens by length, seconds by the rates of earlier jobs."""
    free = plan.spec.teacher.kind == "dataset"
    characters = need.characters + need.rows * _prompt_characters(plan)
    questions = plan.spec.teacher.samples if isinstance(plan.spec.teacher, EndpointTeacher) else 1
    tokens = 0 if free else characters * questions // CHARACTERS_PER_TOKEN
    label_rate, labeling_basis = _label_rate(session, plan.fingerprint)
    to_train, is_measured = training_seconds(session, plan)
    return _with_sums({
        "rows": plan.datasets["train"].rows,
        "rows_to_label": need.rows,
        "rows_cached": need.cached,
        "teacher_tokens": tokens,
        "cost": _cost(plan, tokens, need.rows),
        "labeling_seconds": need.rows / label_rate,
        "labeling_basis": labeling_basis,
        "training_seconds": to_train,
        "training_basis": "earlier_jobs" if is_measured else "default_rate",
        "measured": False,
        "measurement": None,
        "measurement_note": None,
        "labels": [label.name for label in plan.labels],
        "warnings": plan.warnings,
    })  # fmt: skip


def measured(told: dict[str, Any], found: Found) -> dict[str, Any]:
    """The same figures by what a worker measured, where it did."""
    told = told | {"measurement_note": found.note}
    if (sample := found.result) is None:
        return told
    rows = told["rows_to_label"]
    return _with_sums(
        told
        | {
            "teacher_tokens": round(sample["tokens_per_row"] * rows),
            "cost": None if sample["cost"] is None else sample["cost"] / sample["rows"] * rows,
            "labeling_seconds": rows / sample["rows_per_second"],
            "labeling_basis": "sample",
            "measured": True,
            "measurement": sample,
        }
    )


def _with_sums(told: dict[str, Any]) -> dict[str, Any]:
    seconds = {name: round(told[name], 1) for name in ("labeling_seconds", "training_seconds")}
    known = "default_rate" not in (told["labeling_basis"], told["training_basis"])
    return {
        **told,
        **seconds,
        "estimated_seconds": round(told["labeling_seconds"] + told["training_seconds"], 1),
        "estimate_basis": "measured" if known else "default_rates",
    }


def training_seconds(session: Session, plan: Plan) -> tuple[float, bool]:
    """How long training will take, and whether that was measured on earlier jobs."""
    if isinstance(plan.spec.method, TeacherAlone):
        return 0.0, True
    rate, measured = _train_rate(session, plan.spec.method.kind, plan.spec.student.model)
    rows, wish, method = plan.rows_of("train"), plan.spec.labeling.waves, plan.spec.method
    offered = 0
    # With waves, the most it can be: every wave's student is trained anew on all rows so far.
    for end in waves.ends(rows, wish):
        epochs = waves.stretched(plan.spec.training.epochs, end, rows, wish)
        if isinstance(method, TaughtByEncoder):
            epochs += method.epochs_alone(epochs) * (2 if isinstance(method, TAKD) else 1)
        offered += end * epochs
    return offered / rate, measured


def _cost(plan: Plan, tokens: int, rows: int) -> float | None:
    """What an endpoint with a price would be paid; null for other teachers."""
    teacher = plan.spec.teacher
    if not isinstance(teacher, EndpointTeacher):
        return None
    return settings().endpoints[teacher.endpoint].cost(tokens, ANSWER_TOKENS * teacher.samples * rows)


def _prompt_characters(plan: Plan) -> int:
    """What a language model reads before each row: instruction, labels and examples; 0 for other teachers."""
    teacher = plan.spec.teacher
    if not isinstance(teacher, LLMTeacher):
        return 0
    written = [f"- {label.name}: {label.description or ''}" for label in plan.labels]
    candidates = [f"Text: {each.text} {each.text_pair or ''} Label: {each.label}\n" for each in teacher.examples]
    shown = len("".join(candidates))
    if teacher.few_shot is not None and candidates:
        shown = shown * min(teacher.few_shot.count, len(candidates)) // len(candidates)
    return len("\n".join([teacher.instruction or INSTRUCTION_LENGTH * " ", *written])) + shown


def _label_rate(session: Session, fingerprint: str) -> tuple[float, str]:
    """Rows a second of this teacher, over every shard it has labeled here, or a guess; and which of the two."""
    rows, seconds = session.execute(
        select(func.sum(LabelShard.stop - LabelShard.start - LabelShard.rows_from_cache), func.sum(LabelShard.seconds))
        .join(LabelSet, LabelSet.id == LabelShard.label_set_id)
        .where(LabelSet.fingerprint == fingerprint, LabelShard.status == "done")
    ).one()
    if rows and seconds and rows >= MIN_MEASURED_ROWS:
        return float(rows) / seconds, "earlier_jobs"
    return DEFAULT_LABEL_ROWS_PER_SECOND, "default_rate"


def _train_rate(session: Session, method: str, student: str) -> tuple[float, bool]:
    """Offered rows a second of this method and student, over the trainings that have ended here."""
    rows, seconds = session.execute(
        select(func.sum(JobPhase.total), func.sum(func.extract("epoch", JobPhase.finished_at - JobPhase.started_at)))
        .join(Job, Job.id == JobPhase.job_id)
        .where(
            Job.method == method,
            Job.spec["student"]["model"].astext == student,
            JobPhase.name == "training",
            JobPhase.finished_at.is_not(None),
        )
    ).one()
    if rows and seconds and rows >= MIN_MEASURED_ROWS:
        return float(rows) / float(seconds), True
    return DEFAULT_TRAIN_ROWS_PER_SECOND, False
