"""Webhooks of comparisons: a call is of a job or of a comparison."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLE = "webhook_deliveries"


def upgrade() -> None:
    op.add_column(TABLE, sa.Column("comparison_id", sa.String(length=40), nullable=True))
    op.alter_column(TABLE, "job_id", nullable=True)
    op.create_foreign_key(
        "fk_webhook_deliveries_comparison_id_comparisons", TABLE, "comparisons", ["comparison_id"], ["id"],
        ondelete="CASCADE",
    )  # fmt: skip
    op.create_index("ix_webhook_deliveries_comparison_id", TABLE, ["comparison_id"])
    op.create_check_constraint(
        op.f("ck_webhook_deliveries_of_one"), TABLE, "(job_id IS NULL) <> (comparison_id IS NULL)"
    )


def downgrade() -> None:
    op.execute(f"DELETE FROM {TABLE} WHERE job_id IS NULL")
    op.drop_constraint(op.f("ck_webhook_deliveries_of_one"), TABLE)
    op.drop_index("ix_webhook_deliveries_comparison_id", TABLE)
    op.drop_column(TABLE, "comparison_id")
    op.alter_column(TABLE, "job_id", nullable=False)
