"""Asks one scorer: whether it applies, with what it is shown, and how it failed if it did."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mlflow.entities import Trace
from mlflow.genai.scorers import KnowledgeRetention
from mlflow.genai.scorers.base import Scorer
from mlflow.utils.timeout import MlflowTimeoutError
from requests.exceptions import RequestException

from gateway.evaluation.applicability import expectations_of, root_of, why_not_session, why_not_trace
from gateway.evaluation.bounds import Bounds, bounded_session, shown_trace, spans_read
from gateway.evaluation.retention import Earlier, judge_retention
from gateway.evaluation.threads import GivenUp

FailureKind = Literal["timeout", "unavailable", "raised"]

_LATER = frozenset({408, 429})
_SERVER_ERROR = 500


class Said(NamedTuple):
    """What a scorer returned."""

    value: Any
    left_out: str | None = None
    """What a judge was not shown of a long trace or conversation; ``None``: nothing."""


def ask_of_trace(scorer: Scorer, trace: Trace, bounds: Bounds | None) -> Said | str:
    """Return what the scorer says of a trace, or why it does not apply. It gets what MLflow's `evaluate` gives it.

    Args:
        scorer: of traces.
        trace: with the expectations on it.
        bounds: of what it is shown; ``None``: everything, as plain code is.
    """
    expectations = expectations_of(trace)
    if reason := why_not_trace(scorer, trace, expectations):
        return reason
    left_out = None
    if bounds is not None:
        trace, left_out = shown_trace(scorer, trace, bounds)
    root = root_of(trace)
    value = scorer.run(inputs=root.inputs, outputs=root.outputs, expectations=expectations, trace=trace)
    return Said(value, left_out)


def ask_of_session(
    scorer: Scorer, traces: Sequence[Trace], bounds: Bounds | None, earlier: Earlier | None
) -> Said | str:
    """Return what the scorer says of a conversation, or why it does not apply.

    Args:
        scorer: of conversations.
        traces: the turns, the first one first, with the expectations on it.
        bounds: of what it is shown; ``None``: everything, as plain code is.
        earlier: what was said of the first turns, for `KnowledgeRetention`.
    """
    expectations = expectations_of(traces[0], of_session=True)
    if reason := why_not_session(scorer, traces, expectations):
        return reason
    if isinstance(scorer, KnowledgeRetention):
        return Said(judge_retention(scorer, traces, bounds or Bounds(), earlier))
    shown, left_out = list(traces), None
    if bounds is not None:
        shown, left_out = bounded_session(shown, spans_read(scorer), bounds.call_characters)
    return Said(scorer.run(session=shown, expectations=expectations or None), left_out)


def kind_of(error: BaseException) -> tuple[FailureKind, int | None]:
    """Return what kind of failure it is, and the HTTP status at its bottom, if there is one."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, GivenUp | MlflowTimeoutError):
            return "timeout", None
        status = getattr(each, "status_code", None)
        if isinstance(status, int):
            return ("unavailable" if status in _LATER or status >= _SERVER_ERROR else "raised"), status
        if isinstance(each, RequestException):
            return "unavailable", None
        each = each.__cause__ or each.__context__
    return "raised", None
