"""Sampling of whole sessions with tail rules, the ledger's counters, a second destination."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


_REASON = "of failed, sampled_out and redaction_blocked: why, where there is more to say"
_REASON_BEFORE = "for dropped and failed: why"


def upgrade() -> None:
    op.create_table(
        "run_counts",
        sa.Column("process_id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("served", sa.BigInteger(), nullable=False, comment="runs that the process has begun to serve"),
        sa.Column(
            "unsettled",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="those under way, or on the way here",
        ),
        sa.Column("counted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("process_id", "agent", name=op.f("pk_run_counts")),
    )
    # What was served before is as many as there are rows: nothing else was counted.
    op.execute(
        """
        INSERT INTO run_counts (process_id, agent, served, closed_at)
        SELECT 0, agent, sum(runs), now() FROM (
            SELECT agent, count(*) AS runs FROM runs GROUP BY agent
            UNION ALL SELECT agent, sum(count) FROM run_drops GROUP BY agent) AS earlier
        GROUP BY agent
        """
    )
    op.create_table(
        "sampled_sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("rate", sa.Double(), nullable=False, comment="rate by which the first turn was drawn"),
        sa.Column("kept", sa.Boolean(), nullable=False, comment="the draw keeps it"),
        sa.Column(
            "rules",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="[]",
            nullable=False,
            comment="list of the tail rules that its turns met",
        ),
        sa.Column("promoted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("projected_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_run_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sampled_sessions")),
    )
    op.create_index("ix_sampled_sessions_last_run_at", "sampled_sessions", ["last_run_at"])
    op.create_index(
        "ix_sampled_sessions_unprojected",
        "sampled_sessions",
        ["promoted_at"],
        postgresql_where=sa.text("promoted_at IS NOT NULL AND projected_at IS NULL"),
    )
    op.create_table(
        "otlp_outbox",
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False, comment="as in the outbox"),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("retry_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["trace_id"], ["runs.trace_id"], name=op.f("fk_otlp_outbox_trace_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("trace_id", name=op.f("pk_otlp_outbox")),
    )
    op.create_index("ix_otlp_outbox_retry_at", "otlp_outbox", ["retry_at"])
    op.add_column(
        "outbox",
        sa.Column(
            "held",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="not sampled: waits for a tail rule",
        ),
    )
    op.drop_index("ix_outbox_position", "outbox")
    op.create_index("ix_outbox_position", "outbox", ["position"], postgresql_where=sa.text("NOT held"))
    op.create_index("ix_outbox_held", "outbox", ["position"], postgresql_where=sa.text("held"))
    op.add_column("run_drops", sa.Column("process_id", sa.Integer(), comment="web process that served them"))
    op.add_column(
        "runs",
        sa.Column(
            "kept_because",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="[]",
            nullable=False,
            comment="list: sampled, and the tail rules it met",
        ),
    )
    op.add_column(
        "runs",
        sa.Column("process_id", sa.Integer(), comment="web process that served it; NULL: an earlier version did"),
    )
    op.alter_column("runs", "reason", comment=_REASON, existing_comment=_REASON_BEFORE, existing_type=sa.Text())
    op.add_column("runs", sa.Column("swept_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.alter_column("runs", "reason", comment=_REASON_BEFORE, existing_comment=_REASON, existing_type=sa.Text())
    for column in ("swept_at", "process_id", "kept_because"):
        op.drop_column("runs", column)
    op.drop_column("run_drops", "process_id")
    op.drop_index("ix_outbox_held", "outbox")
    op.drop_index("ix_outbox_position", "outbox")
    op.create_index("ix_outbox_position", "outbox", ["position"])
    op.drop_column("outbox", "held")
    for table in ("otlp_outbox", "sampled_sessions", "run_counts"):
        op.drop_table(table)
