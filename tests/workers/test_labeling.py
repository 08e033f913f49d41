"""Labeling: what the cache spares the teacher, what a shard's file holds, and how failures are told."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, func, select

from app import lifecycle
from app.config import settings
from app.db import session_scope
from app.models import JobEvent, LabelCache
from app.storage import storage
from tests.support import add_dataset, expire_leases, job_of, label, sentences, shards_of, submit, tiny_spec
from workers import labeling
from workers.labeling import read_labels
from workers.teachers.embedding import EmbeddingTeacher
from workers.teachers.teacher import Row

LABELS = [
    {"name": "cooking", "description": "recipes and kitchen"},
    {"name": "sports", "description": "football and athletics"},
    {"name": "weather", "description": "weather forecast"},
]


@pytest.fixture
def asked(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts the real teacher was asked about, in order."""
    texts: list[str] = []
    answer = EmbeddingTeacher.label

    def spy(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        texts.extend(row.text for row in rows)
        return answer(self, rows)

    monkeypatch.setattr(EmbeddingTeacher, "label", spy)
    yield texts
    labeling._loaded = None


def spec(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return tiny_spec(dataset_id, **{"labels": LABELS, "teacher": {"kind": "embedding"}, **changes})


def labeled(spec: dict[str, Any], tenant: str = "alice") -> str:
    job_id = submit(spec, tenant)
    label(job_id)
    assert job_of(job_id).phase == "training", job_of(job_id).error
    return job_id


def answers(job_id: str, rows: int, split: str = "train") -> list[dict[str, Any]]:
    return read_labels(storage(), shards_of(job_id), split, rows).to_pylist()


def test_a_second_job_on_the_same_rows_asks_the_teacher_nothing(asked: list[str]) -> None:
    dataset = add_dataset(sentences(20, 1, labeled=False))
    first = labeled(spec(dataset))
    assert len(asked) == 20
    asked.clear()
    # Neither the name, nor the student, nor the method changes what the teacher says.
    second = labeled(spec(dataset, name="again", method={"kind": "random"}, metadata={"try": "2"}))
    assert asked == []
    said = [[answer["distribution"] for answer in answers(job, 20)] for job in (first, second)]
    assert said[0] == said[1]
    assert {answer["source"] for answer in answers(first, 20)} == {"teacher"}
    assert {answer["source"] for answer in answers(second, 20)} == {"cache"}
    first_shard, second_shard = shards_of(first)[0], shards_of(second)[0]
    assert (first_shard.rows_from_cache, second_shard.rows_from_cache) == (0, 20)
    assert (first_shard.tokens, first_shard.tokens_saved) == (second_shard.tokens_saved, second_shard.tokens)
    assert first_shard.tokens > 20


def test_the_same_texts_in_another_dataset_are_known_too(asked: list[str]) -> None:
    rows = sentences(12, 1, labeled=False)
    labeled(spec(add_dataset(rows)))
    asked.clear()
    labeled(spec(add_dataset([{"text": "one more"}, *reversed(rows)])))
    assert asked == ["one more"]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [{**LABELS[0], "description": "recipes and kitchens"}, *LABELS[1:]]},
        {"labels": [LABELS[1], LABELS[0], LABELS[2]]},
        {"labels": LABELS[:2]},
        {"teacher": {"kind": "embedding", "template": "about {label}"}},
        {"teacher": {"kind": "embedding", "temperature": 0.1}},
        {"teacher": {"kind": "embedding", "examples": [{"text": "a soup", "label": "cooking"}, {"text": "hail", "label": "weather"}]}},
    ],
    ids=["a word of a description", "order of labels", "a label less", "template", "temperature", "examples"],
)  # fmt: skip
def test_whatever_the_answer_depends_on_makes_the_teacher_be_asked_again(
    asked: list[str], change: dict[str, Any]
) -> None:
    dataset = add_dataset(sentences(6, 1, labeled=False))
    labeled(spec(dataset))
    asked.clear()
    labeled(spec(dataset, **change))
    assert len(asked) == 6


def test_scoring_the_held_out_rows_or_not_is_the_same_teacher(asked: list[str]) -> None:
    dataset = add_dataset(sentences(6, 1, labeled=False))
    labeled(spec(dataset))
    asked.clear()
    labeled(spec(dataset, teacher={"kind": "embedding", "score_held_out": False}))
    assert asked == []


def test_another_tenant_does_not_learn_what_the_first_has_asked(asked: list[str]) -> None:
    rows = sentences(6, 1, labeled=False)
    labeled(spec(add_dataset(rows)))
    asked.clear()
    labeled(spec(add_dataset(rows, "bob")), "bob")
    assert len(asked) == 6


def test_a_text_that_stands_in_a_shard_several_times_is_asked_once(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 4)
    rows = [{"text": text} for text in ["soup", "hail", "soup", "goal", "soup", "hail"]]
    job_id = labeled(spec(add_dataset(rows)))
    assert asked == ["soup", "hail", "goal"]
    said = answers(job_id, 6)
    assert [answer["source"] for answer in said] == ["teacher", "teacher", "cache", "teacher", "cache", "cache"]
    assert said[0]["distribution"] == said[2]["distribution"] == said[4]["distribution"]
    shard = shards_of(job_id)[0]
    assert shard.rows_from_cache == 3
    assert shard.tokens == sum(answer["tokens"] for answer in said)
    assert shard.tokens_saved == 2 * said[0]["tokens"] + said[1]["tokens"]


def test_a_pair_is_another_text_than_its_first_half(asked: list[str]) -> None:
    labeled(spec(add_dataset([{"text": "soup"}, {"text": "hail"}])))
    asked.clear()
    labeled(spec(add_dataset([{"text": "soup", "text_pair": "hail"}, {"text": "hail", "text_pair": "soup"}])))
    assert asked == ["soup", "hail"]


