"""Whose turn it is: one tenant's hundred jobs do not starve another's one, in labeling and in training."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from app import lifecycle, shards, turns
from app.config import settings
from app.db import session_scope
from app.models import Job, JobEvent
from app.queue import LABEL, TRAIN
from tests.app.test_lifecycle import finish_labeling, finish_shard, messages
from tests.support import add_dataset, expire_leases, in_threads, job_of, sentences, submit, tiny_spec
from workers import tasks


def jobs_of(tenant: str, count: int) -> list[str]:
    """Queued jobs of a tenant, one shard each."""
    spec = tiny_spec(add_dataset(sentences(6, 1), tenant))
    return [submit(spec, tenant) for _ in range(count)]


def label_next(worker: str = "labeler", *, finish: bool = True) -> str | None:
    """Label one shard of the job whose turn it is, as a worker would; its tenant."""
    with session_scope() as session:
        line = turns.in_turn(session, LABEL)
    for job_id in line:
        with session_scope() as session:
            shard = shards.claim(session, job_id, worker)
        if shard is not None:
            if finish:
                finish_shard(job_id, shard)
            return job_of(job_id).tenant
    return None


def train_next(named: str | None = None, *, finish: bool = True) -> tuple[str, str] | None:
    """Train the job whose turn it is; its tenant and id."""
    with session_scope() as session:
        line = turns.in_turn(session, TRAIN, named)
    for job_id in line:
        with session_scope() as session:
            job = lifecycle.claim(session, job_id, "trainer")
            if job is not None:
                if finish:
                    lifecycle.finish(session, job)
                return job.tenant, job.id
    return None


def send_to_training(**values: Any) -> None:
    """Every job is labeled and waits for a trainer."""
    with session_scope() as session:
        session.execute(update(Job).values(phase="training", status="running", **values))


def test_a_hundred_jobs_of_one_tenant_do_not_keep_another_one_s_from_being_labeled(database: Engine) -> None:
    jobs_of("alice", 100)
    assert label_next() == "alice"
    jobs_of("bob", 1)
    assert [label_next() for _ in range(3)] == ["bob", "alice", "alice"]


def test_nor_from_being_trained(database: Engine) -> None:
    jobs_of("alice", 20)
    send_to_training()
    assert train_next() is not None
    [last] = jobs_of("bob", 1)
    with session_scope() as session:
        session.get_one(Job, last).phase = "training"
    assert train_next() == ("bob", last)
    found = train_next()
    assert found is not None
    assert found[0] == "alice"


def test_workers_are_shared_evenly_among_the_tenants_that_have_work(database: Engine) -> None:
    jobs_of("alice", 8)
    jobs_of("bob", 8)
    jobs_of("carol", 1)
    assert Counter(label_next(finish=False) for _ in range(7)) == {"alice": 3, "bob": 3, "carol": 1}
    send_to_training(lease_expires_at=None)
    held = [train_next(finish=False) for _ in range(7)]
    assert Counter(entry[0] for entry in held if entry) == {"alice": 3, "bob": 3, "carol": 1}


def test_a_tenant_that_is_alone_gets_every_worker_and_its_jobs_in_their_order(database: Engine) -> None:
    jobs = jobs_of("alice", 5)
    assert [label_next() for _ in range(6)] == ["alice"] * 5 + [None]
    assert [train_next() for _ in range(6)] == [("alice", job_id) for job_id in jobs] + [None]


def test_of_a_tenant_s_own_jobs_the_one_that_the_message_names_is_trained(database: Engine) -> None:
    jobs = jobs_of("alice", 3)
    send_to_training()
    assert train_next(jobs[1]) == ("alice", jobs[1])
    assert train_next(jobs[1]) == ("alice", jobs[0]), "a message for a job that is done is good for another"


def test_what_nobody_can_take_up_is_not_in_line(database: Engine) -> None:
    waiting, held, paused, ended = jobs_of("alice", 4)
    send_to_training()
    with session_scope() as session:
        assert lifecycle.claim(session, held, "trainer") is not None
        lifecycle.pause(session, session.get_one(Job, paused))
        lifecycle.cancel(session, session.get_one(Job, ended))
        assert turns.in_turn(session, TRAIN) == [waiting]
        assert turns.in_turn(session, LABEL) == []
    expire_leases()
    with session_scope() as session:
        assert turns.in_turn(session, TRAIN) == [waiting, held], "its worker was lost"


def test_a_job_whose_shards_are_all_in_hand_is_not_in_line_but_one_that_only_waits_to_go_on_is(
    database: Engine,
) -> None:
    [job_id] = jobs_of("alice", 1)
    assert label_next(finish=False) == "alice"
    with session_scope() as session:
        assert turns.in_turn(session, LABEL) == []
    expire_leases()
    with session_scope() as session:
        assert turns.in_turn(session, LABEL) == [job_id]
        lifecycle.pause(session, session.get_one(Job, job_id))
    with session_scope() as session:
        shard = shards.claim(session, job_id, "labeler")
        assert shard is None, "it is paused"
        lifecycle.resume(session, session.get_one(Job, job_id))
    finish_labeling(job_id)
    with session_scope() as session:  # as if the worker that labeled the last shard had died before it sent the job on
        session.execute(update(Job).values(phase="labeling"))
    with session_scope() as session:
        assert turns.in_turn(session, LABEL) == [job_id]


def test_workers_that_look_at_the_same_moment_take_up_every_job_once(database: Engine) -> None:
    jobs_of("alice", 12)
    jobs_of("bob", 2)
    send_to_training()
    taken: list[tuple[str, str]] = []
    lock = threading.Lock()

    def work(_: int) -> None:
        while (found := train_next()) is not None:
            with lock:
                taken.append(found)

    assert in_threads(4, work) == [None] * 4
    assert len({job_id for _, job_id in taken}) == len(taken) == 14
    assert sum(tenant == "bob" for tenant, _ in taken[:8]) == 2


def test_a_worker_labels_in_turns_and_leaves_a_message_for_what_is_left(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task itself, with turns of one shard: two tenants' shards alternate, and no job waits for the sweep."""
    monkeypatch.setattr(settings(), "shard_rows", 6)
    monkeypatch.setattr(settings(), "turn_seconds", 1e-9)
    long, short = (submit(tiny_spec(add_dataset(sentences(24, 1), tenant)), tenant) for tenant in ("alice", "bob"))
    waiting = messages(LABEL)
    assert waiting == 8
    for _ in range(waiting):
        tasks.label(long)  # every message names the same job
    assert messages(LABEL) == waiting + 8, "each turn left one"
    with session_scope() as session:
        query = select(JobEvent.job_id).where(JobEvent.type == "labeling.shard").order_by(JobEvent.at)
        assert list(session.scalars(query)) == [long, short] * 4
    assert {job_of(job_id).phase for job_id in (long, short)} == {"training"}


def test_a_message_trains_one_job_and_one_too_many_does_nothing(database: Engine) -> None:
    jobs = jobs_of("alice", 1) + jobs_of("bob", 1)
    for _ in jobs:
        tasks.label(jobs[0])
    for _ in range(2):
        tasks.train(jobs[0])
    assert [job_of(job_id).status for job_id in jobs] == ["succeeded"] * 2
    tasks.train(jobs[0])
    assert [job_of(job_id).attempt for job_id in jobs] == [1, 1]
