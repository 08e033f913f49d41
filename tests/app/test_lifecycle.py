"""The life cycle on a real database: which moves are legal, who wins a race, and what the sweep brings back."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, select, update

from app import lifecycle, overview, shards
from app.config import settings
from app.db import session_scope
from app.errors import IllegalMove
from app.lifecycle import LeaseLost
from app.models import Checkpoint, Job, JobEvent, JobMetric, LabelShard, new_id, now
from app.queue import LABEL, QUEUES, TRAIN
from tests.support import add_dataset, expire_leases, in_threads, job_of, label, sentences, shards_of, submit, tiny_spec

VERBS = {"cancel": lifecycle.cancel, "pause": lifecycle.pause, "resume": lifecycle.resume, "retry": lifecycle.retry}
FIGURES = {"rows_from_cache": 0, "rows_failed": 0, "tokens": 0, "tokens_saved": 0, "seconds": 0.0}
BOTH = {LABEL, TRAIN}


class GivenUp(Exception):
    """Something went wrong before the commit."""


@pytest.fixture
def job_id(database: Engine, monkeypatch: pytest.MonkeyPatch) -> str:
    """A queued job of 30 rows in shards of 10."""
    monkeypatch.setattr(settings(), "shard_rows", 10)
    return submit(tiny_spec(add_dataset(sentences(30, 1))))


def move(verb: str, job_id: str) -> str:
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        VERBS[verb](session, job)
        return job.status


def put(job_id: str, **values: Any) -> None:
    """Write columns of the job, whatever the life cycle says."""
    with session_scope() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def claim(job_id: str, worker: str = "trainer") -> Job | None:
    with session_scope() as session:
        job = lifecycle.claim(session, job_id, worker)
        if job is not None:
            session.expunge(job)
        return job


def claim_shard(job_id: str, worker: str = "labeler") -> LabelShard | None:
    with session_scope() as session:
        return shards.claim(session, job_id, worker)


def finish_shard(job_id: str, shard: LabelShard, **figures: Any) -> None:
    with session_scope() as session:
        shards.finish(session, shard, FIGURES | figures)


def finish_labeling(job_id: str) -> None:
    while shard := claim_shard(job_id):
        finish_shard(job_id, shard)


def claimed(job_id: str) -> Job:
    finish_labeling(job_id)
    job = claim(job_id)
    assert job is not None
    return job


def sweep(idle: set[str] = BOTH) -> int:
    with session_scope() as session:
        return lifecycle.sweep(session, idle)


def events(job_id: str, type: str | None = None) -> list[JobEvent]:
    with session_scope() as session:
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
        return [event for event in session.scalars(query) if type in (None, event.type)]


def messages(task: str) -> int:
    with redis.Redis.from_url(settings().redis_url) as broker:
        return broker.llen(QUEUES[task])


def empty_broker() -> None:
    with redis.Redis.from_url(settings().redis_url) as broker:
        broker.flushall()


# --- the client's moves ---------------------------------------------------------------------------------------------

# What each verb makes of a job in each status: without a worker that trains it, and with one. None: refused.
WITHOUT_A_WORKER = {
    ("queued", "cancel"): "cancelled", ("queued", "pause"): "paused", ("queued", "resume"): None, ("queued", "retry"): None,
    ("running", "cancel"): "cancelled", ("running", "pause"): "paused", ("running", "resume"): None, ("running", "retry"): None,
    ("paused", "cancel"): "cancelled", ("paused", "pause"): "paused", ("paused", "resume"): "queued", ("paused", "retry"): None,
    ("succeeded", "cancel"): None, ("succeeded", "pause"): None, ("succeeded", "resume"): None, ("succeeded", "retry"): None,
    ("failed", "cancel"): None, ("failed", "pause"): None, ("failed", "resume"): None, ("failed", "retry"): "queued",
    ("cancelled", "cancel"): "cancelled", ("cancelled", "pause"): None, ("cancelled", "resume"): None, ("cancelled", "retry"): "queued",
}  # fmt: skip
WITH_A_WORKER = {
    ("running", "cancel"): "cancelling", ("running", "pause"): "pausing", ("running", "resume"): None, ("running", "retry"): None,
    ("pausing", "cancel"): "cancelling", ("pausing", "pause"): "pausing", ("pausing", "resume"): None, ("pausing", "retry"): None,
    ("cancelling", "cancel"): "cancelling", ("cancelling", "pause"): None, ("cancelling", "resume"): None, ("cancelling", "retry"): None,
}  # fmt: skip
MOVES = [(False, *case, outcome) for case, outcome in WITHOUT_A_WORKER.items()]
MOVES += [(True, *case, outcome) for case, outcome in WITH_A_WORKER.items()]


def test_every_move_from_every_status_ends_as_the_table_says(job_id: str) -> None:
    for held, status, verb, outcome in MOVES:
        lease = now() + timedelta(minutes=1) if held else None
        put(job_id, status=status, phase="training", lease_expires_at=lease, finished_at=None)
        case = f"{verb} of a {status} job{' that a worker holds' if held else ''}"
        if outcome is None:
            with pytest.raises(IllegalMove, match=status):
                move(verb, job_id)
            assert job_of(job_id).status == status, case
        else:
            assert move(verb, job_id) == outcome, case
            job = job_of(job_id)
            assert (job.finished_at is not None) == (outcome == "cancelled" != status), case


def test_a_move_that_was_made_already_is_no_second_event(job_id: str) -> None:
    move("pause", job_id)
    before = len(events(job_id))
    move("pause", job_id)
    assert len(events(job_id)) == before


def test_a_cancelled_job_is_neither_labeled_nor_trained(job_id: str) -> None:
    shard = claim_shard(job_id)
    assert shard is not None
    move("cancel", job_id)
    assert claim_shard(job_id) is None
    put(job_id, phase="training")
    assert claim(job_id) is None
    with pytest.raises(LeaseLost):
        finish_shard(job_id, shard)


def test_a_retried_job_starts_without_its_error_and_labels_what_was_claimed(job_id: str) -> None:
    shard = claim_shard(job_id)
    assert shard is not None
    with session_scope() as session:
        lifecycle.fail(session, job_id, "labeling_failed", "out of luck")
    assert job_of(job_id).error == {"code": "labeling_failed", "message": "out of luck", "phase": "labeling"}
    move("retry", job_id)
    job = job_of(job_id)
    assert (job.status, job.error, job.finished_at) == ("queued", None, None)
    with pytest.raises(LeaseLost):
        finish_shard(job_id, shard)
    again = claim_shard(job_id)
    assert again is not None
    assert (again.index, again.attempt) == (shard.index, shard.attempt + 1)
    assert again.key != shard.key


# --- the record -----------------------------------------------------------------------------------------------------


def test_events_of_many_writers_are_numbered_without_gaps(job_id: str) -> None:
    before = len(events(job_id))

    def write(number: int) -> None:
        for count in range(10):
            with session_scope() as session:
                lifecycle.emit(session, job_id, "test", f"{number}/{count}")

    assert in_threads(6, write) == [None] * 6
    assert [event.seq for event in events(job_id)] == list(range(1, before + 61))
    assert job_of(job_id).event_seq == before + 60


def test_an_event_that_is_rolled_back_leaves_no_gap(job_id: str) -> None:
    with contextlib.suppress(GivenUp), session_scope() as session:
        lifecycle.emit(session, job_id, "test", "never happened")
        raise GivenUp
    with session_scope() as session:
        lifecycle.emit(session, job_id, "test", "happened")
    assert [event.seq for event in events(job_id)] == list(range(1, len(events(job_id)) + 1))


def test_a_metric_point_that_is_written_again_replaces_the_first(job_id: str) -> None:
    for value in (1.0, 2.0):
        with session_scope() as session:
            lifecycle.record_metrics(session, job_id, 5, 0.5, {"train_loss": value, "ratio": None})
    with session_scope() as session:
        points = {metric.name: metric.value for metric in session.scalars(select(JobMetric))}
    assert points == {"train_loss": 2.0, "ratio": None}


def test_progress_weighs_the_phases_and_is_one_only_at_the_end(job_id: str) -> None:
    assert overview.progress(job_of(job_id)) == 0.0
    shard = claim_shard(job_id)
    assert shard is not None
    finish_shard(job_id, shard)
    assert overview.progress(job_of(job_id)) == pytest.approx(0.25 / 3, abs=1e-3)
    finish_labeling(job_id)
    assert overview.progress(job_of(job_id)) == 0.25
    put(job_id, status="succeeded")
    assert overview.progress(job_of(job_id)) == 1.0


# --- labeling -------------------------------------------------------------------------------------------------------


def test_a_job_is_cut_into_shards_that_cover_every_row_once(job_id: str) -> None:
    assert [(shard.start, shard.stop, shard.split) for shard in shards_of(job_id)] == [
        (0, 10, "train"), (10, 20, "train"), (20, 30, "train"),
    ]  # fmt: skip


def test_a_row_budget_cuts_the_train_rows_and_not_the_held_out_ones(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 10)
    train, test = add_dataset(sentences(30, 1)), add_dataset(sentences(12, 2))
    spec = tiny_spec(
        train, test_dataset_id=test, labels=["cooking", "sports", "weather"], teacher={"kind": "embedding"},
        budget={"max_labeled_rows": 15},
    )  # fmt: skip
    assert [(shard.split, shard.start, shard.stop) for shard in shards_of(submit(spec))] == [
        ("train", 0, 10), ("train", 10, 15), ("test", 0, 10), ("test", 10, 12),
    ]  # fmt: skip


def test_shards_claimed_by_several_threads_are_each_labeled_once(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 5)
    job_id = submit(tiny_spec(add_dataset(sentences(60, 1))))
    empty_broker()

    def work(number: int) -> list[int]:
        done = []
        while shard := claim_shard(job_id, f"labeler-{number}"):
            time.sleep(0.005)
            finish_shard(job_id, shard)
            done.append(shard.index)
        return done

    done = in_threads(4, work)
    assert sorted(index for part in done for index in part) == list(range(12))
    assert {shard.attempt for shard in shards_of(job_id)} == {1}
    assert len(events(job_id, "labeling.finished")) == 1
    assert len(events(job_id, "job.started")) == 1
    assert messages(TRAIN) == 1
    job = job_of(job_id)
    assert (job.status, job.phase, job.phases[0].done) == ("running", "training", 60)
    assert job.phases[0].finished_at is not None


def test_the_labeler_itself_leaves_no_row_out_when_several_label(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 7)
    job_id = submit(tiny_spec(add_dataset(sentences(60, 1))))
    assert in_threads(3, lambda number: label(job_id, f"labeler-{number}")) == [None] * 3
    assert {shard.status for shard in shards_of(job_id)} == {"done"}
    assert len(events(job_id, "labeling.finished")) == 1


def test_a_labeler_that_lost_its_shard_changes_nothing(job_id: str) -> None:
    late = claim_shard(job_id, "late")
    assert late is not None
    expire_leases()
    heir = claim_shard(job_id, "heir")
    assert heir is not None
    assert (heir.index, heir.attempt) == (late.index, 2)
    with session_scope() as session:
        shards.release(session, late)
    with pytest.raises(LeaseLost), session_scope() as session:
        shards.renew(session, late)
    with pytest.raises(LeaseLost):
        finish_shard(job_id, late, tokens=7)
    with session_scope() as session:
        shards.fail(session, late, "labeling_failed", "too late")
    shard = shards_of(job_id)[late.index]
    assert (shard.status, shard.worker, shard.tokens) == ("claimed", "heir", 0)
    assert job_of(job_id).status == "running"
    assert [event.data["worker"] for event in events(job_id, "worker.lost")] == ["late"]
    finish_shard(job_id, heir)
    assert shards_of(job_id)[late.index].status == "done"


def test_a_shard_that_fails_fails_its_job_with_the_reason(job_id: str) -> None:
    shard = claim_shard(job_id)
    assert shard is not None
    with session_scope() as session:
        shards.fail(session, shard, "labeling_failed", "the model is gone")
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error == {"code": "labeling_failed", "message": "the model is gone", "phase": "labeling"}


def test_a_shard_that_costs_max_attempts_workers_fails_the_job_and_names_its_rows(
    job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "max_attempts", 2)
    for _ in range(2):
        assert claim_shard(job_id) is not None
        expire_leases()
    assert claim_shard(job_id) is None
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "Rows 0 to 9 of the train set" in job.error["message"]
    move("retry", job_id)
    assert claim_shard(job_id) is not None, "a retry starts the count anew"


def test_a_shard_that_is_given_back_does_not_count_as_a_lost_worker(
    job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "max_attempts", 2)
    for attempt in range(1, 5):
        shard = claim_shard(job_id)
        assert shard is not None
        assert (shard.index, shard.attempt) == (0, attempt)
        with session_scope() as session:
            shards.release(session, shard)
    assert events(job_id, "worker.lost") == []
    assert claim_shard(job_id) is not None
    expire_leases()
    assert claim_shard(job_id) is not None, "only one worker was lost"


def test_labeling_goes_on_through_pause_and_resume_of_the_job(job_id: str) -> None:
    first = claim_shard(job_id)
    second = claim_shard(job_id)
    assert first is not None
    assert second is not None
    move("pause", job_id)
    assert claim_shard(job_id) is None
    finish_shard(job_id, first)
    assert job_of(job_id).status == "paused"
    move("resume", job_id)
    # The job waits in the queue, and the shard that was begun before the pause is not thrown away.
    with session_scope() as session:
        shards.renew(session, second)
    finish_shard(job_id, second)
    finish_labeling(job_id)
    assert job_of(job_id).phase == "training"
    assert {shard.attempt for shard in shards_of(job_id)} == {1}


def test_a_labeler_hears_of_a_pause_and_calls_another_where_the_job_goes_on_already(job_id: str) -> None:
    shard = claim_shard(job_id)
    assert shard is not None

    def renewed() -> str:
        with session_scope() as session:
            return shards.renew(session, shard)

    def released() -> int:
        empty_broker()
        with session_scope() as session:
            shards.release(session, shard, call=True)
        return messages(LABEL)

    assert renewed() == "running"
    move("pause", job_id)
    assert renewed() == "paused"
    assert released() == 0, "nobody is to label a paused job"
    move("resume", job_id)
    shard = claim_shard(job_id)
    assert shard is not None
    assert renewed() == "running"
    assert released() == 1


def test_a_job_whose_last_shard_ended_during_the_pause_goes_on_to_training(job_id: str) -> None:
    shards = [claim_shard(job_id) for _ in range(3)]
    move("pause", job_id)
    for shard in shards:
        assert shard is not None
        finish_shard(job_id, shard)
    assert job_of(job_id).phase == "labeling"
    move("resume", job_id)
    assert claim_shard(job_id) is None
    assert job_of(job_id).phase == "training"


@pytest.mark.parametrize(
    ("name", "figures"), [("max_teacher_tokens", {"tokens": 60}), ("max_seconds", {"seconds": 60.0})]
)
def test_a_spent_budget_leaves_the_other_train_rows_unlabeled_and_goes_on(
    database: Engine, monkeypatch: pytest.MonkeyPatch, name: str, figures: dict[str, Any]
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 10)
    train, test = add_dataset(sentences(40, 1)), add_dataset(sentences(10, 2))
    spec = tiny_spec(
        train, test_dataset_id=test, labels=["cooking", "sports", "weather"], teacher={"kind": "embedding"},
        budget={name: 100},
    )  # fmt: skip
    job_id = submit(spec)
    for _ in range(2):
        shard = claim_shard(job_id)
        assert shard is not None
        finish_shard(job_id, shard, **figures)
    shard = claim_shard(job_id)
    assert shard is not None
    assert shard.split == "test", "the held-out rows are labeled all the same"
    finish_shard(job_id, shard)
    assert [shard.status for shard in shards_of(job_id)] == ["done", "done", "skipped", "skipped", "done"]
    reached = events(job_id, "budget.reached")
    assert len(reached) == 1
    assert reached[0].data["rows"] == 20
    assert f"budget.{name}" in reached[0].message
    job = job_of(job_id)
    assert (job.status, job.phase) == ("running", "training")


# --- training: the claim and its fence ------------------------------------------------------------------------------


def test_of_two_workers_that_claim_at_once_exactly_one_wins(job_id: str) -> None:
    finish_labeling(job_id)
    won = [job for job in in_threads(5, lambda number: claim(job_id, f"trainer-{number}")) if job is not None]
    assert len(won) == 1
    assert (won[0].attempt, job_of(job_id).worker) == (1, won[0].worker)
    assert len(events(job_id, "job.claimed")) == 1


def test_a_claim_waits_for_a_row_that_is_locked_for_a_moment(job_id: str) -> None:
    finish_labeling(job_id)
    locked = threading.Event()

    def look() -> None:
        with session_scope() as session:
            session.get_one(Job, job_id, with_for_update=True)
            locked.set()
            time.sleep(0.2)

    other = threading.Thread(target=look)
    other.start()
    locked.wait()
    assert claim(job_id) is not None
    other.join()


@pytest.mark.parametrize("status", ["paused", "cancelled", "succeeded", "failed", "pausing", "cancelling"])
def test_a_job_in_another_status_cannot_be_claimed(job_id: str, status: str) -> None:
    finish_labeling(job_id)
    put(job_id, status=status)
    assert claim(job_id) is None


def test_a_job_that_is_still_being_labeled_cannot_be_trained(job_id: str) -> None:
    assert claim(job_id) is None
    claim_shard(job_id)
    assert claim(job_id) is None


def test_a_worker_that_was_replaced_cannot_write(job_id: str) -> None:
    late = claimed(job_id)
    expire_leases()
    heir = claim(job_id, "heir")
    assert heir is not None
    assert heir.attempt == late.attempt + 1
    before = len(events(job_id))
    with pytest.raises(LeaseLost), session_scope() as session:
        lifecycle.held(session, job_id, late.attempt)
    with pytest.raises(LeaseLost), session_scope() as session:
        lifecycle.renew(session, job_id, late.attempt)
    with session_scope() as session:
        lifecycle.fail(session, job_id, "internal_error", "too late", attempt=late.attempt)
    job = job_of(job_id)
    assert (job.status, job.worker, job.error, len(events(job_id))) == ("running", "heir", None, before)


@pytest.mark.parametrize("status", ["cancelled", "failed", "succeeded", "paused"])
def test_nobody_writes_for_a_job_that_is_not_being_worked_on(job_id: str, status: str) -> None:
    job = claimed(job_id)
    put(job_id, status=status)
    with pytest.raises(LeaseLost), session_scope() as session:
        lifecycle.held(session, job_id, job.attempt)


def test_renewing_a_lease_prolongs_it_and_tells_the_status(job_id: str) -> None:
    job = claimed(job_id)
    expire_leases()
    with session_scope() as session:
        assert lifecycle.renew(session, job_id, job.attempt) == "running"
    lease = job_of(job_id).lease_expires_at
    assert lease is not None
    assert lease > now() + timedelta(seconds=settings().lease_seconds - 5)
    move("pause", job_id)
    with session_scope() as session:
        assert lifecycle.renew(session, job_id, job.attempt) == "pausing"


@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("pause", "paused")])
@pytest.mark.parametrize("phase", ["training", "evaluating", "packaging"])
def test_a_worker_that_is_asked_to_stop_leaves_the_job_as_was_asked(
    job_id: str, phase: str, verb: str, status: str
) -> None:
    job = claimed(job_id)
    put(job_id, phase=phase)
    move(verb, job_id)
    with session_scope() as session:
        lifecycle.stop(session, lifecycle.held(session, job_id, job.attempt))
    after = job_of(job_id)
    assert (after.status, after.phase, after.lease_expires_at, after.worker) == (status, phase, None, None)


def test_a_pause_that_comes_with_the_last_step_does_not_undo_the_success(job_id: str) -> None:
    job = claimed(job_id)
    move("pause", job_id)
    with session_scope() as session:
        lifecycle.finish(session, lifecycle.held(session, job_id, job.attempt))
    after = job_of(job_id)
    assert (after.status, after.lease_expires_at) == ("succeeded", None)
    assert after.finished_at is not None


def test_a_failure_while_cancelling_is_a_cancellation(job_id: str) -> None:
    job = claimed(job_id)
    move("cancel", job_id)
    with session_scope() as session:
        lifecycle.fail(session, job_id, "internal_error", "torn apart", attempt=job.attempt)
    after = job_of(job_id)
    assert (after.status, after.error) == ("cancelled", None)


def test_a_worker_that_shuts_down_gives_its_job_to_the_next(job_id: str) -> None:
    job = claimed(job_id)
    empty_broker()
    with session_scope() as session:
        lifecycle.stop(session, lifecycle.held(session, job_id, job.attempt))
    assert (job_of(job_id).status, messages(TRAIN)) == ("queued", 1)
    heir = claim(job_id)
    assert heir is not None
    assert (heir.attempt, heir.lost_workers) == (2, 0)


# --- the sweep ------------------------------------------------------------------------------------------------------


def test_the_sweep_requeues_a_job_whose_worker_was_lost(job_id: str) -> None:
    claimed(job_id)
    empty_broker()
    assert sweep() == 0, "a live lease is left alone"
    expire_leases()
    assert sweep() == 1
    job = job_of(job_id)
    assert (job.status, job.lost_workers, messages(TRAIN)) == ("queued", 1, 1)
    assert sweep() == 0, "its message is young"
    assert [event.data["attempt"] for event in events(job_id, "worker.lost")] == [1]


@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_the_sweep_ends_what_a_lost_worker_was_asked_to_stop(job_id: str, verb: str, status: str) -> None:
    claimed(job_id)
    move(verb, job_id)
    expire_leases()
    sweep()
    assert job_of(job_id).status == status


@pytest.mark.parametrize("finder", ["sweep", "claim"])
def test_a_job_that_lost_max_attempts_workers_fails_with_the_reason(
    job_id: str, monkeypatch: pytest.MonkeyPatch, finder: str
) -> None:
    monkeypatch.setattr(settings(), "max_attempts", 2)
    finish_labeling(job_id)
    for lost in (1, 2):
        assert claim(job_id) is not None, f"attempt {lost}"
        expire_leases()
        if finder == "sweep" or lost == 1:
            sweep()
        else:
            assert claim(job_id) is None
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["phase"]) == ("worker_lost", "training")
    assert "2 workers were lost" in job.error["message"]
    move("retry", job_id)
    assert claim(job_id) is not None


def test_a_message_is_sent_again_only_when_it_is_old_and_its_queue_is_empty(job_id: str) -> None:
    empty_broker()
    assert sweep() == 0
    put(job_id, enqueued_at=now() - timedelta(minutes=1))
    assert sweep({TRAIN}) == 0, "label messages wait in the queue: this job's may be among them"
    assert sweep({LABEL}) == 1
    assert messages(LABEL) == 3, "one for each shard that can be claimed"
    assert sweep({LABEL}) == 0, "the new message is young"


def test_a_labeling_that_is_being_worked_on_gets_no_message_until_a_lease_runs_out(job_id: str) -> None:
    for _ in range(3):
        claim_shard(job_id)
    empty_broker()
    put(job_id, enqueued_at=now() - timedelta(minutes=1))
    assert sweep() == 0
    expire_leases()
    assert sweep() == 1
    assert messages(LABEL) == 3


def test_a_clock_that_is_ahead_does_not_keep_the_sweep_from_sending_a_lost_message(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "requeue_seconds", 1e-9)
    monkeypatch.setattr(lifecycle, "now", lambda: now() + timedelta(hours=1))
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    move("pause", job_id)
    move("resume", job_id)
    assert [sweep(), sweep()] == [1, 1]


def test_a_training_whose_message_was_lost_gets_another(job_id: str) -> None:
    finish_labeling(job_id)
    empty_broker()
    put(job_id, enqueued_at=now() - timedelta(minutes=1))
    assert sweep({LABEL}) == 0
    assert sweep({TRAIN}) == 1
    assert messages(TRAIN) == 1


@pytest.mark.parametrize("status", ["paused", "succeeded", "failed", "cancelled"])
def test_the_sweep_leaves_alone_what_waits_for_its_owner_or_has_ended(job_id: str, status: str) -> None:
    put(job_id, status=status, enqueued_at=now() - timedelta(days=1))
    assert sweep() == 0


def test_no_message_leaves_when_the_transaction_fails(job_id: str) -> None:
    move("pause", job_id)
    empty_broker()
    with contextlib.suppress(GivenUp), session_scope() as session:
        lifecycle.resume(session, session.get_one(Job, job_id))
        raise GivenUp
    assert (job_of(job_id).status, messages(LABEL)) == ("paused", 0)


def test_a_checkpoint_ends_up_with_the_job_that_finished(job_id: str) -> None:
    job = claimed(job_id)
    checkpoint_id = new_id("ckpt")
    with session_scope() as session:
        held = lifecycle.held(session, job_id, job.attempt)
        session.add(
            Checkpoint(
                id=checkpoint_id,
                tenant="alice",
                job_id=job_id,
                step=1,
                epoch=1.0,
                metrics={},
                bytes=1,
                sha256="0" * 64,
                files=[],
            )
        )
        held.best_checkpoint_id = checkpoint_id
        lifecycle.finish(session, held)
    assert events(job_id)[-1].data == {"checkpoint_id": checkpoint_id}
