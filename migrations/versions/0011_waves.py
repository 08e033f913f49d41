"""Waves: shards that wait for a student to ask for them, and what each wave's student has shown."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _add("label_shards", sa.Column("wave", sa.Integer(), nullable=False, server_default="1"))
    _add("jobs", sa.Column("waves", JSONB(), nullable=False, server_default="[]"))
    _allow("withheld", "pending", "claimed", "done", "skipped")


def downgrade() -> None:
    op.execute("UPDATE label_shards SET status = 'skipped' WHERE status = 'withheld'")
    _allow("pending", "claimed", "done", "skipped")
    op.drop_column("jobs", "waves")
    op.drop_column("label_shards", "wave")


def _allow(*statuses: str) -> None:
    op.drop_constraint(op.f("ck_label_shards_status"), "label_shards", type_="check")
    op.create_check_constraint(op.f("ck_label_shards_status"), "label_shards", f"status IN {statuses!r}")


def _add(table: str, column: sa.Column) -> None:
    """A column that may not be null: rows that are there already get the default, later ones get theirs from the code."""
    op.add_column(table, column)
    op.alter_column(table, column.name, server_default=None)
