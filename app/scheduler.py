"""The scheduler: every few seconds it sets going again what a lost worker or a lost message has left behind.

Any number of schedulers may run; a lock in the database lets one of them sweep at a time. Beside the sweep each sends
webhooks and deletes what need not be kept, in threads of their own, so that slow receivers and files hold up no job.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from typing import NoReturn

import structlog
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app import lifecycle, retention, webhooks
from app.config import settings
from app.db import session_scope
from app.queue import QUEUES, producer
from app.storage import storage

SWEEP_LOCK = 0x73776565
"""Of PostgreSQL's advisory locks; any number, the same in every scheduler."""

MINUTES_BETWEEN_FILE_SWEEPS = 60

log = structlog.get_logger()


def run() -> NoReturn:
    """Sweep until SIGTERM or Ctrl-C. A database or broker that is away is waited for."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    threading.Thread(target=send_webhooks, name="webhooks", daemon=True).start()
    threading.Thread(target=keep_house, name="retention", daemon=True).start()
    while True:
        try:
            if touched := sweep():
                log.info("swept", jobs=touched)
        except SQLAlchemyError as error:
            log.warning("database_unreachable", error=str(error))
        time.sleep(settings().sweep_seconds)


def sweep() -> int:
    """One sweep; how many jobs it set going again, 0 also when another scheduler is at it."""
    idle = {task for task, queue in QUEUES.items() if is_empty(queue)}
    with session_scope() as session:
        if not session.scalar(select(func.pg_try_advisory_xact_lock(SWEEP_LOCK))):
            return 0
        return lifecycle.sweep(session, idle)


def send_webhooks() -> NoReturn:
    """Send what is due, again and again. A thread that ended would end all webhooks, so no error ends it."""
    while True:
        try:
            while sent := webhooks.deliver():
                log.info("webhooks_sent", calls=sent)
        except SQLAlchemyError as error:
            log.warning("database_unreachable", error=str(error))
        except Exception:
            log.exception("webhooks_failed")
        time.sleep(settings().sweep_seconds)


def keep_house() -> NoReturn:
    """Delete what has expired or is too old, every minute, and files without a row, every hour. No error ends it."""
    for minute in itertools.count():
        try:
            while retention.retain(storage()) >= retention.BATCH:
                pass
            if minute % MINUTES_BETWEEN_FILE_SWEEPS == 0:
                retention.sweep_files(storage())
        except SQLAlchemyError as error:
            log.warning("database_unreachable", error=str(error))
        except Exception:
            log.exception("retention_failed")
        time.sleep(60)
    raise AssertionError("unreachable")


def is_empty(queue: str) -> bool:
    """Whether no message waits in a queue of the broker. A broker that cannot be asked may hold some."""
    try:
        with producer().connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
            with connection.channel() as channel:
                return int(channel.queue_declare(queue, passive=True).message_count) == 0
    except ChannelError:  # the broker does not know the queue: Redis forgets one as soon as it is empty
        return True
    except (BrokerError, RedisError, OSError) as error:
        log.warning("broker_unreachable", queue=queue, error=str(error))
        return False
