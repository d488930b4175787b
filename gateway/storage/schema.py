"""The tables of database ``gateway``.

``sessions``, ``session_turns``   conversation memory: encrypted, a row a turn
``runs``                          the ledger: one row a run, its state, never its text
``run_drops``                     runs of which not even a row could be kept, counted
``outbox``                        finished traces (redacted, encrypted) on their way to MLflow
``conversations``                 when a conversation is due to be scored
``scores``                        every score, the truth of which MLflow's assessments are the projection
``dataset_rows``                  what went into which dataset, once each
``evaluators``                    heartbeats

Procrastinate keeps its own tables beside them. All times are ``timestamptz``.
"""

from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _time(name: str, *, nullable: bool = False, default_now: bool = True) -> Column[datetime]:
    server_default = func.now() if default_now and not nullable else None
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=server_default)


sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("turns", Integer, nullable=False, server_default="0"),
    # Who holds the session's turn, and until when at the latest: a crashed web process must not keep it forever.
    Column("turn_owner", Text),
    _time("turn_until", nullable=True),
    _time("created_at"),
)

session_turns = Table(
    "session_turns",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True),
    Column("turn", Integer, primary_key=True),
    Column("items", LargeBinary, nullable=False, comment="encrypted JSON list of Responses items"),
    _time("created_at"),
)

RunState = Literal[
    "pending",
    "scored",
    "not_selected",
    "sampled_out",
    "budget_skipped",
    "redaction_blocked",
    "dropped",
    "failed",
    "erased",
]
RUN_STATES: tuple[str, ...] = get_args(RunState)

runs = Table(
    "runs",
    metadata,
    Column("trace_id", Text, primary_key=True, comment="MLflow's trace id, tr-<32 hex>"),
    Column("agent", Text, nullable=False),
    Column("agent_version", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("status", Text, nullable=False, comment="ok or error: how the run ended for the client"),
    Column("offline", Boolean, nullable=False, comment="an offline model answered"),
    Column("state", Text, nullable=False),
    Column("reason", Text, comment="for dropped and failed: why"),
    Column("inclusion_probability", Double, nullable=False),
    _time("started_at", default_now=False),
    Column("duration_ms", Double, nullable=False),
    Column("scored_by", Integer, nullable=False, server_default="0", comment="scorers that gave a verdict"),
    _time("updated_at"),
    CheckConstraint(f"state IN ({', '.join(repr(state) for state in RUN_STATES)})", name="state"),
    Index("ix_runs_started_at", "started_at"),
    Index("ix_runs_session", "session_id", "started_at"),
    Index("ix_runs_pending", "updated_at", postgresql_where=text("state = 'pending'")),
)

run_drops = Table(
    "run_drops",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("agent", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("count", Integer, nullable=False),
    _time("noted_at"),
    Index("ix_run_drops_noted_at", "noted_at"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("trace_id", Text, ForeignKey("runs.trace_id", ondelete="CASCADE"), primary_key=True),
    Column("position", BigInteger, Identity(), nullable=False),
    Column("payload", LargeBinary, nullable=False, comment="redacted, encrypted trace (gateway.tracing.spans)"),
    # The evaluator that works on it. A claim counts only while that evaluator holds its advisory lock.
    Column("claimed_by", Integer),
    Column("attempts", Integer, nullable=False, server_default="0", comment="claims"),
    Column("refusals", Integer, nullable=False, server_default="0", comment="failures while MLflow was well"),
    _time("retry_at"),
    _time("created_at"),
    Index("ix_outbox_position", "position"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("agent", Text, nullable=False),
    _time("last_turn_at", default_now=False),
    # When it counts as ended and is to be scored; NULL: nothing new since it was scored.
    _time("due_at", nullable=True),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Index("ix_conversations_due_at", "due_at"),
)

scores = Table(
    "scores",
    metadata,
    Column("score_id", Text, primary_key=True, comment="also the id of the MLflow assessment"),
    Column("trace_id", Text, nullable=False, comment="for a conversation's score: its first trace"),
    Column("session_id", Text, comment="set for a conversation's score"),
    Column("agent", Text, nullable=False),
    Column("scorer", Text, nullable=False),
    Column("scorer_version", Text, nullable=False),
    Column("name", Text, nullable=False, comment="name of the assessment; a scorer may give several"),
    Column("value", JSONB),
    Column("passed", Boolean, comment="NULL: no verdict, or the scorer failed"),
    Column("rationale", Text),
    Column("error", Text, comment="the scorer failed: type and message"),
    Column("source_type", Text, nullable=False, comment="CODE or LLM_JUDGE"),
    Column("source_id", Text, nullable=False, comment="scorer or judge model"),
    Column(
        "details", JSONB, nullable=False, server_default="{}", comment="assessment metadata: judge's cost and tokens"
    ),
    Column("turns", Integer, comment="turns of the conversation when it was scored"),
    Column("latest", Boolean, nullable=False, server_default=text("true")),
    _time("created_at"),
    _time("logged_at", nullable=True),
    Index("ix_scores_trace_id", "trace_id"),
    Index("ix_scores_created_at", "created_at"),
    Index("ix_scores_session_id", "session_id"),
)

dataset_rows = Table(
    "dataset_rows",
    metadata,
    Column("dataset", Text, primary_key=True),
    Column("trace_id", Text, primary_key=True),
    Column("scorers", JSONB, nullable=False, comment="scorer name to value, of the scorers that failed it"),
    _time("created_at"),
    _time("merged_at", nullable=True),
)

evaluators = Table(
    "evaluators",
    metadata,
    Column("evaluator_id", Integer, Identity(), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    _time("started_at"),
    _time("heartbeat_at"),
)
