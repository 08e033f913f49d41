"""Keys: scope and limits. Webhooks: the secret before. Turns of tenants. The audit log, which is only added to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

REFUSE = """
CREATE FUNCTION audit_log_is_only_added_to() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('understudy.prune_audit_log', true) = 'on' THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'audit_log is only added to';
END $$
"""
TRIGGER = """
CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE ON audit_log
FOR EACH ROW EXECUTE FUNCTION audit_log_is_only_added_to()
"""


def upgrade() -> None:
    # Keys made before keep what they could do.
    op.add_column("api_keys", sa.Column("scope", sa.String(length=8), nullable=False, server_default="write"))
    op.add_column("api_keys", sa.Column("limits", JSONB(), nullable=False, server_default="{}"))
    op.alter_column("api_keys", "scope", server_default=None)
    op.alter_column("api_keys", "limits", server_default=None)
    op.create_check_constraint(op.f("ck_api_keys_scope"), "api_keys", "scope IN ('read', 'write', 'admin')")

    op.add_column("webhook_secrets", sa.Column("previous", sa.String(length=100), nullable=True))
    op.add_column("webhook_secrets", sa.Column("previous_until", sa.DateTime(timezone=True), nullable=True))

    op.create_table(
        "tenant_turns",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "task", name="pk_tenant_turns"),
    )

    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("request_id", sa.String(length=64), nullable=True),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("object_id", sa.String(length=100), nullable=True),
        sa.Column("outcome", sa.String(length=8), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    op.create_index("ix_audit_log_at", "audit_log", ["at"])
    op.execute(REFUSE)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.drop_table("audit_log")
    op.execute("DROP FUNCTION audit_log_is_only_added_to()")
    op.drop_table("tenant_turns")
    op.drop_column("webhook_secrets", "previous_until")
    op.drop_column("webhook_secrets", "previous")
    op.drop_constraint(op.f("ck_api_keys_scope"), "api_keys")
    op.drop_column("api_keys", "limits")
    op.drop_column("api_keys", "scope")
