"""Labeling: claims on texts, the bill of an answer, samples of dry runs, waves, and a second try of failed rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATUSES = {
    "before": "'pending', 'claimed', 'done', 'skipped'",
    "now": "'held', 'pending', 'claimed', 'done', 'skipped'",
}


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
    op.create_table(
        "label_samples",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("labels", JSONB(), nullable=False),
        sa.Column("texts", JSONB(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("figures", JSONB(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_label_samples"),
    )
    op.add_column("label_sets", sa.Column("gate", JSONB(), nullable=True))
    _add("label_cache", sa.Column("seconds", sa.Double(), nullable=False, server_default="0"))
    op.add_column("label_cache", sa.Column("bill", sa.String(length=64), nullable=True))
    for name in ("wave", "retries"):
        _add("label_shards", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    _add("label_shards", sa.Column("rows_done", sa.BigInteger(), nullable=False, server_default="0"))
    _add("label_shards", sa.Column("seconds_saved", sa.Double(), nullable=False, server_default="0"))
    op.add_column("label_shards", sa.Column("answered_attempt", sa.Integer(), nullable=True))
    op.execute("UPDATE label_shards SET answered_attempt = attempt, rows_done = stop - start WHERE status = 'done'")
    _add("jobs", sa.Column("waves", JSONB(), nullable=False, server_default="[]"))
    _allow("now")


def downgrade() -> None:
    op.execute("UPDATE label_shards SET status = 'skipped' WHERE status = 'held'")
    _allow("before")
    op.drop_column("jobs", "waves")
    for name in ("answered_attempt", "seconds_saved", "rows_done", "retries", "wave"):
        op.drop_column("label_shards", name)
    for name in ("bill", "seconds"):
        op.drop_column("label_cache", name)
    op.drop_column("label_sets", "gate")
    op.drop_table("label_samples")
    op.drop_table("label_claims")


def _add(table: str, column: sa.Column) -> None:
    """A column that may not be null: rows that are there already get the default, later ones get theirs from the code."""
    op.add_column(table, column)
    op.alter_column(table, column.name, server_default=None)


def _allow(when: str) -> None:
    op.drop_constraint(op.f("ck_label_shards_status"), "label_shards", type_="check")
    op.create_check_constraint(op.f("ck_label_shards_status"), "label_shards", f"status IN ({STATUSES[when]})")
