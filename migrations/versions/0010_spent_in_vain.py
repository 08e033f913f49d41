"""What an attempt that gave its shard back spent on rows without an answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (sa.Column("tokens_in_vain", sa.BigInteger()), sa.Column("seconds_in_vain", sa.Double())):
        column.nullable, column.server_default = False, sa.DefaultClause("0")
        op.add_column("label_shards", column)
        op.alter_column("label_shards", column.name, server_default=None)


def downgrade() -> None:
    op.drop_column("label_shards", "seconds_in_vain")
    op.drop_column("label_shards", "tokens_in_vain")
