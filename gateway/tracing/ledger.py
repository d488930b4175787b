"""The ledger: every run that was served ends in exactly one state, and the states add up.

``pending`` is the only passing state. A run of which not even a row could be kept (the buffer was full, a crash) is
counted by reason in ``run_drops`` and belongs to ``dropped``. Whether they add up, `gateway.tracing.balance` tells.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import LiteralString, cast

import msgspec
import psycopg
from psycopg.rows import DictRow

from gateway.storage.schema import RunState

State = RunState

MEANING: dict[State, str] = {
    "pending": "on its way to MLflow and the scorers, or held",
    "scored": "at least one scorer gave a verdict",
    "not_selected": "kept, but no scorer was drawn or applied",
    "sampled_out": "its session was not sampled",
    "budget_skipped": "kept, but the judges' budget was used up, or the machine too busy",
    "redaction_blocked": "withheld, since the redactor failed on it",
    "dropped": "lost before it reached the database",
    "failed": "could not be stored or scored after all retries",
    "erased": "forgotten on request",
}


class StateCount(msgspec.Struct):
    """Runs in one state of the ledger."""

    state: State
    meaning: str
    """The state in plain words."""
    runs: int
    share: float | None
    """Share of all runs of the window, 0 to 1; ``None`` if there were none."""
    reasons: dict[str, int]
    """Runs by reason, most first, where the ledger names one (``dropped``, ``failed``, ``sampled_out``,
    ``budget_skipped``)."""


class Pending(msgspec.Struct):
    """What the pending runs wait for."""

    evaluator: int
    """Wait in the outbox for an evaluator, or are in its hands."""
    held: int
    """Of sessions that are not sampled: kept until the conversation is over, in case a tail rule is met."""
    judges: int
    """In MLflow; their judges are at work."""

    @property
    def reasons(self) -> dict[str, int]:
        """The same in words, without what is 0."""
        found = {"waiting": self.evaluator, "held": self.held, "judging": self.judges}
        return {reason: runs for reason, runs in found.items() if runs}


class Funnel(msgspec.Struct):
    """Runs by what became of them."""

    total: int
    """Runs served: the sum over all states."""
    scored_share: float | None
    """Share of the runs that all quality figures speak for, 0 to 1; ``None`` if there were no runs."""
    states: list[StateCount]
    """Every state, also those with no run, in the order of the ledger."""


class Ledger(Funnel):
    """What became of the runs that were served."""

    pending: Pending
    kept_because: dict[str, int]
    """Runs by why their conversation is kept, most first: ``sampled``, and the tail rules that it met. One run may
    have several reasons."""

    def reasons(self, count: StateCount) -> dict[str, int]:
        """Return why runs are in a state, or what they wait for there, with how many."""
        return self.pending.reasons if count.state == "pending" else count.reasons


class AgentFunnel(Funnel):
    """What became of the runs of one agent."""

    agent: str


class Waiting(msgspec.Struct):
    """What is in the outbox now, whenever it was served."""

    traces: int
    """Traces that wait for an evaluator, or are in its hands."""
    oldest_s: float | None
    """Seconds that the oldest of them has waited; ``None`` if there is none."""
    held: int
    """Traces of sessions that are not sampled."""
    held_bytes: int


class Swept(msgspec.Struct):
    """Runs that a sweeper brought to their state, since nobody else would have."""

    state: State
    reason: str | None
    runs: int
    last_at: datetime


SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
"""First statement of a transaction that reads figures: they all are of one moment, and agree."""

Cursor = psycopg.AsyncCursor[DictRow]


async def read_ledger(cursor: Cursor, since: datetime) -> tuple[Ledger, list[AgentFunnel]]:
    """Return what became of the runs that started since, of all and by agent, by name.

    The cursor's transaction is one that began with `SNAPSHOT`, or parts of the answer may not agree.
    """
    rows = [(row["agent"], row["state"], row["reason"], int(row["runs"])) for row in await _all(cursor, _FUNNEL, since)]
    [pending] = await _all(cursor, _PENDING, since)
    kept = {row["reason"]: row["runs"] for row in await _all(cursor, _KEPT, since)}
    ledger = Ledger(*_funnel(row[1:] for row in rows), pending=Pending(**pending), kept_because=kept)
    agents = sorted({agent for agent, *_ in rows})
    return ledger, [AgentFunnel(*_funnel(row[1:] for row in rows if row[0] == agent), agent=agent) for agent in agents]


async def read_waiting(cursor: Cursor) -> Waiting:
    """Return what is in the outbox."""
    [row] = await _all(cursor, _WAITING)
    return Waiting(**row)


async def read_swept(cursor: Cursor, since: datetime) -> list[Swept]:
    """Return what sweepers did with the runs that started since, the last first."""
    return msgspec.convert(await _all(cursor, _SWEPT, since), list[Swept])


async def _all(cursor: Cursor, statement: LiteralString, since: datetime | None = None) -> list[DictRow]:
    await cursor.execute(statement, {"since": since})
    return await cursor.fetchall()


def _funnel(rows: Iterable[tuple[str, str, int]]) -> tuple[int, float | None, list[StateCount]]:
    """Return the fields of a `Funnel`, of rows of state, reason and runs; a state that no row names has no runs."""
    reasons: dict[State, dict[str, int]] = {state: {} for state in MEANING}
    for state, reason, runs in sorted(rows, key=lambda row: -row[2]):
        of_state = reasons[cast("State", state)]
        of_state[reason] = of_state.get(reason, 0) + runs
    counts = {state: sum(of_state.values()) for state, of_state in reasons.items()}
    total = sum(counts.values())
    states = [
        StateCount(
            state=state,
            meaning=meaning,
            runs=counts[state],
            share=counts[state] / total if total else None,
            reasons={
                reason: runs for reason, runs in sorted(reasons[state].items(), key=lambda each: -each[1]) if reason
            },
        )
        for state, meaning in MEANING.items()
    ]
    return total, counts["scored"] / total if total else None, states


_FUNNEL = """
    SELECT agent, state, coalesce(reason, '') AS reason, count(*) AS runs
    FROM runs WHERE started_at >= %(since)s GROUP BY agent, state, reason
    UNION ALL
    SELECT agent, 'dropped', reason, sum(count) FROM run_drops WHERE noted_at >= %(since)s GROUP BY agent, reason
