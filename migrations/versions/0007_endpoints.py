"""Endpoints: what each of them can do, and what a shard's labels cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "endpoint_abilities",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("configuration", sa.String(length=64), nullable=False),
        sa.Column("ability", JSONB(), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_endpoint_abilities"),
    )
    op.add_column("label_shards", sa.Column("cost", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("label_shards", "cost")
    op.drop_table("endpoint_abilities")
