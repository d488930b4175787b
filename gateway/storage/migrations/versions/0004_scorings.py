"""What is to be scored by itself, what judges spent, and with what probability a score exists."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "scorings",
        sa.Column("subject", sa.Text(), nullable=False, comment="trace id, or session id of a conversation"),
        sa.Column("turns", sa.Integer(), nullable=False, comment="turns of the conversation; 0: a trace"),
        sa.Column("scorer", sa.Text(), nullable=False),
        sa.Column("scorer_version", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=False, comment="trace that the scores are on"),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column(
            "probability",
            sa.Double(),
            nullable=False,
            comment="with which a score exists, given that the trace was kept",
        ),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column(
            "reason", sa.Text(), nullable=True, comment="of skipped and failed: why; of pending: the last failure"
        ),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("claimed_by", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('pending', 'scored', 'skipped', 'failed')", name=op.f("ck_scorings_state")),
        sa.PrimaryKeyConstraint("subject", "turns", "scorer", "scorer_version", name=op.f("pk_scorings")),
    )
    op.create_index("ix_scorings_trace_id", "scorings", ["trace_id"])
    op.create_index("ix_scorings_due", "scorings", ["due_at"], postgresql_where=sa.text("state = 'pending'"))
    op.create_index("ix_scorings_failed", "scorings", ["updated_at"], postgresql_where=sa.text("state = 'failed'"))
    op.create_index("ix_scorings_skipped", "scorings", ["updated_at"], postgresql_where=sa.text("state = 'skipped'"))
    op.create_table(
        "judge_spending",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False, comment="its beginning"),
        sa.Column("calls", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cost_usd", sa.Double(), server_default="0", nullable=False),
        sa.Column(
            "unpriced_calls", sa.BigInteger(), server_default="0", nullable=False, comment="those of unknown price"
        ),
        sa.PrimaryKeyConstraint("model", "hour", name=op.f("pk_judge_spending")),
    )
    op.add_column(
        "scores",
        sa.Column(
            "inclusion_probability",
            sa.Double(),
            server_default="1",
            nullable=False,
            comment="with which it exists, given that its trace was kept",
        ),
    )
    skips = postgresql.JSONB(astext_type=sa.Text())
    comment = "by scorer that did not score it: why"
    op.add_column("runs", sa.Column("skips", skips, server_default="{}", nullable=False, comment=comment))
    op.add_column("conversations", sa.Column("skips", skips, server_default="{}", nullable=False, comment=comment))


def downgrade() -> None:
    op.drop_column("conversations", "skips")
    op.drop_column("runs", "skips")
    op.drop_column("scores", "inclusion_probability")
    op.drop_table("judge_spending")
    op.drop_table("scorings")
