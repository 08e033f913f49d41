"""The Celery producer: task names, queues, and messages that leave only after the commit.

A message carries an id and nothing else. It says that there is work; which job is next, the worker that takes it asks
the database (turns.in_turn). Losing one is harmless: the scheduler's sweep sends another.
"""

from __future__ import annotations

from functools import lru_cache

import structlog
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.config import settings

LABEL = "understudy.label"
TRAIN = "understudy.train"
MEASURE = "understudy.measure"
QUEUES = {LABEL: "label", TRAIN: "train", MEASURE: "label"}

log = structlog.get_logger()


@lru_cache
def producer() -> Celery:
    """The Celery application that sends; the workers' own lives in workers/celery_app.py."""
    app = Celery("understudy", broker=settings().redis_url)
    configure(app)
    return app


def configure(app: Celery) -> None:
    """What producers and workers must agree on."""
    app.conf.update(
        task_routes={name: {"queue": queue} for name, queue in QUEUES.items()},
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            # Messages are acknowledged before the work starts, so nothing is redelivered while a training runs.
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "max_retries": 1,
        },
    )


def send(task: str, id: str) -> bool:
    """Send a message with the id of a job, or of a measurement, now. False, and a line in the log, when the broker is away: the sweep will try again."""
    try:
        producer().send_task(task, args=[id], queue=QUEUES[task], retry=False)
    except (BrokerError, RedisError, OSError) as error:
        log.warning("broker_unreachable", task=task, id=id, error=str(error))
        return False
    return True


def enqueue_on_commit(session: Session, task: str, job_id: str, copies: int = 1) -> None:
    """Send `copies` messages once the session has committed; none if it rolls back."""

    def after_commit(_: Session) -> None:
        for _copy in range(copies):
            if not send(task, job_id):
                return

    event.listen(session, "after_commit", after_commit, once=True)


def broker_is_reachable() -> bool:
    """Whether the broker answers just now."""
    try:
        with producer().connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
    except (BrokerError, RedisError, OSError):
        return False
    return True
