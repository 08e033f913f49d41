"""From a language model's raw confidence to the one that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sqlalchemy import Engine, select

from app.config import settings
from app.db import session_scope
from app.models import JobEvent, LabelCache, LabelSet
from app.storage import storage
from tests.llms import tiny_llama
from tests.support import TOPICS, add_dataset, job_of, run, sentences, submit, tiny_spec
from workers import calibration
from workers.labeling import SCHEMA
from workers.pipeline import gather


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job's teacher and labels."""
    tiny_llama(tmp_path / "llama", initializer_range=0.6)
    monkeypatch.setattr(settings(), "model_roots", [tmp_path])
    return {"labels": TOPICS, "teacher": {"kind": "causal_lm", "model": "llama"}}


def labels_of(job_id: str) -> LabelSet:
    with session_scope() as session:
        return session.get_one(LabelSet, job_of(job_id).label_set_id)


def test_a_job_records_the_calibration_and_trains_on_calibrated_confidence(
    database: Engine, llama: dict[str, Any]
) -> None:
    rows, held_out = add_dataset(sentences(60, 1, labeled=False)), add_dataset(sentences(48, 2))
    job = run(submit(tiny_spec(rows, validation_dataset_id=held_out, **llama)))
    assert job.status == "succeeded", job.error
    found = labels_of(job.id).report["calibration"]
    assert found["rows"] == 48
    assert sum(entry["rows"] for entry in found["per_class"].values()) == 48
    assert found["after"]["expected_calibration_error"] < found["before"]["expected_calibration_error"]
    with session_scope() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.type == "training.calibrated")).one()
        raw = {bytes(entry.text_hash): entry.probabilities for entry in session.scalars(select(LabelCache))}
    assert event.data["temperature"] == found["temperature"]

    material = gather(job, storage())
    for split, hashes in (("train", material.hashes("train")), ("validation", material.hashes("validation"))):
        said = np.stack([np.frombuffer(raw[key], "<f4") for key in hashes]).astype(float)
        power = said ** (1 / found["temperature"]) if split == "train" else said
        np.testing.assert_allclose(material.probabilities(split), power / power.sum(axis=1, keepdims=True), atol=1e-5)
        confidence = material.answers[split].column("confidence").to_numpy()
        np.testing.assert_allclose(confidence, material.probabilities(split).max(axis=1), atol=1e-6)


def test_calibrating_otherwise_asks_for_no_label_again(database: Engine, llama: dict[str, Any]) -> None:
    rows, held_out = add_dataset(sentences(30, 1, labeled=False)), add_dataset(sentences(40, 2))
    run(submit(tiny_spec(rows, validation_dataset_id=held_out, **llama)))
    llama["teacher"] |= {"calibrate": "never"}
    job = run(submit(tiny_spec(rows, validation_dataset_id=held_out, **llama)))
    with session_scope() as session:
        shards = list(session.get_one(LabelSet, job.label_set_id).shards)
    assert sum(shard.rows_from_cache for shard in shards) == 70
    assert sum(shard.tokens for shard in shards) == 0
    assert "calibration" not in labels_of(job.id).report


def test_changing_one_word_of_the_prompt_misses_the_cache(database: Engine, llama: dict[str, Any]) -> None:
    rows = add_dataset(sentences(20, 1, labeled=False))
    run(submit(tiny_spec(rows, **llama)))
    llama["teacher"] |= {"instruction": "Say which label fits."}
    job = run(submit(tiny_spec(rows, **llama)))
    with session_scope() as session:
        assert sum(shard.rows_from_cache for shard in session.get_one(LabelSet, job.label_set_id).shards) == 0


def test_a_teacher_that_cannot_be_made_here_fails_the_job_with_its_reason(
    database: Engine, llama: dict[str, Any]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    llama["teacher"] |= {"precision": "int4"}
    job = run(submit(tiny_spec(add_dataset(sentences(20, 1, labeled=False)), **llama)))
    assert job.status == "failed"
    assert job.error["code"] == "quantisation_unavailable"


def test_too_few_validation_rows_give_no_temperature() -> None:
    found = calibration.measure(np.full((40, 2), 0.5, np.float32), ["a"] * 31 + [None] * 9, ["a", "b"])
    assert found["temperature"] is None
    assert found["rows"] == 31


def test_rows_without_an_answer_or_a_known_label_do_not_count() -> None:
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet([1, 1], 50).astype(np.float32)
    gold: list[str | None] = ["a" if row[0] > draw.random() else "b" for row in probabilities]
    expected = calibration.measure(probabilities[:40], gold[:40], ["a", "b"])
    probabilities[40:45] = np.nan
    gold[45:] = ["unknown", None, "unknown", None, None]
    assert calibration.measure(probabilities, gold, ["a", "b"]) == expected


def test_a_row_without_an_answer_stays_without_one() -> None:
    columns = {"row": [0, 1], "distribution": [[0.9, 0.1], None], "confidence": [0.9, None], "source": ["teacher"] * 2,
               "tokens": [1, 1], "error": [None, "why"]}  # fmt: skip
    table = calibration.rescale(pa.table(columns, SCHEMA), 2.0)
    assert table.schema == SCHEMA
    np.testing.assert_allclose(table.column("distribution")[0].as_py(), [0.75, 0.25], atol=1e-6)
    assert table.column("confidence").to_pylist() == [pytest.approx(0.75), None]
    assert table.column("distribution")[1].as_py() is None