def test_a_labeling_that_breaks_off_asks_only_about_the_rest(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 4)
    job_id = submit(spec(add_dataset(sentences(12, 1, labeled=False))))
    real = EmbeddingTeacher.label

    class Killed(BaseException):
        pass

    def dies(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        if len(asked) == 8:
            raise Killed
        return real(self, rows)

    monkeypatch.setattr(EmbeddingTeacher, "label", dies)
    with pytest.raises(Killed):
        label(job_id)
    assert len(asked) == 8
    monkeypatch.setattr(EmbeddingTeacher, "label", real)
    expire_leases()
    label(job_id)
    assert len(asked) == 12
    assert len(set(asked)) == 12
    assert job_of(job_id).phase == "training"


def test_a_worker_that_shuts_down_gives_its_shard_back(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 4)
    job_id = submit(spec(add_dataset(sentences(12, 1, labeled=False))))
    stopping, real = threading.Event(), EmbeddingTeacher.label

    def then_stop(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        stopping.set()
        return real(self, rows)

    monkeypatch.setattr(EmbeddingTeacher, "label", then_stop)
    labeling.label_job(job_id, "leaving", stopping)
    shard = shards_of(job_id)[0]
    assert (shard.status, shard.lease_expires_at, shard.lost_workers) == ("pending", None, 0)
    monkeypatch.setattr(EmbeddingTeacher, "label", real)
    label(job_id)
    assert len(asked) == 12
    assert job_of(job_id).phase == "training"


def test_an_error_of_the_teacher_fails_the_job_with_its_reason(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        raise RuntimeError("the weights are damaged")

    monkeypatch.setattr(EmbeddingTeacher, "label", breaks)
    job_id = submit(spec(add_dataset(sentences(6, 1, labeled=False))))
    label(job_id)
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["phase"] == "labeling"
    assert "the weights are damaged" in job.error["message"]


def test_a_labeler_that_is_overtaken_leaves_the_new_ones_answers_alone(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(spec(add_dataset(sentences(6, 1, labeled=False)), labeling={"smoke_gate": False}))
    real = EmbeddingTeacher.label

    def overtaken(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        monkeypatch.setattr(EmbeddingTeacher, "label", real)
        expire_leases()
        label(job_id, "heir")
        raise RuntimeError("too late to matter")

    monkeypatch.setattr(EmbeddingTeacher, "label", overtaken)
    label(job_id, "late")
    job = job_of(job_id)
    assert (job.status, job.phase, job.error) == ("running", "training", None)
    assert [(shard.status, shard.worker, shard.attempt) for shard in shards_of(job_id)] == [("done", "heir", 2)]


def test_the_datasets_own_labels_are_read_and_never_cached(database: Engine) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": "sports"},
        {"text": "b", "label": "weather", "confidence": 0.7},
        {"text": "c", "distribution": {"sports": 0.25, "weather": 0.75}},
        {"text": "d"},
    ]
    job_id = submit(tiny_spec(add_dataset(rows), teacher={"kind": "dataset", "default_confidence": 0.9}))
    label(job_id)
    said = answers(job_id, 4)
    expected = [[0.9, 0.1], [0.3, 0.7], [0.25, 0.75]]
    assert np.allclose([answer["distribution"] for answer in said[:3]], expected)
    assert np.allclose([answer["confidence"] for answer in said[:3]], [0.9, 0.7, 0.75])
    assert said[3]["distribution"] is None
    assert said[3]["error"] == "row has no label"
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(LabelCache)) == 0


def test_answers_of_many_shards_come_back_in_row_order(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 3)
    rows = sentences(11, 1)
    job_id = submit(tiny_spec(add_dataset(rows), budget={"max_labeled_rows": 8}))
    label(job_id)
    said = answers(job_id, 11)
    assert [answer["row"] for answer in said] == list(range(11))
    names = sorted({row["label"] for row in rows})
    found = [names[int(np.argmax(answer["distribution"]))] for answer in said[:8]]
    assert found == [row["label"] for row in rows[:8]]
    assert {answer["error"] for answer in said[8:]} == {"beyond the labeling budget"}


def test_a_part_names_its_columns_and_one_of_an_older_version_is_read_too(database: Engine) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(8, 0))))
    label(job_id)
    [shard] = shards_of(job_id)
    with storage().open(shard.key) as stream:
        part = pq.read_table(stream)
    assert part.column_names[:4] == ["row", "distribution", "confidence", "source"]
    said = answers(job_id, 8)
    with tempfile.TemporaryDirectory() as directory:
        older = Path(directory) / "part.parquet"
        pq.write_table(part.rename_columns(["row", "probabilities", *part.column_names[2:]]), older)
        storage().put(shard.key, older)
    assert answers(job_id, 8) == said


def test_a_cancelled_labeling_stops_at_its_next_heartbeat(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 2)
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    job_id = submit(spec(add_dataset(sentences(12, 1, labeled=False))))
    real = EmbeddingTeacher.label

    def cancelled(self: EmbeddingTeacher, rows: list[Row]) -> Any:
        if len(asked) == 4:
            with session_scope() as session:
                job = session.get_one(type(job_of(job_id)), job_id)
                lifecycle.cancel(session, job)
            threading.Event().wait(0.5)
        return real(self, rows)

    monkeypatch.setattr(EmbeddingTeacher, "label", cancelled)
    label(job_id)
    assert 4 <= len(asked) <= 6
    assert job_of(job_id).status == "cancelled"
    with session_scope() as session:
        last = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq.desc())).first()
        assert last is not None
        assert last.type == "job.cancelled"
