"""The migrations make what app/models.py says, and can be undone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, make_url, text

from app import migrate
from app.embedded import Embedded
from app.models import Base

COLUMNS = """
    SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default
    FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
"""
CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid <> coalesce(to_regclass('alembic_version'), 0)
"""
INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"


@pytest.fixture
def blank(services: Embedded) -> Iterator[Engine]:
    """A second, empty database on the same server."""
    with create_engine(services.database_url, isolation_level="AUTOCOMMIT").connect() as server:
        server.execute(text("CREATE DATABASE blank"))
        blank = create_engine(make_url(services.database_url).set(database="blank"))
        yield blank
        blank.dispose()
        server.execute(text("DROP DATABASE blank"))


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def tables(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")))


def catalog(connection: Connection) -> set[tuple[object, ...]]:
    return {tuple(row) for query in (COLUMNS, CONSTRAINTS, INDEXES) for row in connection.execute(text(query))}


def test_upgrade_downgrade_upgrade_ends_where_the_first_upgrade_did(blank: Engine) -> None:
    migrate.upgrade(url_of(blank))
    with blank.connect() as connection:
        first = catalog(connection)
    migrate.downgrade(url_of(blank))
    assert tables(blank) == {"alembic_version"}
    migrate.upgrade(url_of(blank))
    with blank.connect() as connection:
        assert catalog(connection) == first


def test_a_second_upgrade_changes_nothing(blank: Engine) -> None:
    migrate.upgrade(url_of(blank))
    before = tables(blank)
    migrate.upgrade(url_of(blank))
    assert tables(blank) == before == {table.name for table in Base.metadata.sorted_tables} | {"alembic_version"}


def test_alembic_finds_no_difference_between_the_migrated_schema_and_the_models(blank: Engine) -> None:
    migrate.upgrade(url_of(blank))
    with blank.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_columns_constraints_and_indexes_are_those_the_models_would_make(blank: Engine) -> None:
    """Alembic does not compare check constraints, operators of partial indexes and names; the catalog knows them."""
    Base.metadata.create_all(blank)
    with blank.connect() as connection:
        wanted = catalog(connection)
    Base.metadata.drop_all(blank)
    migrate.upgrade(url_of(blank))
    with blank.connect() as connection:
        assert catalog(connection) == wanted
