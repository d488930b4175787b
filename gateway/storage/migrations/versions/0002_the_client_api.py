"""The client API: keys, owners of sessions, waiting requests, stored responses, paused runs, erasures."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "secret_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the key, which has 256 random bits"
        ),
        sa.Column(
            "scopes",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="list of invoke, feedback, ops, admin",
        ),
        sa.Column(
            "agents",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="list of the agents that it may use; NULL: all",
        ),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True, comment="NULL: what the setting says"),
        sa.Column("concurrency", sa.Integer(), nullable=True, comment="NULL: what the setting says"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "erased_sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("erasure_id", sa.Text(), nullable=False, comment="the last erasure that it was part of"),
        sa.Column("erased_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_erased_sessions")),
    )
    op.create_table(
        "erasures",
        sa.Column("erasure_id", sa.Text(), nullable=False),
        sa.Column(
            "key_id", sa.Text(), nullable=True, comment="API key whose traces were meant; NULL: those of all keys"
        ),
        sa.Column(
            "user_hash",
            sa.LargeBinary(),
            nullable=True,
            comment="SHA-256 of the user's id; NULL: a session was meant",
        ),
        sa.Column(
            "sessions",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="ids of the sessions that were forgotten",
        ),
        sa.Column(
            "trace_ids",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="traces that are to be removed from MLflow",
        ),
        sa.Column(
            "removed",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="what was removed so far, by kind",
        ),
        sa.Column("requested_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("erasure_id", name=op.f("pk_erasures")),
    )
    op.create_index("ix_erasures_requested_at", "erasures", ["requested_at"], unique=False)
    op.create_index("ix_erasures_user_hash", "erasures", ["user_hash"], unique=False)
    op.create_index(
        "ix_erasures_open",
        "erasures",
        ["requested_at"],
        unique=False,
        postgresql_where=sa.text("done_at IS NULL"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("key_id", sa.Text(), server_default="anonymous", nullable=False),
        sa.Column("idempotency_key", sa.LargeBinary(), nullable=False, comment="keyed hash of what the client sent"),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False, comment="keyed hash of method, path and body"),
        sa.Column("owner", sa.Text(), nullable=False, comment="the request that runs, or ran, it"),
        sa.Column("process_id", sa.Integer(), nullable=False, comment="web process of the owner"),
        sa.Column("session_id", sa.Text(), nullable=True, comment="session of the answer; NULL while there is none"),
        sa.Column(
            "answer",
            sa.LargeBinary(),
            nullable=True,
            comment="encrypted status, headers and body; NULL while it is under way",
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "idempotency_key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"], unique=False)
    op.create_index("ix_idempotency_keys_session_id", "idempotency_keys", ["session_id"], unique=False)
    op.create_table(
        "key_budgets",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Double(), nullable=False, comment="requests that nobody has leased yet"),
        sa.Column("refilled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_key_budgets")),
    )
    op.create_table(
        "key_slots",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("process_id", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "process_id", name=op.f("pk_key_slots")),
    )
    op.create_table(
        "responses",
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), server_default="anonymous", nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column(
            "turn",
            sa.Integer(),
            nullable=True,
            comment="turn of the session that it is the answer of; NULL: the turn was not kept",
        ),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False, comment="queued, in_progress, completed, failed or cancelled"),
        sa.Column("process_id", sa.Integer(), nullable=True, comment="web process that runs it in the background"),
        sa.Column("body", sa.LargeBinary(), nullable=False, comment="encrypted JSON of the response"),
        sa.Column("input", sa.LargeBinary(), nullable=False, comment="encrypted JSON list of the request's items"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("response_id", name=op.f("pk_responses")),
    )
    op.create_index("ix_responses_created_at", "responses", ["created_at"], unique=False)
    op.create_index("ix_responses_session_id", "responses", ["session_id"], unique=False)
    op.create_index("ix_responses_user_id", "responses", ["user_id"], unique=False)
    op.create_table(
        "session_waiters",
        sa.Column("ticket", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("process_id", sa.Integer(), nullable=False),
        sa.Column("waiting_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("ticket", name=op.f("pk_session_waiters")),
    )
    op.create_index("ix_session_waiters_session_id", "session_waiters", ["session_id", "ticket"], unique=False)
    op.create_table(
        "web_processes",
        sa.Column("process_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("process_id", name=op.f("pk_web_processes")),
    )
    op.create_table(
        "approvals",
        sa.Column("approval_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=False, comment="of the run that paused"),
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("used", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_approvals_session_id_sessions"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("approval_id", name=op.f("pk_approvals")),
    )
    op.create_index("ix_approvals_session_id", "approvals", ["session_id"], unique=False)
    op.create_index("ix_approvals_trace_id", "approvals", ["trace_id"], unique=False)
    op.create_table(
        "paused_runs",
        sa.Column("trace_id", sa.Text(), nullable=False, comment="of the run that paused"),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False, comment="turn of the session that the run has left open"),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False, comment="encrypted JSON of the SDK's run state"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_paused_runs_session_id_sessions"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("trace_id", name=op.f("pk_paused_runs")),
    )
    op.create_index("ix_paused_runs_session_id", "paused_runs", ["session_id"], unique=False)
    op.add_column("runs", sa.Column("user_id", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("key_id", sa.Text(), server_default="anonymous", nullable=False))
    op.create_index("ix_runs_user_id", "runs", ["user_id"], unique=False)
    op.add_column(
        "session_turns", sa.Column("trace_id", sa.Text(), nullable=True, comment="NULL: stored by an earlier version")
    )
    op.add_column(
        "session_turns",
        sa.Column(
            "continues",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="answers tool calls or approvals of the turn before: the two are never cut apart",
        ),
    )
    op.add_column("sessions", sa.Column("key_id", sa.Text(), server_default="anonymous", nullable=False))
    op.add_column(
        "sessions", sa.Column("user_id", sa.Text(), nullable=True, comment="NULL: no request of the session named one")
    )
    op.add_column(
        "sessions",
        sa.Column(
            "forked_from", sa.Text(), nullable=True, comment="the session whose turns its first ones are copies of"
        ),
    )
    op.add_column("sessions", sa.Column("turn_process", sa.Integer(), nullable=True))
    op.add_column(
        "sessions",
        sa.Column(
            "interrupted", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="the owner is to stop"
        ),
    )
    op.add_column(
        "sessions", sa.Column("used_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)
    )
    op.add_column("sessions", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_sessions_forked_from", "sessions", ["forked_from"], unique=False)
    op.create_index("ix_sessions_used_at", "sessions", ["used_at"], unique=False)
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"], unique=False)


def downgrade() -> None:
    raise NotImplementedError("Restore a backup instead: the tables hold what an earlier version cannot read.")
