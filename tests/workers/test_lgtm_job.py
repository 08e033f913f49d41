"""A job with an encoder teacher, from the upload to the ledger: its splits, its series, what is kept of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from app import main
from app.db import session_scope
from app.models import JobEvent, JobMetric
from tests.support import add_dataset, new_key, run, sentences, submit, tiny_spec
from workers.training.run import TREND_POINTS, Ledger, Measured

TEACHER = {"model": "scratch", "num_layers": 2, "hidden_size": 32, "vocab_size": 300, "max_length": 24}


def spec(method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tiny_spec(
        add_dataset(sentences(40, 1)), validation_dataset_id=add_dataset(sentences(12, 2)),
        test_dataset_id=add_dataset(sentences(12, 3)), method={"teacher": TEACHER, **method},
        training={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3}, **changes,
    )  # fmt: skip


def series(job_id: str) -> dict[str, list[float | None]]:
    with session_scope() as session:
        points = session.scalars(select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step))
        found: dict[str, list[float | None]] = {}
        for point in points:
            found.setdefault(point.name, []).append(point.value)
        return found


def test_a_job_keeps_the_influence_of_every_row_it_trained_on(database: Engine) -> None:
    job = run(submit(spec({"kind": "lgtm", "feedback_share": 0.2})))
    assert (job.status, job.error) == ("succeeded", None)
    with session_scope() as session:
        event = session.scalar(select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.type == "training.feedback"))
        assert event is not None
        assert event.data == {"rows": 8, "source": "train"}
    assert job.selection is not None
    assert (job.selection["seen"], job.selection["selected"]) == (64, 64)
    found = series(job.id)
    for name in ("teacher_loss", "feedback_loss", "influence_mean", "influence_p10", "influence_negative"):
        assert len(found[name]) == 8, name
        assert all(value is not None for value in found[name]), name
    quantiles = list(zip(*(found[f"influence_p{share}"] for share in (10, 50, 90)), strict=True))
    assert quantiles == [tuple(sorted(each)) for each in quantiles]
    assert quantiles[-1][0] != quantiles[-1][2]
    assert len(found["encoder_teacher_macro_f1"]) == len(found["validation_loss"]) == 2

    client = TestClient(main.create_app(), headers={"Authorization": f"Bearer {new_key('alice')}"})
    rows = client.get(f"/jobs/{job.id}/samples", params={"order": "influence", "limit": 100}).json()["data"]
    measured = [row for row in rows if row["influence"] is not None]
    assert len(measured) == 32
    assert [row["influence"] for row in measured] == sorted(row["influence"] for row in measured)
    for row in measured:
        assert len(row["influence_trend"]) == 2
        assert row["influence"] == pytest.approx(np.mean(row["influence_trend"]), rel=1e-5)
        assert row["student_label"] is not None
        assert 1 / 3 <= row["student_confidence"] <= 1
        assert row["encoder_teacher_label"] is not None
        assert row["student_uncertainty"] is not None
    rest = [row for row in rows if row["influence"] is None]
    assert {row["reason"] for row in rest} == {"feedback"}
    assert {row["influence_trend"] for row in rest} == {None}
    assert {row["offered"] for row in rest} == {0}


def test_llkd_chooses_the_rows_that_lgtm_learns_from(database: Engine) -> None:
    feedback = {"feedback_from": "validation", "feedback_share": 0.4}
    job = run(submit(spec({"kind": "llkd_lgtm", **feedback, "selection": {"warm_up": "none"}})))
    assert (job.status, job.error) == ("succeeded", None)
    assert job.selection is not None
    assert 0 < job.selection["selected"] < job.selection["seen"] == 80
    client = TestClient(main.create_app(), headers={"Authorization": f"Bearer {new_key('alice')}"})
    rows = client.get(f"/jobs/{job.id}/samples", params={"limit": 100}).json()["data"]
    learned = [[value is not None for value in row["influence_trend"] or []].count(True) for row in rows]
    assert learned == [row["selected"] for row in rows], (
        "influence is of the rows that were chosen, each time they were"
    )
    assert sum(learned) == job.selection["selected"]
    found = series(job.id)
    assert {"agreement", "threshold_teacher/cooking", "influence_p50"} <= set(found)
    with session_scope() as session:
        event = session.scalar(select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.type == "training.feedback"))
        assert event is not None
        assert event.data == {"rows": 5, "source": "validation"}


def test_more_epochs_than_a_trend_has_places_share_them_and_the_last_stays() -> None:
    ledger, view = Ledger.empty(2, TREND_POINTS), torch.tensor([[0.25, 0.75]])
    for epoch in range(2 * TREND_POINTS):
        found = Measured(torch.tensor([float(epoch)]), view, view)
        ledger.note_influence(np.array([1]), found, epoch, 2 * TREND_POINTS)
    assert ledger.influence[1].tolist() == list(range(1, 2 * TREND_POINTS, 2))
    assert np.isnan(ledger.influence[0]).all()
    assert (ledger.student_label.tolist(), ledger.encoder_teacher_confidence[1]) == ([-1, 1], 0.75)


def test_a_job_without_influence_has_none_in_its_ledger(database: Engine) -> None:
    job = run(submit(spec({"kind": "prokt"})))
    assert (job.status, job.error) == ("succeeded", None)
    client = TestClient(main.create_app(), headers={"Authorization": f"Bearer {new_key('alice')}"})
    row = client.get(f"/jobs/{job.id}/samples", params={"limit": 1}).json()["data"][0]
    assert [row[name] for name in ("influence", "influence_trend", "student_label", "encoder_teacher_label")] == [
        None
    ] * 4
    assert (row["selected"], row["reason"]) == (2, "selected")


def test_feedback_from_a_validation_set_that_is_not_there_is_refused_at_the_door(database: Engine) -> None:
    client = TestClient(main.create_app(), headers={"Authorization": f"Bearer {new_key('alice')}"})
    asked = spec({"kind": "lgtm", "feedback_from": "validation", "teacher": {"num_layers": 40}})
    answer = client.post("/jobs", json={**asked, "validation_dataset_id": None})
    assert answer.status_code == 422
    faults = {(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]}
    assert faults == {
        ("/method/feedback_from", "feedback_without_validation"), ("/method/teacher/num_layers", "too_many_layers"),
    }  # fmt: skip
