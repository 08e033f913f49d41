"""The engine and its two kinds of transaction: one per request, one per `with session_scope()` in a task.

Only this module commits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from app.config import settings

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
        connect_args={"connect_timeout": 5, "options": "-c timezone=UTC"},
    )


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
