"""Which of the rows that wait are taken: by tags, by the daily cap, and by what is there already."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from mlflow.entities import Trace as MlflowTrace

from gateway.dataset_rules import DatasetRule
from gateway.evaluation.datasets import rows
from gateway.evaluation.datasets.collecting import still_wanted
from gateway.evaluation.datasets.conversion import record, said_of
from gateway.evaluation.datasets.replay import tools_of
from gateway.evaluation.datasets.rows import Connection, Row
from gateway.evaluation.datasets.rules import Rules, limits_of
from gateway.evaluation.datasets.similarity import Signature, signature, similarity
from gateway.tracing.redaction.redactor import Redactor

_MOST_ORIGINS = 20  # traces that one row of equal inputs tells of: each costs it a tag


class Chosen(NamedTuple):
    """A row that is to be merged."""

    row: Row
    record: dict[str, Any]
    signature: bytes
    annotated_at: datetime | None
    """When somebody last said something of its trace; ``None``: nobody did."""


class LeftOut(NamedTuple):
    """A row that is not to be merged."""

    row: Row
    why: str
    similar_to: str | None


class _Candidate(NamedTuple):
    row: Row
    trace: MlflowTrace
    record: dict[str, Any]
    signature: Signature


class _Known(NamedTuple):
    trace_id: str
    agent: str
    session_id: str
    signature: Signature


class Choice:
    """Chooses among the rows that wait for one dataset. One a batch; the caller holds the dataset's lock."""

    def __init__(self, connection: Connection, dataset: str, rules: Rules, redactor: Redactor | None):
        """Take the parts; ``redactor`` as for `conversion.record`."""
        self._connection = connection
        self._dataset = dataset
        self._rules = rules
        self._redactor = redactor
        self._today = 0
        self._known: list[_Known] = []  # newest first
        self._whole_sessions: set[str] = set()
        self.left_out: list[LeftOut] = []
        """What is not taken, though a rule wants it."""
        self.unmeant: list[str] = []
        """Traces that no rule wants, now that all of them is known."""

    async def of(self, waiting: Sequence[tuple[Row, MlflowTrace]]) -> list[Chosen]:
        """Return the rows to merge, with their records. Nothing is written: others wait for the rows meanwhile."""
        candidates = await asyncio.to_thread(lambda: [self._candidate(row, trace) for row, trace in waiting])
        self._known = [
            _Known(each.trace_id, each.agent, each.session_id, Signature.decode(each.signature))
            for each in await rows.known(self._connection, self._dataset)
        ]
        self._today = await rows.taken_today(self._connection, self._dataset)
        chosen = [each for each in candidates if await self._is_taken(each)]
        return [Chosen(each.row, each.record, each.signature.encode(), _annotated_at(each.trace)) for each in chosen]

    def _candidate(self, row: Row, trace: MlflowTrace) -> _Candidate:
        made = record(row, trace, self._redactor)
        return _Candidate(row, trace, made, signature(made["inputs"], tools_of(trace)))

    async def _is_taken(self, candidate: _Candidate) -> bool:
        row = candidate.row
        if row.is_taken or row.session_of or row.session_id in self._whole_sessions:
            return True
        rule = limits_of(self._rules, row.rule, self._dataset)
        if not await self._is_meant(rule, candidate):
            self.unmeant.append(row.trace_id)
            return False
        if rule.max_per_day is not None and self._today >= rule.max_per_day:
            self.left_out.append(LeftOut(row, rows.DAILY_CAP, None))
            return False
        alike = await asyncio.to_thread(self._alike, rule, candidate)
        if alike is not None:
            self.left_out.append(LeftOut(row, rows.SIMILAR, alike))
            return False
        self._today += 1
        self._known.insert(0, _Known(row.trace_id, row.agent, row.session_id, candidate.signature))
        if row.whole_session and row.session_id:
            self._whole_sessions.add(row.session_id)
        return True

    async def _is_meant(self, rule: DatasetRule, candidate: _Candidate) -> bool:
        """Whether the rule means this trace, now that all of it is there to be seen."""
        tags, row = candidate.trace.info.tags, candidate.row
        if any(tags.get(key) != value for key, value in rule.tags.items()):
            return False
        if rule.whole_session and rule.source == "scores" and rule.wants_all:
            return await still_wanted(self._connection, rule, row.agent, row.trace_id)
        return True

    def _alike(self, rule: DatasetRule, candidate: _Candidate) -> str | None:
        """Return the trace of a row that is so like this one that it adds nothing; ``None``: there is none.

        Of equal inputs MLflow makes one row, which then tells of both traces: some of these are let through. The newest
        come first, and the first that is like it ends the search: when something breaks, hundreds are.
        """
        if rule.similar_at_least is None:
            return None
        row, mine = candidate.row, candidate.signature
        others = [
            each
            for each in self._known
            if each.agent == row.agent
            and each.trace_id != row.trace_id
            and not (row.whole_session and each.session_id == row.session_id)
        ]
        equal = [each.trace_id for each in others if each.signature.inputs == mine.inputs]
        if equal:
            return equal[0] if len(equal) >= _MOST_ORIGINS else None
        return next(
            (each.trace_id for each in others if similarity(mine, each.signature) >= rule.similar_at_least), None
        )


def _annotated_at(trace: MlflowTrace) -> datetime | None:
    return max((each.said_at for each in said_of(trace.info)), default=None)
