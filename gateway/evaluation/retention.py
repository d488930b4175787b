"""`KnowledgeRetention` at a cost that grows with the turns, not with their square.

MLflow asks its judge once a turn, each time with everything before it, and does so again for all turns whenever the
conversation is scored. Here a turn that was judged when the conversation was scored before is not asked about again:
what was before it has not changed, so neither has the question. Of the turns that are new no more than a fixed number
is asked about, the newest, and what one call holds is bounded as for every judge. A conversation that is short, and
scored for the first time, costs and gives what it does in MLflow.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mlflow.entities import AssessmentSource, AssessmentSourceType, Feedback, Trace
from mlflow.genai.judges.utils import get_default_model
from mlflow.genai.scorers import KnowledgeRetention
from mlflow.tracing.constant import AssessmentMetadataKey

from gateway.evaluation.bounds import SHORTENED, Bounds, bounded_session, spans_read
from gateway.evaluation.values import as_declared

JUDGED_UNTIL = "gateway.judged_until"
"""Metadata of a score: the trace of the last turn that was asked about."""

_COSTS = (
    AssessmentMetadataKey.JUDGE_COST,
    AssessmentMetadataKey.JUDGE_INPUT_TOKENS,
    AssessmentMetadataKey.JUDGE_OUTPUT_TOKENS,
)


class Earlier(NamedTuple):
    """What is known of the conversation's first turns."""

    judged_until: str
    """Trace id of the last of them."""
    forgot: bool
    """Something was forgotten in one of them."""


def judge_retention(
    scorer: KnowledgeRetention, traces: Sequence[Trace], bounds: Bounds, earlier: Earlier | None = None
) -> Feedback:
    """Return whether the agent remembered what it was told: ``no`` if it forgot something in any turn.

    Args:
        scorer: whose judge and name are used.
        traces: the turns of the conversation, all of them.
        bounds: of turns, and of the text in a call.
        earlier: what this scorer, in this version, said of the conversation before; ``None``: nothing.

    Raises:
        Nonsense: the judge answered neither ``yes`` nor ``no``.
        MlflowException: the judge could not be asked, as MLflow raises it.
    """
    ordered = sorted(traces, key=lambda trace: trace.info.request_time)
    known = [trace.info.trace_id for trace in ordered]
    if earlier is not None and earlier.judged_until not in known:
        earlier = None  # that turn was forgotten meanwhile: what was said may be about it
    begin = known.index(earlier.judged_until) + 1 if earlier else 0
    asked = range(max(begin, len(ordered) - bounds.retention_turns), len(ordered))
    said: list[tuple[int, Feedback]] = []
    shortened = 0
    for turn in asked:
        session, left_out = bounded_session(ordered[: turn + 1], spans_read(scorer), bounds.call_characters)
        feedback = scorer.last_turn_scorer(session=session)
        feedback.value = as_declared(feedback.value, Literal["yes", "no"])
        said.append((turn, feedback))
        shortened += left_out is not None
    forgot = (earlier is not None and earlier.forgot) or any(each.value == "no" for _, each in said)
    unseen = [f"turns {begin + 1} to {asked.start} of {len(ordered)} not judged"] if asked.start > begin else []
    unseen += [f"{shortened} calls with turns left out or shortened"] if shortened else []
    return Feedback(
        name=scorer.name,
        value="no" if forgot else "yes",
        rationale="\n".join([*_before(begin, earlier), *unseen, *(_line(turn, each) for turn, each in said)]),
        source=AssessmentSource(AssessmentSourceType.LLM_JUDGE, scorer.model or get_default_model()),
        metadata={
            JUDGED_UNTIL: known[-1],
            **_costs([each for _, each in said]),
            **({SHORTENED: ", ".join(unseen)} if unseen else {}),
        },
    )


def _before(turns: int, earlier: Earlier | None) -> list[str]:
    if earlier is None:
        return []
    return [f"Turns 1 to {turns}, as judged before: {'no' if earlier.forgot else 'yes'}"]


def _line(turn: int, feedback: Feedback) -> str:
    return f"Turn {turn + 1}: {feedback.value}. {feedback.rationale or ''}".rstrip()


def _costs(feedbacks: Sequence[Feedback]) -> dict[str, Any]:
    """Return what the calls cost together; nothing of what not all of them report."""
    reports = [feedback.metadata or {} for feedback in feedbacks]
    told = [name for name in _COSTS if reports and all(name in each for each in reports)]
    return {name: sum(each[name] for each in reports) for name in told}
