"""Bring a database to the schema of app/models.py."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def upgrade(url: str | None = None, revision: str = "head") -> None:
    """Migrate forward, by default all the way; `url` is the settings' database unless given. Safe to run twice."""
    command.upgrade(_configuration(url), revision)


def downgrade(url: str | None = None, revision: str = "base") -> None:
    """Migrate back, by default to an empty database. What the dropped tables held is lost."""
    command.downgrade(_configuration(url), revision)


def _configuration(url: str | None) -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    configuration.attributes["url"] = url
    return configuration
