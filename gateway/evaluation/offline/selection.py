"""Which scorers an offline evaluation runs, and where each of them applies.

They are the very scorers of the scorers folder and of ``gateway.toml``. A share and a filter are for live traffic; an
offline run scores each case with every scorer that is for the agent, also with those that are switched off live.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlflow.entities import AssessmentError, AssessmentSource, AssessmentSourceType, Feedback, Trace
from mlflow.genai.scorers.base import Scorer
from pydantic import PrivateAttr

from gateway.errors import ConfigurationError
from gateway.evaluation.applicability import why_not_trace
from gateway.evaluation.catalog import find_scorer, find_scorers
from gateway.evaluation.judge_models import asks_model, what_model_lacks
from gateway.evaluation.mistakes import mistakes_of_scorers
from gateway.evaluation.offline.cases import QUALITY
from gateway.evaluation.offline.judged import Asking, Judges
from gateway.evaluation.scoring import LiveScorer
from gateway.settings import Settings

RUBRIC = "rubric"
GENERAL_RUBRIC = (
    "Right, complete for what was asked, and clear. A response that is wrong in what matters, makes facts up or leaves "
    "the question open is a 1 or a 2, however well it reads."
)
"""What `quality` goes by where a row has no rubric of its own."""


@dataclass(frozen=True)
class Selection:
    """The scorers of one run."""

    of_traces: list[LiveScorer]
    of_conversations: list[LiveScorer]
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def all(self) -> list[LiveScorer]:
        """Both kinds."""
        return [*self.of_traces, *self.of_conversations]

    @property
    def judge_models(self) -> list[str]:
        """Models that the judges among them ask."""
        return sorted({each.model for each in self.all if each.model is not None})


def select(settings: Settings, agent: str, names: Sequence[str]) -> Selection:
    """Return the scorers to run.

    Args:
        settings: with the rules; a rule for other agents alone leaves its scorer out.
        agent: whose answers are scored.
        names: the scorers, or classes of MLflow's built-ins; empty: all that are for the agent and can run.

    Raises:
        ConfigurationError: there is no such scorer, it lacks its judge model or the model's key, it can never work, or
            nothing is left to run.
    """
    if names:
        chosen = [find_scorer(settings, name) for name in dict.fromkeys(names)]
        notes: list[str] = []
        for each in chosen:
            if each.model is not None and (missing := what_model_lacks(each.model, os.environ)):
                raise ConfigurationError(f"{each.name} cannot ask its judge model: {missing}")
    else:
        chosen, notes = _all_that_can(settings, agent)
    if errors := [finding for finding in mistakes_of_scorers(chosen) if finding.severity == "error"]:
        raise ConfigurationError("\n".join(map(str, errors)))
    if not chosen:
        raise ConfigurationError(" ".join(["There is no scorer to run.", *notes]))
    return Selection(
        [each for each in chosen if not each.scores_conversations],
        [each for each in chosen if each.scores_conversations],
        notes,
    )


def _all_that_can(settings: Settings, agent: str) -> tuple[list[LiveScorer], list[str]]:
    found = [each for each in find_scorers(settings).values() if each.rule.agents is None or agent in each.rule.agents]
    without_model = [each.name for each in found if each.model is None and asks_model(each.scorer)]
    lacks = {each.name: what_model_lacks(each.model, os.environ) for each in found if each.model is not None}
    notes = []
    if without_model:
        left_out = ", ".join(without_model)
        notes.append(f"Only scorers in plain code run, since GATEWAY_JUDGE_MODEL is not set ({left_out} left out).")
    for reason in sorted({reason for reason in lacks.values() if reason}):
        left_out = ", ".join(name for name, why in lacks.items() if why == reason)
        notes.append(f"Judges are left out ({left_out}): {reason}")
    return [each for each in found if each.name not in without_model and not lacks.get(each.name)], notes


def where_it_applies(live: LiveScorer, judges: Judges | None = None) -> Scorer:
    """Return the scorer for `mlflow.genai.evaluate`: itself, or, if it is a judge, one that asks where it applies.

    MLflow's judges raise where what they need is missing, or guess; both would look like a verdict on the agent.

    Args:
        live: the scorer.
        judges: through which it asks, if it is a judge; ``None``: directly, and without limits.
    """
    if not live.is_judge:
        return live.scorer
    around = _WhereItApplies(name=live.name, aggregations=live.scorer.aggregations)
    around._live, around._judges, around._pass_if = live, judges, live.scorer.pass_if  # noqa: SLF001 - no other way
    return around


class _WhereItApplies(Scorer):  # type: ignore[misc]
    """Runs a scorer on the cases that it applies to, and says nothing of the others."""

    _live: LiveScorer = PrivateAttr()
    _judges: Judges | None = PrivateAttr()

    def __call__(
        self,
        *,
        inputs: Any = None,
        outputs: Any = None,
        expectations: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> Any:
        """Return what the scorer says; ``None`` where it does not apply."""
        scorer, expected = self._live.scorer, dict(expectations or {})
        if self.name == QUALITY:
            expected = {RUBRIC: GENERAL_RUBRIC} | expected
        if trace is not None and why_not_trace(scorer, trace, expected) is not None:
            return None
        ask = partial(scorer.run, inputs=inputs, outputs=outputs, expectations=expected, trace=trace)
        if self._judges is None:
            return ask()
        with self._judges.asking(self._live, trace.info.trace_id if trace else "") as asking:
            return _asked(self._live, ask, asking)


def _asked(live: LiveScorer, ask: Callable[[], Any], asking: Asking) -> Any:
    """Return what a judge says, with what it spent, or why its calls failed.

    The failure is a value: after an exception with "429" in its text `mlflow.genai.evaluate` would ask again, and the
    relay has tried often enough.
    """
    try:
        said = ask()
    except Exception:
        if asking.is_worth_another_try():
            return _asked(live, ask, asking)
        if asking.problem is None:
            raise
        source = AssessmentSource(source_type=AssessmentSourceType.LLM_JUDGE, source_id=live.model or live.name)
        said = Feedback(name=live.name, error=AssessmentError("SCORER_ERROR", asking.problem.message), source=source)
    if isinstance(said, Feedback):
        said.metadata = {**(said.metadata or {}), **asking.spent}
    return said
