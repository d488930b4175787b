"""Runs scorers and turns whatever they do into scores: a value, a verdict, or a visible failure, never a crash."""

import hashlib
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import structlog
from mlflow.entities import Assessment, AssessmentError, AssessmentSource, AssessmentSourceType, Feedback
from mlflow.entities import Trace as MlflowTrace
from mlflow.genai.evaluation.utils import standardize_scorer_value
from mlflow.genai.scorers.base import Scorer
from mlflow.tracing.constant import TraceMetadataKey

from gateway.evaluation.asking import FailureKind, Said, ask_of_session, ask_of_trace, kind_of
from gateway.evaluation.bounds import SHORTENED, Bounds
from gateway.evaluation.filters import Reason, TraceFacts, why_not
from gateway.evaluation.judge_models import asks_model
from gateway.evaluation.retention import JUDGED_UNTIL, Earlier
from gateway.evaluation.threads import GivenUp, ScorerThreads
from gateway.evaluation.values import as_declared, declared_type, meaning, message_of, storable, storable_text
from gateway.rules import ScorerRule

log = structlog.get_logger(__name__)

_NO_SOURCE = "default"
"""What MLflow names the source of a feedback whose author named none."""
_SPAN_ID = "gateway.span_id"
"""Metadata of a score on one span of a trace: the retrieval, for example. Without it a score is on the root."""
_FAILED = "\0failed"  # in the id of a score with an error


@dataclass(frozen=True)
class LiveScorer:
    """A scorer with the rule by which it runs live."""

    scorer: Scorer
    version: str
    """Hash of the file it comes from, the folder's helpers, and the judge model."""
    rule: ScorerRule
    model: str | None = None
    """Judge model that it asks; ``None`` for plain code, and for a judge that has none yet."""
    place: str = ""
    """Where it was found, for messages: a file, or a line of ``gateway.toml``."""

    @property
    def name(self) -> str:
        """Name of the scorer, and of its assessments unless it names them itself."""
        return str(self.scorer.name)

    @property
    def is_judge(self) -> bool:
        """It asks a language model."""
        return asks_model(self.scorer)

    @property
    def scores_conversations(self) -> bool:
        """It scores a whole conversation instead of a single trace."""
        return bool(self.scorer.is_session_level_scorer)

    def applies(self, facts: TraceFacts) -> Reason | None:
        """Return what of its rule keeps it from a trace or a conversation; ``None``: nothing does."""
        return why_not(self.rule, facts)


@dataclass(frozen=True)
class Score:
    """What one scorer said of one subject."""

    score_id: str
    trace_id: str
    session_id: str | None
    agent: str
    scorer: str
    scorer_version: str
    name: str
    value: Any
    """``None`` if the scorer failed."""
    passed: bool | None
    """``None``: no verdict."""
    rationale: str | None
    error: str | None
    source_type: str
    source_id: str
    turns: int | None = None
    """Turns of the conversation when it was scored; ``None`` for a trace's score."""
    details: dict[str, str] = field(default_factory=dict)
    """The assessment's metadata: what a judge cost, for example."""
    inclusion_probability: float = 1.0
    """With which this very score exists, given that its trace was kept: the scorer's share, times the budget's."""

    def assessment(self, span_id: str | None = None, overrides: str | None = None) -> Assessment:
        """Return the MLflow assessment that this score is projected to."""
        details = {key: text for key, text in self.details.items() if key != _SPAN_ID}
        metadata = {**details, "gateway.scorer": self.scorer, "gateway.scorer_version": self.scorer_version}
        if self.session_id is not None:
            metadata[TraceMetadataKey.TRACE_SESSION] = self.session_id
        feedback = Feedback(
            name=self.name,
            value=self.value,
            error=None if self.error is None else AssessmentError("SCORER_ERROR", self.error),
            source=AssessmentSource(source_type=self.source_type, source_id=self.source_id),
            trace_id=self.trace_id,
            rationale=self.rationale,
            metadata=metadata,
            span_id=self.details.get(_SPAN_ID, span_id),
            overrides=overrides,
        )
        feedback.assessment_id = self.score_id
        return feedback


@dataclass(frozen=True)
class Scored:
    """The scorer applied and said something."""

    scores: list[Score]
    """One at least without an error; a scorer that gives a list may fail at some of it."""


@dataclass(frozen=True)
class NotApplicable:
    """There is nothing that the scorer could judge. No failure, and in no share."""

    reason: str

    @property
    def scores(self) -> list[Score]:
        """None: nothing is stored, and MLflow shows nothing."""
        return []


