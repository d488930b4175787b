"""Runs scorers and turns whatever they do into scores: a value, a verdict, or a visible failure, never a crash."""

import asyncio
import hashlib
import json
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from mlflow.entities import Assessment, AssessmentError, AssessmentSource, AssessmentSourceType, Feedback
from mlflow.entities import Trace as MlflowTrace
from mlflow.genai.evaluation.utils import standardize_scorer_value
from mlflow.genai.judges.base import Judge
from mlflow.genai.scorers.base import Scorer
from mlflow.tracing.constant import TraceMetadataKey

from gateway.errors import ConfigurationError
from gateway.plugins import load_modules
from gateway.settings import ScorerRule, Settings
from gateway.tracing.sampling import draw

log = structlog.get_logger(__name__)

_NO_SOURCE = "default"
"""What MLflow names the source of a feedback whose author named none."""
_PASSING = frozenset({"yes", "true", "pass", "none", "resolved"})
_FAILING = frozenset({"no", "false", "fail", "unresolved"})
"""Categories of MLflow's built-in judges: yes/no, and ``UserFrustration``'s none/resolved/unresolved."""


@dataclass(frozen=True)
class LiveScorer:
    """A scorer with the rule by which it runs live."""

    scorer: Scorer
    version: str
    """Hash of the file it comes from, the folder's helpers, and the judge model."""
    rule: ScorerRule

    @property
    def name(self) -> str:
        """Name of the scorer, and of its assessments unless it names them itself."""
        return str(self.scorer.name)

    @property
    def is_judge(self) -> bool:
        """It asks a language model."""
        return isinstance(self.scorer, Judge)

    @property
    def scores_conversations(self) -> bool:
        """It scores a whole conversation instead of a single trace."""
        return bool(self.scorer.is_session_level_scorer)

    def draws(self, key: bytes, agent: str, subject: str) -> bool:
        """Whether it scores this subject: a pure function, with the scorer's name as salt."""
        if self.rule.agents is not None and agent not in self.rule.agents:
            return False
        return draw(key, "scorer", self.name, subject) < self.rule.share


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

    def assessment(self, span_id: str | None = None, overrides: str | None = None) -> Assessment:
        """Return the MLflow assessment that this score is projected to."""
        metadata = {**self.details, "gateway.scorer": self.scorer, "gateway.scorer_version": self.scorer_version}
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
            span_id=span_id,
            overrides=overrides,
        )
        feedback.assessment_id = self.score_id
        return feedback


def load_scorers(settings: Settings) -> list[LiveScorer]:
    """Return the scorers of the scorers folder that run live.

    Judges are left out while no judge model is set.

    Raises:
        ConfigurationError: a file cannot be imported, two scorers share a name, or a rule names none of them.
    """
    folder = settings.scorers_dir
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no scorers folder {folder}. Make one with `gateway init`, or set GATEWAY_SCORERS_DIR."
        )
    found: dict[str, LiveScorer] = {}
    for module in load_modules(folder, "scorer_plugins"):
        version = _version(Path(module.__file__ or ""), settings.judge_model)
        for scorer in (value for value in vars(module).values() if isinstance(value, Scorer)):
            name = str(scorer.name)
            if name in found and found[name].scorer is not scorer:
                raise ConfigurationError(f"{module.__file__}: another file has a scorer named {name} already.")
            if name not in found:  # else this file has imported it
                found[name] = LiveScorer(scorer, version, settings.scorers.get(name, ScorerRule()))
    _check_agents(settings)
    if unknown := sorted(set(settings.scorers) - set(found)):
        raise ConfigurationError(
            f"gateway.toml has rules for {', '.join(unknown)}, but {folder} holds no such scorer; it holds "
            f"{', '.join(sorted(found)) or 'none'}."
        )
    return [each for each in found.values() if each.rule.enabled and (settings.judge_model or not each.is_judge)]


def _check_agents(settings: Settings) -> None:
    """Refuse a rule for an agent that is not there, where the agents are: it would never score anything."""
    if not settings.agents_dir.is_dir():
        return
    known = {path.parent.name for path in settings.agents_dir.glob("*/agent.py")}
    for name, rule in settings.scorers.items():
        if unknown := sorted(set(rule.agents or ()) - known):
            raise ConfigurationError(
                f"[scorers.{name}] names the agents {', '.join(unknown)}, but {settings.agents_dir} holds "
                f"{', '.join(sorted(known))}."
            )


def _version(path: Path, judge_model: str | None) -> str:
    digest = hashlib.sha256((judge_model or "").encode())
    for each in (path, *sorted(path.parent.glob("_*.py"))):
        digest.update(each.read_bytes())
    return digest.hexdigest()[:12]


