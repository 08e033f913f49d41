"""The fixtures: a real PostgreSQL and a real Redis, started once and only when a test needs them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from app import migrate
from app.config import settings
from app.db import SessionLocal, engine
from app.embedded import Embedded
from app.logs import configure_logging
from app.models import Base
from app.queue import producer
from app.storage import Storage
from app.storage import storage as configured_storage
from tests.support import new_key

FILES = Path(tempfile.mkdtemp(prefix="understudy-tests-"))


def pytest_configure() -> None:
    """Before any test module, and with it torch, is imported."""
    os.environ["UNDERSTUDY_STORAGE_URL"] = f"file://{FILES}/storage"
    os.environ["UNDERSTUDY_MEASURE_SECONDS"] = "0"  # else every dry run would wait for a worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Tests are small and the cores few; one thread is as fast, and gives the same numbers every time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    configure_logging()  # structlog by itself would print every local variable of a traceback, bodies of requests and all


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every operation that schemathesis tests a node id of its own.

    By pytest 9.2 they all have the same, and pytest-xdist runs one test for each id.
    """
    fuzzed = [item for item in items if getattr(item, "operation_label", None) is not None]
    for item in fuzzed:
        if item.id.params is None:
            item._id = item.id.with_params(item.operation_label)
    assert len({item.nodeid for item in fuzzed}) == len(fuzzed)


def pytest_unconfigure() -> None:
    shutil.rmtree(FILES, ignore_errors=True)


@pytest.fixture(scope="session")
def services() -> Iterator[Embedded]:
    """PostgreSQL and Redis, migrated, and settings that point to them."""
    with Embedded(FILES / "services", durable=False) as parts:
        os.environ["UNDERSTUDY_DATABASE_URL"] = parts.database_url
        os.environ["UNDERSTUDY_REDIS_URL"] = parts.redis_url
        for cached in (settings, engine, producer, configured_storage):
            cached.cache_clear()
        migrate.upgrade()
        yield parts
        engine().dispose()


@pytest.fixture
def storage() -> Storage:
    """The storage of the tests, in a temporary directory."""
    return configured_storage()


@pytest.fixture
def session(services: Embedded) -> Iterator[Session]:
    """A session whose test leaves no trace: what code under test commits is rolled back at the end."""
    with engine().connect() as connection:
        outer = connection.begin()
        SessionLocal.configure(bind=connection, join_transaction_mode="create_savepoint")
        with SessionLocal() as session:
            yield session
        SessionLocal.kw.pop("join_transaction_mode")
        SessionLocal.configure(bind=None)
        outer.rollback()
    _empty_broker()


@pytest.fixture
def database(services: Embedded) -> Iterator[Engine]:
    """A database that really commits, for code that opens sessions of its own; its tables are emptied afterwards."""
    yield engine()
    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
    with engine().begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} CASCADE"))
    _empty_broker()


@pytest.fixture
def client(database: Engine) -> Iterator[TestClient]:
    """The API as the tenant alice sees it."""
    with _client_of("alice") as client:
        yield client


@pytest.fixture
def other_client(database: Engine) -> Iterator[TestClient]:
    """The API as the tenant bob sees it."""
    with _client_of("bob") as client:
        yield client


def _client_of(tenant: str) -> TestClient:
    from app.main import create_app

    return TestClient(create_app(), headers={"Authorization": f"Bearer {new_key(tenant)}"})


def _empty_broker() -> None:
    with redis.Redis.from_url(settings().redis_url) as broker:
        broker.flushall()
