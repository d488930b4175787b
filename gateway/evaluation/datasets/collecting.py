"""What scores put into datasets: asked as soon as they are stored, in the transaction that settles them."""

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg.rows import class_row

from gateway.dataset_rules import DatasetRule
from gateway.evaluation.datasets import rows
from gateway.evaluation.datasets.rows import Connection, Wanted
from gateway.evaluation.datasets.rules import Rules, Verdict, dataset_of, reasons
from gateway.evaluation.scoring import Score

_SHORT = "scorers."


async def collect(
    connection: Connection, scores: Sequence[Score], targets: Mapping[str, str | None], rules: Rules, trace_id: str
) -> None:
    """Note the trace for the datasets that its scores put it into.

    Args:
        connection: within a transaction that excludes erasures, after the scores were stored.
        scores: new ones of the trace, or of the conversation that it is the last trace of; as they are stored.
        targets: the short form of a rule, ``[scorers.<name>] dataset``: where goes what the scorer fails.
        rules: of the settings.
        trace_id: the trace.
    """
    wanted: dict[str, Wanted] = {}
    for score in scores:
        if score.passed is False and (dataset := targets.get(score.scorer)) is not None:
            _add(wanted, dataset, trace_id, f"{_SHORT}{score.scorer}", [score])
    for name, rule in rules.items():
        if rule.source == "scores" and (met := await _met(connection, rule, scores, trace_id)):
            _add(wanted, dataset_of(name, rule), trace_id, name, met, whole_session=rule.whole_session)
    if wanted:
        await rows.note(connection, await _with_probabilities(connection, list(wanted.values())))


async def still_wanted(connection: Connection, rule: DatasetRule, agent: str, trace_id: str) -> bool:
    """Whether a rule that wants all to have passed takes a whole session, now that it is over."""
    return bool(reasons(rule, agent, await _verdicts(connection, trace_id, whole_session=True)))


async def _met(connection: Connection, rule: DatasetRule, scores: Sequence[Score], trace_id: str) -> list[Score]:
    """Return those of the scores for which the rule takes the trace."""
    if not scores:
        return []
    verdicts = {Verdict(each.name, each.scorer, _hashable(each.value), each.passed): each for each in scores}
    if not rule.wants_all:
        return [verdicts[each] for each in reasons(rule, scores[0].agent, verdicts)]
    mine = [each for verdict, each in verdicts.items() if {verdict.name, verdict.by} & set(rule.scorers or ())]
    if not mine:
        return []
    known = await _verdicts(connection, trace_id, whole_session=rule.whole_session)
    return mine if reasons(rule, scores[0].agent, known) else []


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


async def _verdicts(connection: Connection, trace_id: str, *, whole_session: bool) -> list[Verdict]:
    """Return all that is known of a trace and its conversation; of all its turns if it is about the whole session."""
    async with connection.cursor(row_factory=class_row(Verdict)) as cursor:
        await cursor.execute(_VERDICTS, {"trace_id": trace_id, "whole": whole_session})
        return await cursor.fetchall()


def _add(
    wanted: dict[str, Wanted],
    dataset: str,
    trace_id: str,
    rule: str,
    scores: Sequence[Score],
    *,
    whole_session: bool = False,
) -> None:
    """Add the reasons to what is wanted for the dataset; the first rule that wants it gives its name."""
    known = wanted.setdefault(dataset, Wanted(dataset, trace_id, rule, whole_session, {}, {}))
    wanted[dataset] = known._replace(whole_session=known.whole_session or whole_session)
    for score in scores:
        known.scorers[score.name] = score.value
        known.provenance[score.name] = {
            "scorer": score.scorer,
            "version": score.scorer_version,
            "value": score.value,
            "score_id": score.score_id,
        }


async def _with_probabilities(connection: Connection, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
    """Add with what probability each score exists."""
    reasons_given = [reason for each in wanted for reason in each.provenance.values()]
    cursor = await connection.execute(
        "SELECT score_id, inclusion_probability FROM scores WHERE score_id = ANY(%s)",
        [[reason["score_id"] for reason in reasons_given]],
    )
    probabilities = dict(await cursor.fetchall())
    for reason in reasons_given:
        reason["probability"] = probabilities.get(reason["score_id"])
    return wanted


_VERDICTS = """
    WITH mine AS (SELECT trace_id, session_id FROM runs WHERE trace_id = %(trace_id)s)
    SELECT name, scorer AS by, value, passed FROM scores WHERE latest AND session_id IS NULL AND (
        trace_id = %(trace_id)s OR %(whole)s AND trace_id IN (
            SELECT runs.trace_id FROM runs JOIN mine USING (session_id) WHERE session_id <> ''))
    UNION ALL
    SELECT name, scorer AS by, value, passed FROM scores JOIN mine USING (session_id)
    WHERE latest AND session_id <> ''
"""