"""
_PENDING = """
    SELECT count(*) FILTER (WHERE NOT held) AS evaluator, count(*) FILTER (WHERE held) AS held,
           count(*) FILTER (WHERE held IS NULL) AS judges
    FROM runs LEFT JOIN outbox USING (trace_id) WHERE state = 'pending' AND started_at >= %(since)s
"""
# Lists that are the same are counted first: they are few.
_KEPT = """
    SELECT reason, sum(runs)::bigint AS runs
    FROM (SELECT kept_because, count(*) AS runs FROM runs WHERE started_at >= %(since)s GROUP BY kept_because) AS kept,
         jsonb_array_elements_text(kept_because) AS reason
    GROUP BY reason ORDER BY runs DESC, reason
"""
_WAITING = """
    SELECT count(*) FILTER (WHERE NOT held) AS traces,
           extract(epoch FROM now() - min(created_at) FILTER (WHERE NOT held))::float8 AS oldest_s,
           count(*) FILTER (WHERE held) AS held,
           coalesce(sum(octet_length(payload)) FILTER (WHERE held), 0)::bigint AS held_bytes
    FROM outbox
"""
_SWEPT = """
    SELECT state, reason, count(*) AS runs, max(swept_at) AS last_at
    FROM runs WHERE started_at >= %(since)s AND swept_at IS NOT NULL AND state <> 'pending'
    GROUP BY state, reason ORDER BY last_at DESC
"""
