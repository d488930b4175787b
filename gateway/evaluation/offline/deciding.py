"""A gate from end to end: evaluate, decide, and write the decision down where people and machines look for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient

from gateway.evaluation.offline.evaluate import Evaluation, Result
from gateway.evaluation.offline.gate import Decision, Wanted, decide, read_threshold
from gateway.evaluation.offline.kept import PASSED_METRIC, Baseline, find_baseline
from gateway.evaluation.offline.reporting import write_reports

REASON_TAG = "gate_reason"

_REPORT = "report"
_LONGEST_TAG = 5000  # characters: what MLflow takes


@dataclass(frozen=True)
class Gate:
    """A checked gate, to be run once. Made by `prepare_gate`."""

    evaluation: Evaluation
    wanted: Wanted
    baseline: Baseline | None
    notes: list[str]

    def run(self, report: Path, run: Callable[[Evaluation, dict[str, str]], Result]) -> tuple[Result, Decision]:
        """Run the evaluation and return what came of it, and whether that is good enough; both are logged and written.

        Args:
            report: folder of ``junit.xml`` and ``summary.md``.
            run: runs the evaluation with further parameters.
        """
        wanted = self.wanted
        params = {"pass_rate_threshold": f"{wanted.pass_rate:g}", "score_threshold": f"{wanted.score_threshold:g}"}
        if self.baseline is not None:
            params["baseline"] = self.baseline.run_id
        result = run(self.evaluation, params)
        decision = decide(wanted, result.metrics, result.cases, self.baseline.cases if self.baseline else None)
        decision = replace(decision, notes=[*decision.notes, *self.notes])
        client = MlflowClient()
        client.log_metric(result.run_id, PASSED_METRIC, float(decision.passed))
        client.set_tag(result.run_id, REASON_TAG, decision.reason[:_LONGEST_TAG])
        for path in write_reports(report, result, decision):
            client.log_artifact(result.run_id, str(path), _REPORT)
        return result, decision


def prepare_gate(
    evaluation: Evaluation, experiment_id: str, wanted: Wanted, metrics: Sequence[str], baseline: str | None
) -> Gate:
    """Return a checked gate; nothing is logged.

    Args:
        evaluation: checked, not run yet.
        experiment_id: where the last run is looked for, if that is the baseline.
        wanted: what is asked for, but for other metrics.
        metrics: thresholds of other metrics, as they were written.
        baseline: a run's id, or ``last``; ``None``: no comparison.

    Raises:
        ConfigurationError: a metric or the baseline is not there.
    """
    scorers = {each.name: _aggregations(each.scorer.aggregations) for each in evaluation.selection.all}
    asked = replace(wanted, others=[read_threshold(text, scorers) for text in metrics])
    if baseline is None:
        return Gate(evaluation, asked, None, [])
    name, dataset = evaluation.predictor.plugin.name, evaluation.dataset.name
    found = find_baseline(baseline, experiment_id, name, dataset, evaluation.keys)
    note = "There is no baseline yet: no run of this agent on these questions has passed its gate."
    return Gate(evaluation, asked, found, [] if found else [note])


def _aggregations(named: Sequence[object] | None) -> list[str]:
    """Return the names of what MLflow aggregates of a scorer; its default is the mean."""
    return (
        ["mean"]
        if named is None
        else [each if isinstance(each, str) else getattr(each, "__name__", "") for each in named]
    )
