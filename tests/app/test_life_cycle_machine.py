"""The life cycle as a state machine: any verb at any moment, by owners, workers, zombies and the sweep.

Hypothesis chooses the order; after every move the job must be one that the drawing in app/lifecycle.py allows.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, select

from app import lifecycle, shards
from app.config import settings as configured
from app.db import session_scope
from app.errors import IllegalMove
from app.lifecycle import LeaseLost
from app.models import HELD, TERMINAL, Job, JobEvent, LabelShard
from app.queue import LABEL, TRAIN
from tests.support import add_dataset, expire_leases, sentences, submit, tiny_spec

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
FIGURES = {"rows_from_cache": 0, "rows_failed": 0, "tokens": 0, "tokens_saved": 0, "seconds": 0.0}
VERBS: dict[str, Any] = {
    "cancel": lifecycle.cancel, "pause": lifecycle.pause, "resume": lifecycle.resume, "retry": lifecycle.retry,
}  # fmt: skip
LEGAL = {
    "queued": {"running", "paused", "cancelled", "failed"},
    "running": {"queued", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"},
    "pausing": {"paused", "cancelling", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "cancelled", "failed"},
    "cancelling": {"cancelled", "succeeded", "failed"},
    "cancelled": {"queued"},
    "failed": {"queued"},
    "succeeded": set(),
}
"""Where a job may be after one move from each status, as app/lifecycle.py draws it."""


class LifeCycle(RuleBasedStateMachine):
    """One job of two shards, and everybody who may touch it. Workers that lost their claim go on trying: zombies."""

    @initialize()
    def start(self) -> None:
        self.job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
        self.shards: list[LabelShard] = []
        self.attempts: list[int] = []
        self.labeled: list[tuple[int, int]] = []
        self.last, self.last_attempt = "queued", 0

    # --- the owner --------------------------------------------------------------------------------------------------

    @rule(verb=st.sampled_from(sorted(VERBS)))
    def the_owner_steers(self, verb: str) -> None:
        with contextlib.suppress(IllegalMove), session_scope() as session:
            VERBS[verb](session, session.get_one(Job, self.job_id))

    # --- labeling workers -------------------------------------------------------------------------------------------

    @rule()
    def a_worker_claims_a_shard(self) -> None:
        with session_scope() as session:
            shard = shards.claim(session, self.job_id, "labeler")
        if shard is not None:
            claims = [(each.index, each.attempt) for each in self.shards]
            assert (shard.index, shard.attempt) not in claims, "an attempt at a shard belongs to one worker"
            self.shards.append(shard)

    @rule(data=st.data())
    def a_worker_or_zombie_finishes_a_shard(self, data: st.DataObject) -> None:
        if not self.shards:
            return
        shard = data.draw(st.sampled_from(self.shards))
        with contextlib.suppress(LeaseLost), session_scope() as session:
            shards.finish(session, shard, FIGURES)
            self.labeled.append((shard.index, shard.attempt))

    @rule(data=st.data())
    def a_worker_or_zombie_gives_a_shard_back(self, data: st.DataObject) -> None:
        if self.shards:
            with session_scope() as session:
                shards.release(session, data.draw(st.sampled_from(self.shards)))

    @rule(data=st.data())
    def a_shard_breaks(self, data: st.DataObject) -> None:
        if self.shards:
            with session_scope() as session:
                shards.fail(session, data.draw(st.sampled_from(self.shards)), "labeling_failed", "It broke.")

    # --- training workers -------------------------------------------------------------------------------------------

    @rule()
    def a_worker_claims_the_job(self) -> None:
        with session_scope() as session:
            job = lifecycle.claim(session, self.job_id, "trainer")
            attempt = job.attempt if job is not None else None
        if attempt is not None:
            assert attempt not in self.attempts, "an attempt belongs to one worker"
            self.attempts.append(attempt)

    @rule(data=st.data(), how=st.sampled_from(["renew", "finish", "stop", "fail"]))
    def a_worker_or_zombie_writes(self, data: st.DataObject, how: str) -> None:
        if not self.attempts:
            return
        attempt = data.draw(st.sampled_from(self.attempts))
        job = self.job()
        holds = job.attempt == attempt and job.status in HELD
        try:
            with session_scope() as session:
                if how == "renew":
                    lifecycle.renew(session, self.job_id, attempt)
                elif how == "fail":
                    lifecycle.fail(session, self.job_id, "internal_error", "It broke.", attempt=attempt)
                else:
                    verb = lifecycle.finish if how == "finish" else lifecycle.stop
                    verb(session, lifecycle.held(session, self.job_id, attempt))
        except LeaseLost:
            assert not holds
        else:
            assert holds or how == "fail", f"attempt {attempt} wrote to a job that was {job.status} at {job.attempt}"

    # --- time -------------------------------------------------------------------------------------------------------

    @rule()
    def every_lease_runs_out(self) -> None:
        expire_leases()

    @rule()
    def the_scheduler_sweeps(self) -> None:
        with session_scope() as session:
            lifecycle.sweep(session, {LABEL, TRAIN})

    # --- what must hold ---------------------------------------------------------------------------------------------

    def job(self) -> Job:
        with session_scope() as session:
            return session.get_one(Job, self.job_id)

    @invariant()
    def the_job_is_where_it_may_be(self) -> None:
        job = self.job()
        assert job.status == self.last or job.status in LEGAL[self.last], f"{self.last} to {job.status}"
        assert job.attempt in (self.last_attempt, self.last_attempt + 1)
        assert (job.finished_at is not None) == (job.status in TERMINAL)
        assert (job.error is not None) == (job.status == "failed")
        assert job.lease_expires_at is None or job.status in HELD
        self.last, self.last_attempt = job.status, job.attempt

    @invariant()
    def the_record_has_no_gaps_and_no_shard_is_labeled_twice(self) -> None:
        with session_scope() as session:
            job = session.get_one(Job, self.job_id)
            numbers = list(
                session.scalars(select(JobEvent.seq).where(JobEvent.job_id == self.job_id).order_by(JobEvent.seq))
            )
            assert numbers == list(range(1, job.event_seq + 1))
            done = session.scalars(
                select(LabelShard).where(LabelShard.label_set_id == job.label_set_id, LabelShard.status == "done")
            )
            assert sorted((shard.index, shard.attempt) for shard in done) == sorted(self.labeled)
            labeling = next(phase for phase in job.phases if phase.name == "labeling")
            assert labeling.done == 6 * len(self.labeled)


def test_no_order_of_moves_breaks_the_life_cycle(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configured(), "shard_rows", 6)
    monkeypatch.setattr(configured(), "max_attempts", 2)
    run_state_machine_as_test(
        LifeCycle,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