@dataclass(frozen=True)
class Failed:
    """The scorer did not come to a result."""

    scores: list[Score]
    """What makes it visible: a score without a value, with the error. One, or all of a list."""
    kind: FailureKind
    """``timeout``: it was given up, or not called since it hangs; ``unavailable``: the judge's model refused with 408,
    429 or 5xx, or could not be reached; ``raised``: anything else, nonsense included."""
    status: int | None = None
    """HTTP status that the judge's model answered with, if it was one of an error."""

    @property
    def error(self) -> str:
        """Type and message."""
        return self.scores[0].error or ""

    @property
    def may_pass(self) -> bool:
        """Whether it may go better later."""
        return self.kind != "raised"


ScorerOutcome = Scored | NotApplicable | Failed


@dataclass(frozen=True)
class ScorerTask:
    """One scorer and what it is to score. Made by `trace_task` and `conversation_task`."""

    live: LiveScorer
    subject: str
    """What the scores' ids are derived from."""
    trace_id: str
    agent: str
    session_id: str | None
    turns: int | None
    _ask: Callable[[], Said | str]

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> "ScorerTask":
        """Return the same task, asked within a context that is entered in the scorer's own thread."""

        def ask() -> Said | str:
            with context():
                return self._ask()

        return replace(self, _ask=ask)

    def run(self) -> ScorerOutcome:
        """Run the scorer here and now, however long it takes. Whatever it does is an outcome."""
        try:
            said = self._ask()
            return NotApplicable(said) if isinstance(said, str) else self._outcome(said)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a scorer is anybody's code, even one that calls sys.exit()
            log.warning(
                "scorer failed", scorer=self.live.name, trace_id=self.trace_id, error=traceback.format_exc(limit=-3)
            )
            return self._failed(error)

    def run_within(self, threads: ScorerThreads, deadline_s: float) -> ScorerOutcome:
        """Run the scorer in a thread that is given up after ``deadline_s``, or after its own timeout if that is less.

        To be called where blocking is allowed.
        """
        try:
            return threads.run(self.live.name, self.run, self._deadline_s(deadline_s))
        except GivenUp as error:
            return self._given_up(error)

    async def wait_within(self, threads: ScorerThreads, deadline_s: float) -> ScorerOutcome:
        """Do the same as `run_within` without blocking the event loop."""
        try:
            return await threads.wait(self.live.name, self.run, self._deadline_s(deadline_s))
        except GivenUp as error:
            return self._given_up(error)

    def _deadline_s(self, deadline_s: float) -> float:
        return min(deadline_s, self.live.scorer.timeout or deadline_s)

    def _given_up(self, error: GivenUp) -> Failed:
        log.warning("scorer given up", scorer=self.live.name, trace_id=self.trace_id, error=str(error))
        return self._failed(error)

    def _outcome(self, said: Said) -> ScorerOutcome:
        feedbacks = standardize_scorer_value(self.live.name, said.value)
        if not self.live.is_judge:  # "nothing to say" in the form of a feedback
            feedbacks = [each for each in feedbacks if each.error or each.value is not None]
        if not feedbacks:
            return NotApplicable("the scorer gave no result")
        # Several may have one name, as those of the documents of a retrieval have.
        named: Counter[str] = Counter()
        scores = []
        for feedback in feedbacks:
            scores.append(self._score_or_failure(feedback, named[feedback.name], said.left_out))
            named[feedback.name] += 1
        return Failed(scores, "raised") if all(score.error for score in scores) else Scored(scores)

    def _score_or_failure(self, feedback: Feedback, nth: int, left_out: str | None) -> Score:
        try:
            return self._score(feedback, nth, left_out)
        except Exception as error:  # noqa: BLE001 - the scorer's own `pass_if` is anybody's code too
            feedback.error = AssessmentError(type(error).__name__, message_of(error))
            return self._score(feedback, nth, left_out)

    def _score(self, feedback: Feedback, nth: int, left_out: str | None) -> Score:
        live = self.live
        value = None if feedback.error else _value(live, feedback)
        metadata = {**(feedback.metadata or {}), **({SHORTENED: left_out} if left_out else {})}
        if feedback.span_id:
            metadata[_SPAN_ID] = feedback.span_id
        source = feedback.source
        return Score(
            # A failure has an id of its own: should another try succeed, its verdict takes the failure's place.
            score_id=score_id(self.subject, live, feedback.name + (_FAILED if feedback.error else ""), nth),
            trace_id=self.trace_id,
            session_id=self.session_id,
            agent=self.agent,
            scorer=live.name,
            scorer_version=live.version,
            name=feedback.name,
            value=value,
            passed=None if feedback.error else passed(live, value),
            rationale=storable_text(feedback.rationale),
            error=_said(feedback.error),
            source_type=source.source_type,
            source_id=live.name if source.source_id == _NO_SOURCE else source.source_id,
            turns=self.turns,
            details={key: str(storable_text(str(each))) for key, each in metadata.items()},
        )

    def _failed(self, error: BaseException) -> Failed:
        kind, status = kind_of(error)
        source_type = AssessmentSourceType.LLM_JUDGE if self.live.is_judge else AssessmentSourceType.CODE
        code = "Timeout" if isinstance(error, GivenUp) else type(error).__name__
        feedback = Feedback(
            name=self.live.name,
            error=AssessmentError(code, message_of(error)),
            source=AssessmentSource(source_type=source_type, source_id=self.live.name),
        )
        return Failed([self._score(feedback, 0, None)], kind, status)


