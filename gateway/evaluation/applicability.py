"""What a scorer needs of what it scores: where that is missing it does not apply, and is not asked.

MLflow's judges raise there, or spend calls of the model on guessing what is missing. A judge of retrieval on a turn
that retrieved nothing, or a comparison with an expectation that nobody has stated, is no failure of the scorer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Span, SpanType, Trace
from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.scorers.base import Scorer
from mlflow.genai.scorers.builtin_scorers import (
    BuiltInScorer,
    ConversationalToolCallEfficiency,
    MissingColumnsException,
    RetrievalGroundedness,
    RetrievalRelevance,
    RetrievalSufficiency,
    ToolCallCorrectness,
    ToolCallEfficiency,
)
from mlflow.tracing.constant import TraceMetadataKey

NO_ANSWER = "the run gave no answer"
NO_RETRIEVAL = "the trace has no RETRIEVER span"
NO_TOOL_CALL = "no tool was called"

_EXPECTATIONS = "expectations/"
_RETRIEVAL_JUDGES = (RetrievalGroundedness, RetrievalRelevance, RetrievalSufficiency)
_TOOL_JUDGES = (ToolCallCorrectness, ToolCallEfficiency)


def root_of(trace: Trace) -> Span:
    """Return the span of the run as a whole."""
    return next((span for span in trace.data.spans if span.parent_id is None), trace.data.spans[0])


def expectations_of(trace: Trace, of_session: bool = False) -> dict[str, Any]:
    """Return what was stated as expected: MLflow's expectations on the trace, by name, of any source.

    Args:
        trace: as MLflow gives it, with its assessments.
        of_session: those on the conversation that begins with this trace instead of those on the trace itself. They
            name the session in their metadata, as MLflow has it.
    """
    return {
        each.name: each.expectation.value
        for each in trace.info.assessments or []
        if each.expectation is not None
        and each.valid is not False  # corrected by a later one
        and (TraceMetadataKey.TRACE_SESSION in (each.metadata or {})) == of_session
    }


def why_not_trace(scorer: Scorer, trace: Trace, expectations: Mapping[str, Any]) -> str | None:
    """Return why a scorer does not apply to a trace; ``None`` if it does, as far as can be told before it runs."""
    if isinstance(scorer, _RETRIEVAL_JUDGES) and not _has(trace, SpanType.RETRIEVER):
        return NO_RETRIEVAL
    # That calls were expected can be judged where there are none.
    awaited = isinstance(scorer, ToolCallCorrectness) and bool(expectations.get("expected_tool_calls"))
    if isinstance(scorer, _TOOL_JUDGES) and not _has(trace, SpanType.TOOL) and not awaited:
        return NO_TOOL_CALL
    has_answer = root_of(trace).outputs is not None
    if isinstance(scorer, BuiltInScorer):
        return _missing_columns(scorer, has_answer, expectations)
    if isinstance(scorer, InstructionsJudge):
        variables = scorer.template_variables
        if "outputs" in variables and "trace" not in variables and not has_answer:
            return NO_ANSWER
        if "expectations" in variables and not expectations:
            return "the trace has no expectations"
    return None


def why_not_session(scorer: Scorer, traces: Sequence[Trace], expectations: Mapping[str, Any]) -> str | None:
    """Return why a scorer does not apply to a conversation; ``None`` if it does."""
    if isinstance(scorer, ConversationalToolCallEfficiency) and not any(_has(each, SpanType.TOOL) for each in traces):
        return NO_TOOL_CALL
    if isinstance(scorer, InstructionsJudge) and "expectations" in scorer.template_variables and not expectations:
        return "the conversation has no expectations"
    return None


def _has(trace: Trace, span_type: str) -> bool:
    return any(span.span_type == span_type for span in trace.data.spans)


def _missing_columns(scorer: BuiltInScorer, has_answer: bool, expectations: Mapping[str, Any]) -> str | None:
    """Return what is missing by the built-in's own rule, which `mlflow.genai.evaluate` warns by."""
    columns = {"inputs", "trace", *({"outputs"} if has_answer else ())}
    try:
        scorer.validate_columns(columns | {f"{_EXPECTATIONS}{name}" for name in expectations})
    except MissingColumnsException as error:
        missing = ", ".join(sorted(str(each) for each in error.missing_columns))
        if _EXPECTATIONS in missing:
            return f"the trace has no expectation {missing.replace(_EXPECTATIONS, '')}"
        return NO_ANSWER if missing == "outputs" else f"the trace has no {missing}"
    return None
