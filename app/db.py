"""The engine and its two kinds of transaction: one per request, one per `with session_scope()` in a task.

Only this module commits. What is asked for again and again, the state of a job above all, goes through `read()`: without a
transaction, so that it costs one round trip and not five.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import orjson
import structlog
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app.config import settings

Result = TypeVar("Result")
AWAY = (OperationalError, InterfaceError)
"""What SQLAlchemy raises when PostgreSQL does not answer, or the connection to it broke."""
PATIENCE_SECONDS = 120.0
"""How long a worker waits for a database that is away."""
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
"""For libpq, in seconds and milliseconds: a peer that has vanished without a word is noticed within half a minute."""
OPTIONS = "-c timezone=UTC -c idle_in_transaction_session_timeout=60s"
"""For PostgreSQL. A process that was frozen in the middle of a transaction must not hold a job's row for ever."""

log = structlog.get_logger()

SessionLocal = sessionmaker(expire_on_commit=False)


@lru_cache
def engine() -> Engine:
    """The engine of this process; connections are tested before use, so a restarted server is survived."""
    return create_engine(
        settings().sqlalchemy_url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=30,
        hide_parameters=True,  # what statements carry does not stand in errors, and so not in logs
        connect_args={"connect_timeout": 5, "options": OPTIONS, **KEEPALIVE},
    )


READERS = 8
"""Connections of an API process for `read()`, beside the 40 that transactions may take."""


@lru_cache
def reader() -> Engine:
    """The engine of `read()`: every statement for itself, and no test of a connection before it is used."""
    return create_engine(
        settings().sqlalchemy_url,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        pool_size=READERS,
        max_overflow=0,
        hide_parameters=True,
        json_deserializer=orjson.loads,
        connect_args={"connect_timeout": 5, "options": OPTIONS, **KEEPALIVE},
    )


def read(work: Callable[[Session], Result]) -> Result:
    """What `work` reads. It must write nothing; each of its statements sees what is committed by then.

    A connection that a restarted server has cut is found out by using it: all are then new, and `work` is done again.
    """
    try:
        with Session(reader()) as session:
            return work(session)
    except AWAY as error:
        if not error.connection_invalidated:
            raise
    with Session(reader()) as session:
        return work(session)


def get_session() -> Iterator[Session]:
    """The transaction of one request: committed before the response leaves, rolled back on any error.

    Use with `Depends(get_session, scope="function")`; FastAPI's default scope would commit after the response.
    """
    with session_scope() as session:
        yield session


@contextmanager
def session_scope() -> Iterator[Session]:
    """A transaction that commits at the end of the block and rolls back when the block raises."""
    if not SessionLocal.kw.get("bind"):
        SessionLocal.configure(bind=engine())
    session = SessionLocal()
    try:
        yield session
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.close()


@contextmanager
def try_lock(name: str) -> Iterator[bool]:
    """Whether this block alone, in all processes, holds the lock of that name; without a transaction, so it may be long.

    PostgreSQL lets go of it when the block ends or the process dies.
    """
    key = func.hashtextextended(name, 0)
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        held = bool(connection.scalar(select(func.pg_try_advisory_lock(key))))
        try:
            yield held
        finally:
            if held:
                connection.execute(select(func.pg_advisory_unlock(key)))


def patiently(work: Callable[[Session], Result]) -> Result:
    """What `work` returns, done in a transaction of its own; for workers, whose results are worth waiting for.

    A database that is away is asked again for PATIENCE_SECONDS. When the connection breaks during the commit nobody
    knows whether it was done, so `work` must do no harm when it is done twice.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with session_scope() as session:
                return work(session)
        except AWAY as error:
            if time.monotonic() > deadline:
                raise
            log.warning("database_away", error=str(error.orig))
            time.sleep(1)
