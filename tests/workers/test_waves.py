"""Labeling in waves: when it stops, and that what comes out is what the same labels would have given without waves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update

from app import lifecycle, shards
from app.config import settings
from app.db import session_scope
from app.models import Checkpoint, Job, JobMetric, LabelCache, LabelShard
from app.options import Waves
from app.storage import Storage
from app.waves import ends, reason_to_stop, stretched
from tests.faults.auditor import audit
from tests.support import TOPICS, add_dataset, expire_leases, job_of, label, sentences, submit, tiny_spec
from tests.test_the_whole_way import assert_the_numbers_agree, events, ledger_of, series, unpacked
from workers import tasks, waves
from workers.reporter import Reporter
from workers.waves import drifted, gain_at_most

# --- the rule -------------------------------------------------------------------------------------------------------


def test_waves_end_where_their_sizes_add_up_and_leave_no_crumbs() -> None:
    assert ends(100, None) == [100]
    assert ends(100, Waves(rows=20, growth=1)) == [20, 40, 60, 80, 100]
    assert ends(100, Waves(rows=20, growth=2)) == [20, 60, 100]
    assert ends(150, Waves(rows=20, growth=2)) == [20, 60, 150], "10 rows would be a wave smaller than the first"
    assert ends(100, Waves(rows=200)) == [100]
    assert ends(100, Waves(rows=20, growth=1.5)) == [20, 50, 100]


@pytest.mark.parametrize(
    ("asked", "epochs"), [(1000, 6), (500, 12), (400, 15), (333, 18), (300, 20), (250, 24), (249, 24), (16, 24)]
)
def test_a_wave_of_few_rows_trains_more_epochs_within_its_limit(asked: int, epochs: int) -> None:
    wish = Waves(max_stretch=4)
    assert stretched(6, asked, 1000, wish) == epochs
    assert stretched(6, asked, 1000, Waves(max_stretch=1)) == stretched(6, asked, 1000, None) == 6


def history(*waves: tuple[float | None, float | None], drift: bool = False) -> list[dict[str, Any]]:
    """Waves of 100 rows with these scores, and gains at most."""
    return [
        {"rows": 100 * number, "macro_f1": score, "gain_at_most": gain, "drifted": drift}
        for number, (score, gain) in enumerate(waves, 1)
    ]


def test_waves_stop_once_it_is_sure_that_the_last_gained_too_little() -> None:
    wish = Waves(min_gain=0.02)
    assert reason_to_stop(history((0.5, None)), wish) is None, "one wave has nothing to be compared with"
    assert reason_to_stop(history((0.5, None), (0.5, 0.02)), wish) is None
    flat = reason_to_stop(history((0.5, None), (0.6, 0.12), (0.605, 0.0199)), wish)
    assert flat == (
        "the last 100 rows that were asked about moved validation macro-F1 from 0.6000 to 0.6050, "
        "by at most 0.0199 with 90% certainty"
    )


def test_a_wave_that_shows_nothing_or_another_mixture_of_labels_stops_nothing() -> None:
    wish = Waves(min_gain=0.5)
    assert reason_to_stop(history((None, None), (0.5, None)), wish) is None
    assert reason_to_stop(history((0.5, None), (None, None)), wish) is None
    assert reason_to_stop(history((0.5, None), (0.5, 0.1), drift=True), wish) is None
    assert "last 200 rows" in str(reason_to_stop(history((0.5, None), (None, None), (0.5, 0.1)), wish))


def test_a_small_validation_set_needs_more_to_be_sure() -> None:
    luck = np.random.Generator(np.random.PCG64(0))

    def bound(rows: int) -> float | None:
        """Of two students that are each wrong on another tenth of the rows, so that neither is better."""
        gold = luck.integers(0, 4, rows)
        answers = np.stack([gold, gold])
        answers[0, ::10], answers[1, 5::10] = (gold[::10] + 1) % 4, (gold[5::10] + 1) % 4
        before, after = (np.stack([np.arange(rows), gold, answer]) for answer in answers)
        return gain_at_most(before, after)

    assert bound(200) == pytest.approx(1.28 * (0.2 / 200) ** 0.5, rel=0.15), "the normal approximation"
    assert bound(20_000) == pytest.approx(1.28 * (0.2 / 20_000) ** 0.5, rel=0.15)
    gold = np.arange(40) % 4
    same = np.stack([np.arange(40), gold, gold])
    assert gain_at_most(same, same) == 0


def test_a_student_at_chance_tells_nothing_of_what_labels_add() -> None:
    gold = np.arange(100) % 4
    constant = np.stack([np.arange(100), gold, np.zeros(100, np.int64)])
    learned = np.stack([np.arange(100), gold, np.where(gold > 0, gold, 1)])
    assert gain_at_most(constant, constant) is None
    assert gain_at_most(constant, learned) is not None
    assert gain_at_most(learned, learned) == 0


def test_labels_drift_when_a_file_is_sorted_and_not_by_chance() -> None:
    luck = np.random.Generator(np.random.PCG64(0))
    mixed = np.eye(3, dtype=np.float32)[luck.integers(0, 3, 200)]
    assert not drifted(mixed[:100], mixed[100:])
    ordered = mixed[mixed.argmax(axis=1).argsort()]
    assert drifted(ordered[:100], ordered[100:])
    unlabeled = np.full((50, 3), np.nan, np.float32)
    assert not drifted(mixed, unlabeled)
    assert drifted(np.concatenate([unlabeled, ordered[:100]]), ordered[100:])


# --- the job --------------------------------------------------------------------------------------------------------

ROWS = 72


@pytest.fixture
def spec(database: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job of 72 rows in shards of 16 and, with waves, in waves of 24."""
    monkeypatch.setattr(settings(), "shard_rows", 16)
    rows = [row | {"confidence": 0.4 + 0.05 * (number * 7 % 11)} for number, row in enumerate(sentences(ROWS, 1))]
    return tiny_spec(
        add_dataset(rows), validation_dataset_id=add_dataset(sentences(12, 2)), method={"kind": "llkd"},
        training={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip


def in_waves(**wish: Any) -> dict[str, Any]:
    return {"waves": {"rows": 24, "growth": 1, **wish}}


STOPS_AT_TWO = in_waves(min_gain=1)
NEVER_STOPS = in_waves(min_gain=0)


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students of two dozen rows may stop the waves though they have learned nothing."""
    monkeypatch.setattr(waves, "LEARNED", -1.0)


def finished(job_id: str) -> Job:
    """The job, once workers have done everything that is to be done."""
    for _ in range(20):
        if (job := job_of(job_id)).status not in ("queued", "running"):
            return job
        label(job_id)
        tasks.train(job_id)
    raise AssertionError(f"the job gets nowhere: {job.status}, {job.phase}")


def outcome(job_id: str) -> dict[str, Any]:
    """What must not depend on how a job got there."""
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        checkpoint = session.get_one(Checkpoint, job.best_checkpoint_id)
        metrics = session.scalars(select(JobMetric).where(JobMetric.job_id == job_id))
        return {
            "weights": next(file["sha256"] for file in checkpoint.files if file["name"] == "model.safetensors"),
            "selection": job.selection,
            "evaluation": job.evaluation,
            "points": {
                (point.name, point.step): point.value
                for point in metrics
                if point.name != "training_seconds" and not point.name.startswith("wave_")
            },
        }


@pytest.mark.usefixtures("untaught")
def test_a_job_that_stops_asking_ends_as_one_that_was_only_given_those_rows(
    client: TestClient, spec: dict[str, Any], tmp_path: Path
) -> None:
    job_id = client.post("/jobs", json=spec | {"labeling": STOPS_AT_TWO}).json()["id"]
    assert finished(job_id).status == "succeeded"
    longer = {"training": spec["training"] | {"epochs": 3}}
    budgeted = submit(spec | longer | {"budget": {"max_labeled_rows": 48}})
    assert finished(budgeted).status == "succeeded"
    assert outcome(job_id) == outcome(budgeted)

    job = client.get(f"/jobs/{job_id}").json()
    assert_the_numbers_agree(client, job, 48)
    assert all(phase["finished_at"] and phase["done"] == phase["total"] for phase in job["phases"])
    waves = job["labeling"]["waves"]
    assert (waves["rows_asked"], waves["rows_withheld"]) == (48, 24)
    assert [(wave["wave"], wave["rows"], wave["epochs"]) for wave in waves["history"]] == [(1, 24, 6), (2, 48, 3)]
    first, second = waves["history"]
    assert first["stopped"] is first["gain_at_most"] is None
    assert second["macro_f1"] - first["macro_f1"] <= second["gain_at_most"] < 1
    assert "moved validation macro-F1" in second["stopped"]
    assert second["selected"] == sum(entry["selected"] > 0 for entry in ledger_of(job))
    points = series(client, job)
    assert points["wave_macro_f1"] == [(wave["rows"], wave["macro_f1"]) for wave in waves["history"]]
    assert job["metrics"]["wave_selected"] == second["selected"]
    card = (unpacked(client, job, tmp_path) / "README.md").read_text()
    assert "asked in waves, about 48 rows in all and not about 24" in card
    unasked = ledger_of(job)[48:]
    assert {entry["reason"] for entry in unasked} == {"not_labeled"}
    assert {entry["error"] for entry in unasked} == {"not asked: the waves of labels have not gone beyond row 47"}
    assert [event["data"]["rows_more"] for event in events(client, job, "labeling.wave")] == [24]
    assert [event["data"]["rows_withheld"] for event in events(client, job, "labeling.stopped")] == [24]


def test_a_job_that_asks_to_the_end_ends_as_one_without_waves(spec: dict[str, Any]) -> None:
    job = finished(submit(spec | {"labeling": NEVER_STOPS}))
    assert outcome(job.id) == outcome(finished(submit(spec)).id)
    assert [wave["rows"] for wave in job.waves] == [24, 48, 72]
    assert job.waves[-1]["stopped"] == "there are no more rows to ask about"


@pytest.mark.usefixtures("untaught")
def test_the_teacher_is_not_asked_about_a_wave_that_is_not_opened(client: TestClient, spec: dict[str, Any]) -> None:
    texts = sentences(ROWS, 1, labeled=False)
    wish = spec | {
        "dataset_id": add_dataset(texts), "labels": TOPICS, "labeling": STOPS_AT_TWO,
        "teacher": {"kind": "embedding", "score_held_out": False},
    }  # fmt: skip
    job = finished(client.post("/jobs", json=wish).json()["id"])
    assert job.status == "succeeded"
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(LabelCache)) == 48
    labeling = client.get(f"/jobs/{job.id}").json()["labeling"]
    assert labeling["waves"]["tokens_withheld"] == round(labeling["tokens"] * 24 / 48) > 0
    assert labeling["waves"]["cost_withheld"] is None


def test_without_a_validation_set_the_mere_difference_counts(spec: dict[str, Any]) -> None:
    job = finished(submit({**spec, "validation_dataset_id": None, "labeling": STOPS_AT_TWO}))
    first, second = job.waves
    assert second["gain_at_most"] == second["macro_f1"] - first["macro_f1"]


def test_a_dry_run_tells_what_all_waves_take(client: TestClient, spec: dict[str, Any]) -> None:
    def training_seconds(labeling: dict[str, Any]) -> float:
        wish = spec | {"training": spec["training"] | {"epochs": 1000}, "labeling": labeling}
        return float(client.post("/jobs?dry_run=true&measure=false", json=wish).json()["training_seconds"])

    once = training_seconds({})
    assert training_seconds(NEVER_STOPS) == pytest.approx(3 * once, rel=1e-2), "as many steps in each of three waves"
    assert training_seconds(in_waves(max_stretch=1)) == pytest.approx(2 * once, rel=1e-2), "24 + 48 + 72 rows"


@pytest.mark.usefixtures("untaught")
def test_a_worker_lost_in_any_wave_changes_nothing_of_what_comes_out(
    spec: dict[str, Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = finished(submit(spec | {"labeling": STOPS_AT_TWO}))
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    job_id = submit(spec | {"labeling": STOPS_AT_TWO})

    class Killed(BaseException):
        """What a SIGKILL looks like from inside."""

    lost_at = {0: 12, 1: 5}
    """At this question of the first wave's training, and of the second's."""
    asked: list[int] = []
    check = Reporter.check

    def die_once_in_a_wave(report: Reporter) -> None:
        asked.append(len(job_of(job_id).waves))
        if asked.count(asked[-1]) == lost_at.get(asked[-1]):
            raise Killed
        check(report)

    monkeypatch.setattr(Reporter, "check", die_once_in_a_wave)
    for _ in range(2):
        label(job_id)
        with pytest.raises(Killed):
            tasks.train(job_id)
        expire_leases()
        tasks.train(job_id)
    assert job_of(job_id).status == "succeeded"
    assert outcome(job_id) == outcome(undisturbed.id)
    with session_scope() as session:
        found = audit(session, storage).wrong
    assert [finding for finding in found if "belongs to nothing" not in finding] == [], "files of other tests lie about"


@pytest.mark.usefixtures("untaught")
def test_a_job_paused_at_the_end_of_a_wave_asks_for_the_next_when_it_goes_on(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(spec | {"labeling": STOPS_AT_TWO})
    end_wave = lifecycle.held

    def pause_first(session: Any, its_id: str, attempt: int) -> Job:
        job = end_wave(session, its_id, attempt)
        if not job.waves and (job.selection or {}).get("epochs", [{}])[-1].get("epoch") == 6:
            lifecycle.pause(session, job)
        return job

    label(job_id)
    with monkeypatch.context() as patched:
        patched.setattr(lifecycle, "held", pause_first)
        tasks.train(job_id)
    assert (job_of(job_id).status, job_of(job_id).waves) == ("paused", [])
    with session_scope() as session:
        lifecycle.resume(session, session.get_one(Job, job_id))
    job = finished(job_id)
    assert (job.status, [wave["rows"] for wave in job.waves]) == ("succeeded", [24, 48])


def test_a_sorted_file_is_asked_about_until_its_labels_are_mixed(spec: dict[str, Any]) -> None:
    ordered = sorted(sentences(ROWS, 1), key=lambda row: str(row["label"]))
    job = finished(submit(spec | {"dataset_id": add_dataset(ordered), "labeling": STOPS_AT_TWO}))
    assert job.status == "succeeded"
    assert [(wave["macro_f1"] is None, wave["drifted"]) for wave in job.waves] == [
        (True, False), (False, True), (False, True)
    ]  # fmt: skip


def test_a_budget_that_is_spent_ends_the_waves(spec: dict[str, Any]) -> None:
    job_id = submit(spec | {"labeling": NEVER_STOPS, "budget": {"max_seconds": 60}})
    label(job_id)
    with session_scope() as session:
        session.execute(update(LabelShard).values(seconds=60))
    job = finished(job_id)
    assert job.status == "succeeded"
    assert len(job.waves) == 1
    assert job.waves[0]["stopped"] == "there are no more rows to ask about"


def test_two_workers_share_the_shards_of_a_wave_and_a_third_finds_none(spec: dict[str, Any]) -> None:
    job_id = submit(spec | {"labeling": NEVER_STOPS})
    with session_scope() as session:
        claimed = [shards.claim(session, job_id, f"labeler-{number}") for number in range(3)]
        assert [(shard.start, shard.stop) for shard in claimed if shard] == [(0, 16), (16, 24)]


def test_a_comparison_refuses_waves(client: TestClient, spec: dict[str, Any]) -> None:
    arms = [{"name": kind, "method": {"kind": kind}} for kind in ("llkd", "no_selection")]
    wish = {name: spec[name] for name in ("dataset_id", "teacher", "student")}
    wish |= {"test_dataset_id": spec["validation_dataset_id"], "arms": arms, "labeling": STOPS_AT_TWO}
    refused = client.post("/comparisons", json=wish)
    assert refused.status_code == 422
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/labeling/waves"]
