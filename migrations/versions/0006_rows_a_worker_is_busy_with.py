"""Which rows of a shard its worker is busy with: what is left when a row kills the worker, so that the row can be named."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("label_shards", sa.Column("busy_start", sa.BigInteger(), nullable=True))
    op.add_column("label_shards", sa.Column("busy_stop", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("label_shards", "busy_stop")
    op.drop_column("label_shards", "busy_start")
