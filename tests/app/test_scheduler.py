"""The scheduler: it knows an empty queue from a broker that is away, sweeps one at a time, and brings back lost work."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis
from sqlalchemy import Engine, func, select, update

from app import scheduler
from app.config import settings
from app.db import session_scope
from app.embedded import free_port
from app.models import Job, now
from app.queue import LABEL, QUEUES, TRAIN, producer, send
from tests.support import add_dataset, sentences, submit, tiny_spec


@pytest.fixture
def lost_job(database: Engine) -> str:
    """A job that has waited for a minute and whose message was lost with the broker."""
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    with session_scope() as session:
        session.execute(update(Job).where(Job.id == job_id).values(enqueued_at=now() - timedelta(minutes=1)))
    with redis.Redis.from_url(settings().redis_url) as broker:
        broker.flushall()
    return job_id


def test_a_queue_is_empty_until_a_message_waits_in_it(database: Engine) -> None:
    assert scheduler.is_empty(QUEUES[TRAIN])
    assert send(TRAIN, "job_1")
    assert not scheduler.is_empty(QUEUES[TRAIN])
    assert scheduler.is_empty(QUEUES[LABEL])


def test_a_broker_that_is_away_is_not_taken_for_an_empty_one(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "redis_url", f"redis://127.0.0.1:{free_port()}/0")
    producer.cache_clear()
    try:
        assert not scheduler.is_empty(QUEUES[TRAIN])
    finally:
        producer.cache_clear()


def test_a_lost_message_is_sent_again(lost_job: str) -> None:
    assert scheduler.sweep() == 1
    assert not scheduler.is_empty(QUEUES[LABEL])


def test_a_second_scheduler_does_nothing_while_the_first_one_sweeps(lost_job: str) -> None:
    with session_scope() as first:
        assert first.scalar(select(func.pg_try_advisory_xact_lock(scheduler.SWEEP_LOCK)))
        assert scheduler.sweep() == 0
    assert scheduler.sweep() == 1
