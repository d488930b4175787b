"""Which scorers an offline evaluation runs, and where each of them applies.

They are the very scorers of the scorers folder and of ``gateway.toml``. A share and a filter are for live traffic; an
offline run scores each case with every scorer that is for the agent, also with those that are switched off live.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import Trace
from mlflow.genai.scorers.base import Scorer
from pydantic import PrivateAttr

from gateway.errors import ConfigurationError
from gateway.evaluation.applicability import why_not_trace
from gateway.evaluation.catalog import find_scorer, find_scorers
from gateway.evaluation.judge_models import asks_model, what_model_lacks
from gateway.evaluation.mistakes import mistakes_of_scorers
from gateway.evaluation.offline.cases import QUALITY
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


def where_it_applies(live: LiveScorer) -> Scorer:
    """Return the scorer for `mlflow.genai.evaluate`: itself, or, if it is a judge, one that asks where it applies.

    MLflow's judges raise where what they need is missing, or guess; both would look like a verdict on the agent.
    """
    if not live.is_judge:
        return live.scorer
    around = _WhereItApplies(name=live.name, aggregations=live.scorer.aggregations)
    around._inner, around._pass_if = live.scorer, live.scorer.pass_if  # noqa: SLF001 - pydantic takes them no other way
    return around


class _WhereItApplies(Scorer):  # type: ignore[misc]
    """Runs a scorer on the cases that it applies to, and says nothing of the others."""

    _inner: Scorer = PrivateAttr()

    def __call__(
        self,
        *,
        inputs: Any = None,
        outputs: Any = None,
        expectations: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> Any:
        """Return what the scorer says; ``None`` where it does not apply."""
        expected = dict(expectations or {})
        if self.name == QUALITY:
            expected = {RUBRIC: GENERAL_RUBRIC} | expected
        if trace is not None and why_not_trace(self._inner, trace, expected) is not None:
            return None
        return self._inner.run(inputs=inputs, outputs=outputs, expectations=expected, trace=trace)
