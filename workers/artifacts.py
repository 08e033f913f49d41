"""The files a worker reads and leaves behind: dataset rows, the samples ledger, the checkpoint with its card."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app import ledger, predictions, records, spool
from app.models import Checkpoint, Dataset, Job, new_id
from app.storage import Storage, sha256_of
from workers.model_card import model_card
from workers.teachers.teacher import Row
from workers.training.encoders import Student, save_student
from workers.training.run import LEDGER_REASONS, Ledger

LEDGER_GROUP_ROWS = 10_000


def read_rows(files: Storage, dataset: Dataset, start: int, stop: int) -> list[Row]:
    """Rows `start` to `stop` (exclusive) of a dataset, as a teacher wants them."""
    with files.open(dataset.key) as stream:
        entries = records.read_rows(stream, start, stop).to_pylist()
    return [
        Row(
            entry["text"], entry["text_pair"], entry["label"], entry["confidence"],
            dict(entry["distribution"]) if entry["distribution"] is not None else None,
        )
        for entry in entries
    ]  # fmt: skip


def rows_at(files: Storage, dataset: Dataset, numbers: Sequence[int]) -> list[Row]:
    """The texts of the rows of these numbers, in this order, as a teacher wants them."""
    with files.open(dataset.key) as stream:
        entries = records.rows_at(stream, numbers, ["text", "text_pair"])
    return [Row(entry["text"], entry["text_pair"]) for entry in entries]


def read_table(files: Storage, dataset: Dataset) -> pa.Table:
    """The texts, labels and line numbers of a whole dataset."""
    with files.open(dataset.key) as stream:
        return pq.read_table(stream, columns=["text", "text_pair", "label", "line"])


def write_ledger(
    files: Storage, job_id: str, rows: pa.Table, answers: pa.Table, happened: Ledger, labels: Sequence[str],
    offered_rows: NDArray[np.int64], feedback_rows: NDArray[np.int64] | None = None,
    confirm: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Store the samples ledger as it stands: one row for each of the N train rows, as app.ledger.SCHEMA.

    `confirm` as in Storage.put.
    """
    count = rows.num_rows
    probabilities = answers.column("distribution").combine_chunks()
    confidence = answers.column("confidence").to_numpy(zero_copy_only=False).astype(np.float32)
    labeled = np.asarray(probabilities.is_valid())
    names: list[str | None] = [None] * count
    dense = np.asarray(probabilities.drop_null().flatten(), np.float32).reshape(-1, len(labels))
    for row, best in zip(np.flatnonzero(labeled), dense.argmax(axis=1), strict=True):
        names[row] = labels[best]
    in_pool = np.zeros(count, bool)
    in_pool[offered_rows] = True
    reasons = happened.reason.astype(np.int64)
    reasons[~in_pool] = LEDGER_REASONS.index("held_back")
    if feedback_rows is not None:
        reasons[feedback_rows] = LEDGER_REASONS.index("feedback")
    reasons[~labeled] = LEDGER_REASONS.index("not_labeled")
    columns: dict[str, Any] = {
        "row": np.arange(count),
        "line": rows.column("line"),
        "text": rows.column("text"),
        "text_pair": rows.column("text_pair"),
        "label": pa.array(names, pa.string()),
        "confidence": pa.array(confidence, pa.float32(), mask=~labeled),
        "distribution": answers.column("distribution"),
        "source": answers.column("source"),
        "offered": happened.offered,
        "selected": happened.selected,
        "decision": pa.array(np.where(happened.selected > 0, "selected", "rejected").tolist(), pa.string()),
        "reason": pa.array(np.array(LEDGER_REASONS)[reasons].tolist(), pa.string()),
        "error": answers.column("error"),
        **_influence(happened, labels),
    }
    for name, values in (
        ("teacher_threshold", happened.teacher_threshold),
        ("student_threshold", happened.student_threshold),
        ("student_uncertainty", happened.uncertainty),
    ):
        columns[name] = pa.array(values, pa.float32(), mask=np.isnan(values))
    table = pa.table({name: columns[name] for name in ledger.SCHEMA.names}).cast(ledger.SCHEMA)
    with spool.directory() as directory:
        path = directory / "samples.parquet"
        pq.write_table(table, path, row_group_size=LEDGER_GROUP_ROWS, compression="zstd")
        files.put(ledger.key(job_id), path, confirm=confirm)


