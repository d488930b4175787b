"""The tables of database ``gateway``.

``web_processes``                 which web processes live, shown by an advisory lock each
``api_keys``                      who may call the API; hashes, never keys
``key_budgets``, ``key_slots``    what is left of a key's requests a minute, and who holds its slots
``sessions``, ``session_turns``   conversation memory: encrypted, a row a turn
``session_waiters``               requests that wait for a session's turn, in order
``responses``                     stored answers of the Responses API: encrypted
``paused_runs``, ``approvals``    runs that wait for a person's decision: encrypted, each used once
``idempotency_keys``              answers that are given again for the same key: encrypted
``erasures``, ``erased_sessions`` what was asked to be forgotten, and what was removed
``runs``                          the ledger: one row a run, its state, never its text
``run_drops``                     runs of which not even a row could be kept, counted
``run_counts``                    runs that each web process began to serve, counted apart from the rows
``sampled_sessions``              whether a session is kept, decided at its first turn, and the tail rules it met
``outbox``                        finished traces (redacted, encrypted) on their way to MLflow, or held
``otlp_outbox``                   the same, on their way to the second destination
``conversations``                 when a conversation is due to be scored
``scores``                        every score, the truth of which MLflow's assessments are the projection
``scorings``                      what scorers are still to say, and what became of it
``judge_spending``                what each judge model cost, by the hour
``dataset_rows``                  what goes into which dataset and why, and what was left out
``dataset_marks``                 until when MLflow was looked through for what people say
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
    PrimaryKeyConstraint,
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


ANONYMOUS = "anonymous"
"""Stands for the key of requests that came without one."""


def _key_id() -> Column[str]:
    """Return the column of the API key that a row belongs to."""
    return Column("key_id", Text, nullable=False, server_default=ANONYMOUS)


web_processes = Table(
    "web_processes",
    metadata,
    Column("process_id", Integer, Identity(), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    _time("started_at"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False, comment="SHA-256 of the key, which has 256 random bits"),
    Column("scopes", JSONB, nullable=False, comment="list of invoke, feedback, ops, admin"),
    Column("agents", JSONB, comment="list of the agents that it may use; NULL: all"),
    Column("requests_per_minute", Integer, comment="NULL: what the setting says"),
    Column("concurrency", Integer, comment="NULL: what the setting says"),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
)

key_budgets = Table(
    "key_budgets",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("tokens", Double, nullable=False, comment="requests that nobody has leased yet"),
    _time("refilled_at"),
)

key_slots = Table(
    "key_slots",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("process_id", Integer, primary_key=True),
    Column("slots", Integer, nullable=False),
    _time("leased_until", default_now=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    _key_id(),
    Column("user_id", Text, comment="NULL: no request of the session named one"),
    Column("forked_from", Text, comment="the session whose turns its first ones are copies of"),
    Column("turns", Integer, nullable=False, server_default="0"),
    # Who holds the session's turn, and until when at the latest: a crashed web process must not keep it forever.
    Column("turn_owner", Text),
    Column("turn_process", Integer),
    _time("turn_until", nullable=True),
    Column("interrupted", Boolean, nullable=False, server_default=text("false"), comment="the owner is to stop"),
    _time("created_at"),
    _time("used_at"),
    _time("ended_at", nullable=True),
    Index("ix_sessions_user_id", "user_id"),
    Index("ix_sessions_used_at", "used_at"),
    Index("ix_sessions_forked_from", "forked_from"),
)

session_turns = Table(
    "session_turns",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True),
    Column("turn", Integer, primary_key=True),
    Column("items", LargeBinary, nullable=False, comment="encrypted JSON list of Responses items"),
    Column("trace_id", Text, comment="NULL: stored by an earlier version"),
    Column(
        "continues",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="answers tool calls or approvals of the turn before: the two are never cut apart",
    ),
    _time("created_at"),
)

session_waiters = Table(
    "session_waiters",
    metadata,
    Column("ticket", BigInteger, Identity(), primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("process_id", Integer, nullable=False),
    _time("waiting_until", default_now=False),
    Index("ix_session_waiters_session_id", "session_id", "ticket"),
)

responses = Table(
    "responses",
    metadata,
    Column("response_id", Text, primary_key=True),
    _key_id(),
    Column("session_id", Text, nullable=False),
    Column("turn", Integer, comment="turn of the session that it is the answer of; NULL: the turn was not kept"),
    Column("user_id", Text),
    Column("status", Text, nullable=False, comment="queued, in_progress, completed, failed or cancelled"),
    Column("process_id", Integer, comment="web process that runs it in the background"),
    Column("body", LargeBinary, nullable=False, comment="encrypted JSON of the response"),
    Column("input", LargeBinary, nullable=False, comment="encrypted JSON list of the request's items"),
    _time("created_at"),
    Index("ix_responses_session_id", "session_id"),
    Index("ix_responses_user_id", "user_id"),
    Index("ix_responses_created_at", "created_at"),
)

paused_runs = Table(
    "paused_runs",
    metadata,
    Column("trace_id", Text, primary_key=True, comment="of the run that paused"),
    Column("session_id", Text, ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False),
    Column("turn", Integer, nullable=False, comment="turn of the session that the run has left open"),
    Column("agent", Text, nullable=False),
    Column("snapshot", LargeBinary, nullable=False, comment="encrypted JSON of the SDK's run state"),
    _time("created_at"),
    Index("ix_paused_runs_session_id", "session_id"),
)

approvals = Table(
    "approvals",
    metadata,
    Column("approval_id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False),
    Column("trace_id", Text, nullable=False, comment="of the run that paused"),
    Column("call_id", Text, nullable=False),
    # Kept when the paused run is gone, so that a second answer is told from an unknown one.
    Column("used", Boolean, nullable=False, server_default=text("false")),
    _time("created_at"),
    Index("ix_approvals_session_id", "session_id"),
    Index("ix_approvals_trace_id", "trace_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    _key_id(),
    Column("idempotency_key", LargeBinary, nullable=False, comment="keyed hash of what the client sent"),
    Column("request_hash", LargeBinary, nullable=False, comment="keyed hash of method, path and body"),
    Column("owner", Text, nullable=False, comment="the request that runs, or ran, it"),
    Column("process_id", Integer, nullable=False, comment="web process of the owner"),
    Column("session_id", Text, comment="session of the answer; NULL while there is none"),
    Column("answer", LargeBinary, comment="encrypted status, headers and body; NULL while it is under way"),
    _time("created_at"),
    _time("expires_at", default_now=False),
    PrimaryKeyConstraint("key_id", "idempotency_key"),
    Index("ix_idempotency_keys_expires_at", "expires_at"),
    Index("ix_idempotency_keys_session_id", "session_id"),
)

erasures = Table(
    "erasures",
    metadata,
    Column("erasure_id", Text, primary_key=True),
    Column("key_id", Text, comment="API key whose traces were meant; NULL: those of all keys"),
    # Not the id: whoever is forgotten shall not stay as a name in the list of the forgotten.
    Column("user_hash", LargeBinary, comment="SHA-256 of the user's id; NULL: a session was meant"),
    Column("sessions", JSONB, nullable=False, comment="ids of the sessions that were forgotten"),
    Column("trace_ids", JSONB, nullable=False, comment="traces that are to be removed from MLflow"),
    Column("removed", JSONB, nullable=False, comment="what was removed so far, by kind"),
    _time("requested_at"),
    _time("done_at", nullable=True),
    Index("ix_erasures_requested_at", "requested_at"),
    Index("ix_erasures_user_hash", "user_hash"),
    Index("ix_erasures_open", "requested_at", postgresql_where=text("done_at IS NULL")),
)

# A run that ends after its session was forgotten is caught by this on its way into the ledger.
erased_sessions = Table(
    "erased_sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("erasure_id", Text, nullable=False, comment="the last erasure that it was part of"),
    _time("erased_at"),
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
KEPT = "state NOT IN ('sampled_out', 'redaction_blocked', 'dropped', 'erased')"
"""Of a row of ``runs``, in SQL: its trace is in MLflow or on its way there, unless it was lost."""

RUN_STATES: tuple[str, ...] = get_args(RunState)

runs = Table(
    "runs",
    metadata,
    Column("trace_id", Text, primary_key=True, comment="MLflow's trace id, tr-<32 hex>"),
    Column("agent", Text, nullable=False),
    Column("agent_version", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("user_id", Text),
    _key_id(),
    Column("status", Text, nullable=False, comment="ok or error: how the run ended for the client"),
    Column("offline", Boolean, nullable=False, comment="an offline model answered"),
    Column("state", Text, nullable=False),
    Column("reason", Text, comment="of failed, sampled_out and redaction_blocked: why, where there is more to say"),
    Column("inclusion_probability", Double, nullable=False),
    _time("started_at", default_now=False),
    Column("duration_ms", Double, nullable=False),
    Column(
        "kept_because", JSONB, nullable=False, server_default="[]", comment="list: sampled, and the tail rules it met"
    ),
    Column("process_id", Integer, comment="web process that served it; NULL: an earlier version did"),
    Column("scored_by", Integer, nullable=False, server_default="0", comment="scorers that gave a verdict"),
    Column("skips", JSONB, nullable=False, server_default="{}", comment="by scorer that did not score it: why"),
    _time("updated_at"),
    _time("swept_at", nullable=True),
    CheckConstraint(f"state IN ({', '.join(repr(state) for state in RUN_STATES)})", name="state"),
    Index("ix_runs_started_at", "started_at"),
    Index("ix_runs_session", "session_id", "started_at"),
    Index("ix_runs_user_id", "user_id"),
    Index("ix_runs_pending", "updated_at", postgresql_where=text("state = 'pending'")),
)

run_drops = Table(
    "run_drops",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("agent", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("process_id", Integer, comment="web process that served them"),
    _time("noted_at"),
    Index("ix_run_drops_noted_at", "noted_at"),
)

# Written from counters that the web processes keep apart from the rows, so that what a crash took is seen.
run_counts = Table(
    "run_counts",
    metadata,
    Column("process_id", Integer, primary_key=True),
    Column("agent", Text, primary_key=True),
    Column("served", BigInteger, nullable=False, comment="runs that the process has begun to serve"),
    Column("unsettled", BigInteger, nullable=False, server_default="0", comment="those under way, or on the way here"),
    _time("counted_at"),
    # When the process was gone and its counters were settled for good.
    _time("closed_at", nullable=True),
)

# What was decided of a session at its first turn, and what later turns made of it.
sampled_sessions = Table(
    "sampled_sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("rate", Double, nullable=False, comment="rate by which the first turn was drawn"),
    Column("kept", Boolean, nullable=False, comment="the draw keeps it"),
    Column("rules", JSONB, nullable=False, server_default="[]", comment="list of the tail rules that its turns met"),
    _time("promoted_at", nullable=True),
    # When MLflow's tags said so; NULL: there is nothing to say, or it is still to be done.
    _time("projected_at", nullable=True),
    _time("last_run_at"),
    Index("ix_sampled_sessions_last_run_at", "last_run_at"),
    Index(
        "ix_sampled_sessions_unprojected",
        "promoted_at",
        postgresql_where=text("promoted_at IS NOT NULL AND projected_at IS NULL"),
    ),
)

outbox = Table(
    "outbox",
    metadata,
    Column("trace_id", Text, ForeignKey("runs.trace_id", ondelete="CASCADE"), primary_key=True),
    Column("position", BigInteger, Identity(), nullable=False),
    Column("payload", LargeBinary, nullable=False, comment="redacted, encrypted trace (gateway.tracing.spans)"),
    Column("held", Boolean, nullable=False, server_default=text("false"), comment="not sampled: waits for a tail rule"),
    # The evaluator that works on it. A claim counts only while that evaluator holds its advisory lock.
    Column("claimed_by", Integer),
    Column("attempts", Integer, nullable=False, server_default="0", comment="claims"),
    Column("refusals", Integer, nullable=False, server_default="0", comment="failures while MLflow was well"),
    _time("retry_at"),
    _time("created_at"),
    Index("ix_outbox_position", "position", postgresql_where=text("NOT held")),
    Index("ix_outbox_held", "position", postgresql_where=text("held")),
)

# Traces that MLflow has, on their way to the second destination: its outages are none of the first's.
otlp_outbox = Table(
    "otlp_outbox",
    metadata,
    Column("trace_id", Text, ForeignKey("runs.trace_id", ondelete="CASCADE"), primary_key=True),
    Column("payload", LargeBinary, nullable=False, comment="as in the outbox"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    _time("retry_at"),
    _time("created_at"),
    Index("ix_otlp_outbox_retry_at", "retry_at"),
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
    Column("skips", JSONB, nullable=False, server_default="{}", comment="by scorer that did not score it: why"),
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
    Column(
        "inclusion_probability",
        Double,
        nullable=False,
        server_default="1",
        comment="with which it exists, given that its trace was kept",
    ),
    Column("latest", Boolean, nullable=False, server_default=text("true")),
    _time("created_at"),
    _time("logged_at", nullable=True),
    Index("ix_scores_trace_id", "trace_id"),
    Index("ix_scores_created_at", "created_at"),
    Index("ix_scores_session_id", "session_id"),
)

ScoringState = Literal["pending", "scored", "skipped", "failed"]

scorings = Table(
    "scorings",
    metadata,
    Column("subject", Text, primary_key=True, comment="trace id, or session id of a conversation"),
    Column("turns", Integer, primary_key=True, autoincrement=False, comment="turns of the conversation; 0: a trace"),
    Column("scorer", Text, primary_key=True),
    Column("scorer_version", Text, primary_key=True),
    Column("trace_id", Text, nullable=False, comment="trace that the scores are on"),
    Column("agent", Text, nullable=False),
    Column("probability", Double, nullable=False, comment="with which a score exists, given that the trace was kept"),
    Column("state", Text, nullable=False, server_default="pending"),
    Column("reason", Text, comment="of skipped and failed: why; of pending: the last failure"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    _time("due_at"),
    # The evaluator that works on it. A claim counts only while that evaluator holds its advisory lock.
    Column("claimed_by", Integer),
    Column(
        "back_fill",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="of what was served before; goes after all that is live",
    ),
    _time("created_at"),
    _time("updated_at"),
    CheckConstraint(f"state IN ({', '.join(repr(state) for state in get_args(ScoringState))})", name="state"),
    Index("ix_scorings_trace_id", "trace_id"),
    Index("ix_scorings_due", "back_fill", "due_at", postgresql_where=text("state = 'pending'")),
    Index("ix_scorings_failed", "updated_at", postgresql_where=text("state = 'failed'")),
    Index("ix_scorings_skipped", "updated_at", postgresql_where=text("state = 'skipped'")),
)

judge_spending = Table(
    "judge_spending",
    metadata,
    Column("model", Text, primary_key=True),
    Column("hour", DateTime(timezone=True), primary_key=True, comment="its beginning"),
    Column("calls", BigInteger, nullable=False, server_default="0"),
    Column("input_tokens", BigInteger, nullable=False, server_default="0"),
    Column("output_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cost_usd", Double, nullable=False, server_default="0"),
    Column("unpriced_calls", BigInteger, nullable=False, server_default="0", comment="those of unknown price"),
)

dataset_rows = Table(
    "dataset_rows",
    metadata,
    Column("dataset", Text, primary_key=True),
    Column("trace_id", Text, primary_key=True),
    Column("scorers", JSONB, nullable=False, comment="scorer name to value, of the scores that put it there"),
    _time("created_at"),
    # When it was dealt with; NULL: it waits, or waits again since there is more to say of it.
    _time("merged_at", nullable=True),
    Column("rule", Text, comment="that put it there; NULL: an earlier version did"),
    Column("agent", Text),
    Column("provenance", JSONB, nullable=False, server_default="{}", comment="reason's name to where it came from"),
    Column("whole_session", Boolean, nullable=False, server_default=text("false"), comment="its other turns too"),
    Column("session_of", Text, comment="trace whose whole session it is part of"),
    Column("signature", LargeBinary, comment="what its similarity is told by"),
    # When it first went into the dataset, and when a person last said something of it that did as well.
    _time("taken_at", nullable=True),
    _time("annotated_at", nullable=True),
    Column("skipped", Text, comment="why it was left out; NULL: it was not, or waits"),
    Column("similar_to", Text, comment="trace of the row that it is like"),
    Index("ix_dataset_rows_trace_id", "trace_id"),
    Index("ix_dataset_rows_taken_at", "dataset", "taken_at"),
    Index("ix_dataset_rows_waiting", "dataset", postgresql_where=text("merged_at IS NULL")),
    Index("ix_dataset_rows_similar_to", "similar_to", postgresql_where=text("similar_to IS NOT NULL")),
)

# Until when each kind of news in MLflow was looked at.
dataset_marks = Table(
    "dataset_marks",
    metadata,
    Column("name", Text, primary_key=True),
    _time("seen_until", default_now=False),
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
