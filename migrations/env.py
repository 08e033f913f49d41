"""How alembic reaches the database of the settings and the tables of app/models.py."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.config import settings
from app.models import Base

LOCK = 0x756E6465  # any number, the same in every process


def run() -> None:
    """Migrate in one transaction, alone: a second process waits and then finds nothing to do."""
    url = context.config.attributes.get("url") or settings().sqlalchemy_url
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    context.configure(
        url=settings().sqlalchemy_url, target_metadata=Base.metadata, literal_binds=True, dialect_name="postgresql"
    )
    with context.begin_transaction():
        context.run_migrations()
else:
    run()
