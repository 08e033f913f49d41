"""Comparisons: several methods and seeds on one set of labels; a job tells whose run it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "comparisons",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("metadata", JSONB(), nullable=False),
        sa.Column("warnings", JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_comparisons"),
    )
    op.create_index("ix_comparisons_tenant_created", "comparisons", ["tenant", "id"])
    op.add_column("jobs", sa.Column("comparison_id", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("arm", sa.String(length=100), nullable=True))
    op.create_foreign_key("fk_jobs_comparison_id_comparisons", "jobs", "comparisons", ["comparison_id"], ["id"])
    op.create_index("ix_jobs_comparison_id", "jobs", ["comparison_id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_comparison_id", "jobs")
    op.drop_column("jobs", "arm")
    op.drop_column("jobs", "comparison_id")
    op.drop_table("comparisons")
