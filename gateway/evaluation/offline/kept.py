"""What runs keep in MLflow: each case as a JSON artifact, and the run that a later one is compared with."""

import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Trace as MlflowTrace
from mlflow.exceptions import MlflowException

from gateway.errors import ConfigurationError
from gateway.evaluation.offline.cases import Case, Verdict

RESULTS = "results"
"""Folder of a run's artifacts with a JSON file a case."""
LAST = "last"
"""In place of a run's id: the newest run of the same agent and dataset that passed its gate."""
PASSED_METRIC = "overall_passed"


class Baseline(NamedTuple):
    """A run that another one is compared with."""

    run_id: str
    cases: list[Case]


def find_baseline(run: str, experiment_id: str, agent: str, dataset: str, keys: Collection[str]) -> Baseline | None:
    """Return the run to compare with; ``None`` if that is the last one that passed, and none has on these questions.

    Args:
        run: a run's id, or `LAST`.
        experiment_id: where `LAST` is looked for.
        agent: its agent, for `LAST`.
        dataset: its dataset, for `LAST`.
        keys: of the cases that will be compared.

    Raises:
        ConfigurationError: there is no such run, it has no cases, or none in common with these.
    """
    client, is_last = MlflowClient(), run == LAST
    try:
        if is_last:
            wanted = {"agent": agent, "dataset": dataset}
            quoted = [f"params.{name} = '{value}'" for name, value in wanted.items() if "'" not in value]
            found = client.search_runs(
                [experiment_id], " and ".join([*quoted, f"metrics.{PASSED_METRIC} = 1"]), max_results=1
            )
            if not found:
                return None
            run = found[0].info.run_id
        cases = read_cases(run)
    except MlflowException as error:
        raise ConfigurationError(f"--baseline {run} cannot be read: {str(error).splitlines()[0]}") from None
    if not cases:
        raise ConfigurationError(f"--baseline {run} has no cases: it is no run of `gateway evaluate` or `gate`.")
    if not {case.key for case in cases} & set(keys):
        if is_last:
            return None
        raise ConfigurationError(f"--baseline {run} has no question in common with this dataset.")
    return Baseline(run, cases)


def log_cases(run_id: str, cases: Sequence[Case]) -> None:
    """Log each case as a JSON artifact of the run."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            text = json.dumps(asdict(case), ensure_ascii=False, indent=2, default=str)
            (Path(folder) / f"case-{case.number:04}.json").write_text(text + "\n")
        MlflowClient().log_artifacts(run_id, folder, RESULTS)


def read_cases(run_id: str) -> list[Case]:
    """Return the cases that a run has logged; empty if it has none.

    Raises:
        MlflowException: there is no such run, or its artifacts are out of reach.
    """
    client = MlflowClient()
    with tempfile.TemporaryDirectory() as folder:
        if not client.list_artifacts(run_id, RESULTS):
            return []
        paths = sorted(Path(client.download_artifacts(run_id, RESULTS, folder)).glob("case-*.json"))
        return [_read_case(json.loads(path.read_text())) for path in paths]


def _read_case(fields: dict[str, Any]) -> Case:
    verdicts = [Verdict(**each) for each in fields.pop("verdicts")]
    return Case(**fields, verdicts=verdicts)


def read_trace(trace_id: str | None) -> MlflowTrace | None:
    """Return a trace; ``None`` if there is none of that id."""
    if trace_id is None:
        return None
    try:
        return MlflowClient().get_trace(trace_id, display=False)
    except MlflowException:
        return None