def write_predictions(
    files: Storage, job_id: str, gold: Sequence[str | None], labels: Sequence[str], student: NDArray[np.float32],
    teacher: NDArray[np.float32] | None, confirm: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Store what student and teacher say about each of the N test rows that has a true label, as app.predictions.SCHEMA.

    student, teacher: (N, C) distributions; the teacher's are NaN where it gave no answer. `confirm` as in Storage.put.
    """
    known = [row for row, name in enumerate(gold) if name is not None]

    def names(probabilities: NDArray[np.float32]) -> pa.Array:
        answered = ~np.isnan(probabilities[known, 0])
        best = probabilities[known].argmax(axis=1)
        chosen = [labels[index] if ok else None for index, ok in zip(best, answered, strict=True)]
        return pa.array(chosen, pa.string()).dictionary_encode()

    table = pa.table(
        {
            "row": np.array(known, np.int64),
            "gold": pa.array([gold[row] for row in known], pa.string()).dictionary_encode(),
            "student": names(student),
            "confidence": student[known].max(axis=1),
            "teacher": names(np.full_like(student, np.nan) if teacher is None else teacher),
        }
    ).cast(predictions.SCHEMA)
    with spool.directory() as directory:
        path = directory / "predictions.parquet"
        pq.write_table(table, path, compression="zstd")
        files.put(predictions.key(job_id), path, confirm=confirm)


def _influence(happened: Ledger, labels: Sequence[str]) -> dict[str, Any]:
    """The columns of the methods that measure influence; empty for the others."""
    trend = happened.influence
    known = ~np.isnan(trend)
    counts = known.sum(axis=1)
    mean = np.where(known, trend, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(counts, 1)
    columns: dict[str, Any] = {"influence": pa.array(mean, pa.float32(), mask=counts == 0)}
    places = pa.array(np.arange(len(trend) + 1) * trend.shape[1], pa.int32())
    values = pa.array(trend.ravel(), pa.float32(), mask=~known.ravel())
    columns["influence_trend"] = pa.ListArray.from_arrays(places, values, mask=pa.array(counts == 0))
    for part in ("student", "encoder_teacher"):
        indices, confidence = getattr(happened, f"{part}_label"), getattr(happened, f"{part}_confidence")
        names = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int16(), mask=indices < 0), pa.array(list(labels)))
        columns[f"{part}_label"] = names.cast(pa.string())
        columns[f"{part}_confidence"] = pa.array(confidence, pa.float32(), mask=np.isnan(confidence))
    return columns


def publish_checkpoint(
    files: Storage, job: Job, dataset: Dataset, student: Student, *, step: int, epoch: float, metrics: dict[str, Any],
    evaluation: dict[str, Any], selection: dict[str, Any], teacher: dict[str, Any],
    label_report: dict[str, Any] | None, waves: dict[str, Any] | None, check: Callable[[], None],
) -> Checkpoint:  # fmt: skip
    """Pack the student as one tar and store it. The row that is returned is for the caller to add: file first.

    `check` is called between the steps, which take long for a large student; what it raises ends the work.

    The tar holds, at its top, model.safetensors, config.json, the tokenizer, README.md (the model card), metrics.json,
    calibration.json and manifest.json with the SHA-256 of every other file.
    """
    checkpoint_id = new_id("ckpt")
    with spool.directory() as place:
        folder = place / "checkpoint"
        folder.mkdir()
        save_student(student, folder)
        check()
        facts = {
            "checkpoint_id": checkpoint_id, "job_id": job.id, "step": step, "epoch": epoch, "metrics": metrics,
            "evaluation": evaluation, "selection": selection, "teacher": teacher, "label_report": label_report,
            "waves": waves,
            "spec": _fit_to_pass_on(job.spec),
            "dataset": {"id": dataset.id, "sha256": dataset.sha256, "rows": dataset.rows},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        (folder / "calibration.json").write_text(json.dumps(_calibration(evaluation["calibration"]), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(facts, student.source))
        (folder / "manifest.json").write_text(json.dumps({"files": _digests(folder)}, indent=2) + "\n")
        digests = _digests(folder)
        check()
        packed = place / "checkpoint.tar"
        _pack(folder, packed)
        check()
        checkpoint = Checkpoint(
            id=checkpoint_id, tenant=job.tenant, job_id=job.id, step=step, epoch=epoch, metrics=metrics,
            bytes=packed.stat().st_size, sha256=sha256_of(packed), files=digests,
        )  # fmt: skip
        check()
        files.put(checkpoint.key, packed)
    return checkpoint


def _fit_to_pass_on(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as it may be passed on with a checkpoint: no webhook's URL, and the teacher's examples counted, not told."""
    told = {name: value for name, value in spec.items() if name != "webhook"}
    if examples := spec["teacher"].get("examples"):
        told["teacher"] = {**spec["teacher"], "examples": f"{len(examples)} examples"}
    return told


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    """What a program needs to abstain as the student should; app/predict.py reads it."""
    return {name: found[name] for name in ("temperature", "threshold", "target_accuracy", "source", "rows")}


def _digests(folder: Path) -> list[dict[str, Any]]:
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    ]


def _pack(folder: Path, target: Path) -> None:
    """A tar that depends on the files alone: no owners, no times."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime, entry.mode = 0, 0o644
        return entry

    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=anonymous)
