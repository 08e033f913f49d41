"""Labeling: claims on texts, the bill of an answer, the gate, and a second try of failed rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "label_claims",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("text_hash", sa.LargeBinary(), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "fingerprint", "text_hash", name="pk_label_claims"),
    )
    op.add_column("label_sets", sa.Column("gate", JSONB(), nullable=True))
    _add("label_cache", sa.Column("seconds", sa.Double(), nullable=False, server_default="0"))
    op.add_column("label_cache", sa.Column("bill", sa.String(length=64), nullable=True))
    _add("label_shards", sa.Column("retries", sa.Integer(), nullable=False, server_default="0"))
    _add("label_shards", sa.Column("rows_done", sa.BigInteger(), nullable=False, server_default="0"))
    _add("label_shards", sa.Column("seconds_saved", sa.Double(), nullable=False, server_default="0"))
    op.add_column("label_shards", sa.Column("answered_attempt", sa.Integer(), nullable=True))
    op.execute("UPDATE label_shards SET answered_attempt = attempt, rows_done = stop - start WHERE status = 'done'")


def downgrade() -> None:
    for name in ("answered_attempt", "seconds_saved", "rows_done", "retries"):
        op.drop_column("label_shards", name)
    for name in ("bill", "seconds"):
        op.drop_column("label_cache", name)
    op.drop_column("label_sets", "gate")
    op.drop_table("label_claims")


def _add(table: str, column: sa.Column) -> None:
    """A column that may not be null: rows that are there already get the default, later ones get theirs from the code."""
    op.add_column(table, column)
    op.alter_column(table, column.name, server_default=None)
