"""The first schema: our tables, and Procrastinate's beside them."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from procrastinate.schema import SchemaManager
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("last_turn_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_conversations")),
    )
    op.create_index("ix_conversations_due_at", "conversations", ["due_at"], unique=False)
    op.create_table(
        "dataset_rows",
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column(
            "scorers",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="scorer name to value, of the scorers that failed it",
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("merged_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("dataset", "trace_id", name=op.f("pk_dataset_rows")),
    )
    op.create_table(
        "evaluators",
        sa.Column("evaluator_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("evaluator_id", name=op.f("pk_evaluators")),
    )
    op.create_table(
        "run_drops",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("noted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_drops")),
    )
    op.create_index("ix_run_drops_noted_at", "run_drops", ["noted_at"], unique=False)
    op.create_table(
        "runs",
        sa.Column("trace_id", sa.Text(), nullable=False, comment="MLflow's trace id, tr-<32 hex>"),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("agent_version", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False, comment="ok or error: how the run ended for the client"),
        sa.Column("offline", sa.Boolean(), nullable=False, comment="an offline model answered"),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="for dropped and failed: why"),
        sa.Column("inclusion_probability", sa.Double(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        sa.Column("scored_by", sa.Integer(), server_default="0", nullable=False, comment="scorers that gave a verdict"),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'scored', 'not_selected', 'sampled_out', 'budget_skipped', 'redaction_blocked', 'dropped', 'failed', 'erased')",
            name=op.f("ck_runs_state"),
        ),
        sa.PrimaryKeyConstraint("trace_id", name=op.f("pk_runs")),
    )
    op.create_index(
        "ix_runs_pending", "runs", ["updated_at"], unique=False, postgresql_where=sa.text("state = 'pending'")
    )
    op.create_index("ix_runs_session", "runs", ["session_id", "started_at"], unique=False)
    op.create_index("ix_runs_started_at", "runs", ["started_at"], unique=False)
    op.create_table(
        "scores",
        sa.Column("score_id", sa.Text(), nullable=False, comment="also the id of the MLflow assessment"),
        sa.Column("trace_id", sa.Text(), nullable=False, comment="for a conversation's score: its first trace"),
        sa.Column("session_id", sa.Text(), nullable=True, comment="set for a conversation's score"),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("scorer", sa.Text(), nullable=False),
        sa.Column("scorer_version", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="name of the assessment; a scorer may give several"),
        sa.Column("value", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("passed", sa.Boolean(), nullable=True, comment="NULL: no verdict, or the scorer failed"),
        sa.Column("rationale", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True, comment="the scorer failed: type and message"),
        sa.Column("source_type", sa.Text(), nullable=False, comment="CODE or LLM_JUDGE"),
        sa.Column("source_id", sa.Text(), nullable=False, comment="scorer or judge model"),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="{}",
            nullable=False,
            comment="assessment metadata: judge's cost and tokens",
        ),
        sa.Column("turns", sa.Integer(), nullable=True, comment="turns of the conversation when it was scored"),
        sa.Column("latest", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("logged_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("score_id", name=op.f("pk_scores")),
    )
    op.create_index("ix_scores_created_at", "scores", ["created_at"], unique=False)
    op.create_index("ix_scores_session_id", "scores", ["session_id"], unique=False)
    op.create_index("ix_scores_trace_id", "scores", ["trace_id"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("turns", sa.Integer(), server_default="0", nullable=False),
        sa.Column("turn_owner", sa.Text(), nullable=True),
        sa.Column("turn_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_table(
        "outbox",
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "payload", sa.LargeBinary(), nullable=False, comment="redacted, encrypted trace (gateway.tracing.spans)"
        ),
        sa.Column("claimed_by", sa.Integer(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False, comment="claims"),
        sa.Column(
            "refusals", sa.Integer(), server_default="0", nullable=False, comment="failures while MLflow was well"
        ),
        sa.Column("retry_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["trace_id"], ["runs.trace_id"], name=op.f("fk_outbox_trace_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("trace_id", name=op.f("pk_outbox")),
    )
    op.create_index("ix_outbox_position", "outbox", ["position"], unique=False)
    op.create_table(
        "session_turns",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("items", sa.LargeBinary(), nullable=False, comment="encrypted JSON list of Responses items"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["sessions.session_id"],
            name=op.f("fk_session_turns_session_id_sessions"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session_id", "turn", name=op.f("pk_session_turns")),
    )
    # Procrastinate answers for its own statements; later versions of it get a revision of ours each.
    # Through the driver's own cursor: SQLAlchemy would take the schema's per-cent signs for parameters.
    op.get_bind().connection.cursor().execute(SchemaManager.get_schema())


def downgrade() -> None:
    raise NotImplementedError("There is nothing before the first schema; drop the database instead.")