async def in_thread(judges: Executor, live: LiveScorer, call: Callable[..., list[Score]], *subject: Any) -> list[Score]:
    """Run a scorer in a thread. Judges have threads of their own: while one hangs, everything else goes on."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(judges if live.is_judge else None, partial(call, live, *subject))


def score_trace(live: LiveScorer, trace: MlflowTrace, agent: str) -> list[Score]:
    """Return the scorer's scores of one trace; none if it does not apply."""
    trace_id = trace.info.trace_id
    root = trace.data.spans[0]
    return _score(
        live,
        lambda: live.scorer.run(inputs=root.inputs, outputs=root.outputs, expectations={}, trace=trace),
        subject=trace_id,
        trace_id=trace_id,
        agent=agent,
    )


def score_conversation(live: LiveScorer, traces: list[MlflowTrace], session_id: str, agent: str) -> list[Score]:
    """Return the scorer's scores of a conversation, which belong on its first trace; none if it does not apply."""
    return _score(
        live,
        lambda: live.scorer.run(session=traces),
        subject=f"{session_id}/{len(traces)}",
        trace_id=traces[0].info.trace_id,
        agent=agent,
        session_id=session_id,
        turns=len(traces),
    )


def _score(
    live: LiveScorer,
    run: Callable[[], Any],
    *,
    subject: str,
    trace_id: str,
    agent: str,
    session_id: str | None = None,
    turns: int | None = None,
) -> list[Score]:
    def score(feedback: Feedback) -> Score:
        return Score(
            score_id=score_id(subject, live, feedback.name),
            trace_id=trace_id,
            session_id=session_id,
            agent=agent,
            scorer=live.name,
            scorer_version=live.version,
            name=feedback.name,
            value=_storable(feedback.value),
            passed=None if feedback.error else passed(live, feedback.value),
            rationale=_text(feedback.rationale),
            error=_error_text(feedback),
            source_type=feedback.source.source_type,
            source_id=live.name if feedback.source.source_id == _NO_SOURCE else feedback.source.source_id,
            turns=turns,
            details={key: str(_text(str(value))) for key, value in (feedback.metadata or {}).items()},
        )

    try:
        return [score(feedback) for feedback in _unique(standardize_scorer_value(live.name, run()))]
    except Exception as error:  # noqa: BLE001 - a scorer is anybody's code; its failure is a result
        log.warning("scorer failed", scorer=live.name, trace_id=trace_id, error=traceback.format_exc(limit=-3))
        return [score(_failure(live, error))]


def _storable(value: Any) -> Any:
    """Return the value; raise if it is not JSON, as NaN is not: then the scorer has failed."""
    json.dumps(value, allow_nan=False)
    return value


def _text(text: str | None) -> str | None:
    """Return a text as Postgres can store it."""
    return text.replace("\0", "\ufffd") if text else text


def _failure(live: LiveScorer, error: Exception) -> Feedback:
    source_type = AssessmentSourceType.LLM_JUDGE if live.is_judge else AssessmentSourceType.CODE
    source = AssessmentSource(source_type=source_type, source_id=live.name)
    return Feedback(name=live.name, error=AssessmentError(type(error).__name__, str(error)), source=source)


def _error_text(feedback: Feedback) -> str | None:
    if feedback.error is None:
        return None
    return _text(f"{feedback.error.error_code}: {feedback.error.error_message or 'no message'}")


def _unique(feedbacks: Iterable[Feedback]) -> list[Feedback]:
    """Return the feedbacks by name, the last of equal names: their ids are derived from the name."""
    return list({feedback.name: feedback for feedback in feedbacks}.values())


def score_id(subject: str, live: LiveScorer, name: str) -> str:
    """Return the id of a score and of its assessment: the same work gives the same id, on any machine.

    MLflow allows 50 characters, unique over all traces.
    """
    identity = f"{subject}\0{live.name}\0{live.version}\0{name}"
    return "a-" + hashlib.sha256(identity.encode()).hexdigest()[:40]


def passed(live: LiveScorer, value: Any) -> bool | None:
    """Return the verdict on a value; ``None`` where there is no rule that gives one.

    In this order: the scorer's own ``pass_if``, a boolean, the categories of MLflow's judges, the rule's
    ``pass_at_least`` for numbers.
    """
    if live.scorer.pass_if is not None:
        return bool(live.scorer.pass_if(value))
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _PASSING else False if word in _FAILING else None
    if isinstance(value, int | float) and live.rule.pass_at_least is not None:
        return value >= live.rule.pass_at_least
    return None
