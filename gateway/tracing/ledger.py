"""The ledger: every run that was served ends in exactly one state, and the states add up.

``pending`` is the only passing state. A run of which not even a row could be kept (the buffer was full) is counted by
reason in ``run_drops`` and belongs to ``dropped``.
"""

from gateway.storage.schema import RunState

State = RunState

MEANING: dict[State, str] = {
    "pending": "on its way to MLflow and the scorers",
    "scored": "at least one scorer gave a verdict",
    "not_selected": "kept, but no scorer was drawn or applied",
    "sampled_out": "its session was not sampled",
    "budget_skipped": "kept, but the judges' budget was used up",
    "redaction_blocked": "withheld, since the redactor failed on it",
    "dropped": "lost before it reached the database",
    "failed": "could not be stored or scored after all retries",
    "erased": "forgotten on request",
}

FUNNEL = """
    SELECT state, count(*) AS runs, coalesce(reason, '') AS reason
    FROM runs WHERE started_at >= %(since)s GROUP BY state, reason
    UNION ALL
    SELECT 'dropped', sum(count), reason FROM run_drops WHERE noted_at >= %(since)s GROUP BY reason
"""
"""Runs by state and reason since ``since``."""