def trace_task(live: LiveScorer, trace: MlflowTrace, agent: str, bounds: Bounds | None = None) -> ScorerTask:
    """Return what scores one trace.

    Args:
        live: the scorer.
        trace: as MLflow gives it; the expectations that are on it go to the scorer.
        agent: whose run it is.
        bounds: of what a judge is given; ``None``: the usual ones.
    """
    trace_id = trace.info.trace_id
    ask = partial(ask_of_trace, live.scorer, trace, (bounds or Bounds()) if live.is_judge else None)
    return ScorerTask(live, trace_id, trace_id, agent, None, None, ask)


def conversation_task(
    live: LiveScorer,
    traces: list[MlflowTrace],
    session_id: str,
    agent: str,
    earlier: Score | None = None,
    bounds: Bounds | None = None,
) -> ScorerTask:
    """Return what scores a conversation; the scores belong on its first trace.

    Args:
        live: the scorer.
        traces: all turns, the first one first.
        session_id: of the conversation.
        agent: whose conversation it is.
        earlier: what the scorer said when the conversation was shorter, of the same version. `KnowledgeRetention`
            does not ask again about the turns that were judged then; without it, it asks about all.
        bounds: of what a judge is given; ``None``: the usual ones.
    """
    before, limits = _earlier(live, earlier), (bounds or Bounds()) if live.is_judge else None
    ask = partial(ask_of_session, live.scorer, traces, limits, before)
    first, turns = traces[0].info.trace_id, len(traces)
    return ScorerTask(live, f"{first}/{turns}", first, agent, session_id, turns, ask)


def run_trace_scorer(
    live: LiveScorer, trace: MlflowTrace, agent: str, *, threads: ScorerThreads | None = None, deadline_s: float = 60.0
) -> ScorerOutcome:
    """Return what became of a scorer on one trace; with ``threads``, it is given up after ``deadline_s``."""
    task = trace_task(live, trace, agent)
    return task.run() if threads is None else task.run_within(threads, deadline_s)


def run_conversation_scorer(
    live: LiveScorer,
    traces: list[MlflowTrace],
    session_id: str,
    agent: str,
    *,
    earlier: Score | None = None,
    threads: ScorerThreads | None = None,
    deadline_s: float = 60.0,
) -> ScorerOutcome:
    """Return what became of a scorer on a conversation. With ``threads``, it is given up after ``deadline_s``."""
    task = conversation_task(live, traces, session_id, agent, earlier)
    return task.run() if threads is None else task.run_within(threads, deadline_s)


def score_trace(live: LiveScorer, trace: MlflowTrace, agent: str) -> list[Score]:
    """Return the scorer's scores of one trace; none if it does not apply."""
    return run_trace_scorer(live, trace, agent).scores


def _earlier(live: LiveScorer, score: Score | None) -> Earlier | None:
    if score is None or score.error or (score.scorer, score.scorer_version) != (live.name, live.version):
        return None
    until = score.details.get(JUDGED_UNTIL)
    return Earlier(until, forgot=score.value == "no") if until else None


def _value(live: LiveScorer, feedback: Feedback) -> Any:
    declared = declared_type(live.scorer)
    # What is named otherwise is computed from the verdicts, as a retrieval's precision is.
    if declared is not None and feedback.name == live.name:
        return storable(as_declared(storable(feedback.value), declared))
    return storable(feedback.value)


def _said(error: AssessmentError | None) -> str | None:
    return None if error is None else storable_text(f"{error.error_code}: {error.error_message or 'no message'}")


def score_id(subject: str, live: LiveScorer, name: str, nth: int = 0) -> str:
    """Return the id of a score and of its assessment: the same work gives the same id, on any machine.

    MLflow allows 50 characters, unique over all traces. ``nth`` tells scores apart that have one name.
    """
    identity = f"{subject}\0{live.name}\0{live.version}\0{name}" + (f"\0{nth}" if nth else "")
    return "a-" + hashlib.sha256(identity.encode()).hexdigest()[:40]


def passed(live: LiveScorer, value: Any) -> bool | None:
    """Return the verdict on a value; ``None`` where there is no rule that gives one.

    The scorer's own ``pass_if``, else the rule's ``pass_at_least`` for numbers, and what the value itself means.
    """
    if live.scorer.pass_if is not None:
        return bool(live.scorer.pass_if(value))
    if isinstance(value, int | float) and not isinstance(value, bool) and live.rule.pass_at_least is not None:
        return value >= live.rule.pass_at_least
    return meaning(value)
