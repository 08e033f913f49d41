"""What a job would need, told before it starts: rows the cache lacks, tokens, seconds at the pace of earlier jobs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import labels
from app.config import settings
from app.models import Job, JobPhase, LabelSet, LabelShard
from app.options import TAKD, EndpointTeacher, LLMTeacher, TeacherAlone, TeacherFirst
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


def dry_run(session: Session, storage: Storage, tenant: str, plan: Plan) -> dict[str, Any]:
    """Count rows and cached rows exactly; tokens by length; seconds by the rates of earlier jobs where there are any."""
    to_label = cached = characters = 0
    free = plan.spec.teacher.kind == "dataset"
    for split in plan.splits_to_label:
        dataset = plan.datasets[split]
        limit = dataset.rows
        if split == "train" and plan.spec.budget.max_labeled_rows is not None:
            limit = min(limit, plan.spec.budget.max_labeled_rows)
        seen = 0
        for batch in labels.texts_of(storage, dataset):
            batch = batch[: limit - seen]
            seen += len(batch)
            hashes = [labels.text_hash(text, pair) for text, pair in batch]
            known = set() if free else set(labels.look_up(session, tenant, plan.fingerprint, hashes))
            missing = [row for row, key in zip(batch, hashes, strict=True) if key not in known]
            cached += len(batch) - len(missing)
            to_label += len(missing)
            characters += sum(len(text) + len(pair or "") for text, pair in missing)
            if seen >= limit:
                break
    characters += to_label * _prompt_characters(plan)
    questions = plan.spec.teacher.samples if isinstance(plan.spec.teacher, EndpointTeacher) else 1
    tokens = 0 if free else characters * questions // CHARACTERS_PER_TOKEN
    label_rate, label_measured = _label_rate(session, plan.fingerprint)
    to_train, train_measured = training_seconds(session, plan)
    seconds = to_label / label_rate + to_train
    return {
        "rows": plan.datasets["train"].rows,
        "rows_to_label": to_label,
        "rows_cached": cached,
        "teacher_tokens": tokens,
        "cost": _cost(plan, tokens, to_label),
        "estimated_seconds": round(seconds, 1),
        "estimate_basis": "measured" if label_measured and train_measured else "default_rates",
        "labels": [label.name for label in plan.labels],
        "warnings": plan.warnings,
    }


def training_seconds(session: Session, plan: Plan) -> tuple[float, bool]:
    """How long training will take, and whether that was measured on earlier jobs."""
    if isinstance(plan.spec.method, TeacherAlone):
        return 0.0, True
    rate, measured = _train_rate(session, plan.spec.method.kind, plan.spec.student.model)
    epochs, method = plan.spec.training.epochs, plan.spec.method
    if isinstance(method, TeacherFirst):
        epochs += (method.teacher_epochs or epochs) * (2 if isinstance(method, TAKD) else 1)
    return plan.datasets["train"].rows * epochs / rate, measured


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
    shown = [f"Text: {example.text} {example.text_pair or ''} Label: {example.label}" for example in teacher.examples]
    return len("\n".join([teacher.instruction or INSTRUCTION_LENGTH * " ", *written, *shown]))


def _label_rate(session: Session, fingerprint: str) -> tuple[float, bool]:
    """Rows a second of this teacher, over every shard it has labeled here."""
    rows, seconds = session.execute(
        select(func.sum(LabelShard.stop - LabelShard.start - LabelShard.rows_from_cache), func.sum(LabelShard.seconds))
        .join(LabelSet, LabelSet.id == LabelShard.label_set_id)
        .where(LabelSet.fingerprint == fingerprint, LabelShard.status == "done")
    ).one()
    if rows and seconds and rows >= MIN_MEASURED_ROWS:
        return float(rows) / seconds, True
    return DEFAULT_LABEL_ROWS_PER_SECOND, False


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
