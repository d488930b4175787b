"""``gateway evaluate`` and ``gateway gate``: the agents on stored questions, with the scorers that run live."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from gateway.commands.stored import known_database, need_mlflow, output, postgres
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError
from gateway.logs import configure_logging
from gateway.settings import Settings, load_settings
from gateway.storage.database import create_database
from gateway.tracing.redaction.redactor import Redactor

if TYPE_CHECKING:  # these take seconds to import, which `--help` need not wait for
    from gateway.evaluation.offline.evaluate import Evaluation, Result
    from gateway.evaluation.offline.gate import Wanted

_Names = Annotated[list[str] | None, Parameter(negative="")]


def register(app: App) -> None:
    """Add the commands to the application."""
    app.command(evaluate)
    app.command(gate)


def evaluate(
    *,
    agent: str,
    dataset: str,
    scorer: _Names = None,
    workers: int | None = None,
    timeout: float | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
) -> None:
    """Ask an agent the questions of a dataset, score its answers, and log all of it to a run in MLflow.

    The exit code is 0, also when answers are bad: see `gateway gate`. It is 1 if not one case could be judged.

    Args:
        agent: Name of the agent's folder.
        dataset: Name of a dataset in MLflow, or a CSV or JSONL file.
        scorer: A scorer to run. Give it once for each; all that are for the agent if left out.
        workers: Cases at once; MLFLOW_GENAI_EVAL_MAX_WORKERS if left out.
        timeout: Seconds that a case may take; MLFLOW_GENAI_EVAL_ASYNC_TIMEOUT, or else GATEWAY_RUN_TIMEOUT_S, if
            left out.
        experiment: MLflow experiment; the one of GATEWAY_MLFLOW_EXPERIMENT with -offline behind it if left out.
        run_name: Name of the run in MLflow.
    """
    settings = _prepare()
    from gateway.evaluation.offline.evaluate import Options, prepare  # noqa: PLC0415 - see above
    from gateway.evaluation.offline.reporting import announce, show  # noqa: PLC0415 - see above

    options = Options(agent, dataset, scorer or (), _workers(workers), _timeout(timeout), run_name)
    console = output()
    with _open(settings, experiment) as place:
        evaluation = prepare(settings, options)
        announce(evaluation, console)
        result = _run(place, evaluation, {})
        show(result, console)
    sys.exit(1 if result.metrics["error_cases"] == result.metrics["total_cases"] else 0)


def gate(
    *,
    agent: str,
    dataset: str,
    scorer: _Names = None,
    pass_rate: float | None = None,
    score: float | None = None,
    metric: _Names = None,
    baseline: str | None = None,
    margin: float | None = None,
    score_margin: float | None = None,
    strict: Annotated[bool, Parameter(negative="")] = False,
    report: Path = Path("gate-report"),
    workers: int | None = None,
    timeout: float | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
) -> None:
    """Do what `gateway evaluate` does, and say whether that is good enough.

    The exit code is 0 for a pass, 1 for a failure and 2 if it was called in a wrong way.

    Args:
        agent: Name of the agent's folder.
        dataset: Name of a dataset in MLflow, or a CSV or JSONL file.
        scorer: A scorer to run. Give it once for each; all that are for the agent if left out.
        pass_rate: Least share of cases that pass; 0.8 if left out.
        score: Least average score, and least score of a case that passes; 3.5 if left out.
        metric: Another metric, as 'exact_match/mean>=0.9' or 'latency_p95_s<=10'. Give it once for each.
        baseline: Id of a run that this one must be no worse than, or `last` for the newest that passed its gate.
        margin: Share of cases that may be lost against the baseline; 0.05 if left out.
        score_margin: Points of the average score that may be lost against the baseline; 0.25 if left out.
        strict: Fail also if there are too few cases to say that it is no worse than the baseline.
        report: Folder that junit.xml and summary.md are written to.
        workers: Cases at once; MLFLOW_GENAI_EVAL_MAX_WORKERS if left out.
        timeout: Seconds that a case may take; MLFLOW_GENAI_EVAL_ASYNC_TIMEOUT, or else GATEWAY_RUN_TIMEOUT_S, if
            left out.
        experiment: MLflow experiment; the one of GATEWAY_MLFLOW_EXPERIMENT with -offline behind it if left out.
        run_name: Name of the run in MLflow.
    """
    settings = _prepare()
    from gateway.evaluation.offline.deciding import prepare_gate  # noqa: PLC0415 - see above
    from gateway.evaluation.offline.evaluate import Options, prepare  # noqa: PLC0415 - see above
    from gateway.evaluation.offline.reporting import announce, show, show_decision  # noqa: PLC0415 - see above

    wanted = _wanted(pass_rate, score, margin, score_margin, strict)
    _check_writable(report)
    options = Options(agent, dataset, scorer or (), _workers(workers), _timeout(timeout), run_name, score)
    console = output()
    with _open(settings, experiment) as place:
        checked = prepare_gate(prepare(settings, options), place.experiment_id, wanted, metric or (), baseline)
        announce(checked.evaluation, console)
        result, decision = checked.run(report, partial(_run, place))
        show(result, console)
    show_decision(decision, console)
    sys.exit(0 if decision.passed else 1)


class _Place(NamedTuple):
    """Where an evaluation is logged, and what its judges are bounded by."""

    settings: Settings
    experiment_id: str
    database: str | None
    """URL of the gateway's own database; ``None``: it has none here."""


def _prepare() -> Settings:
    """Read the settings, see that MLflow is there, and keep the logs of libraries out of the way."""
    need_mlflow("Evaluation")
    # MLflow reads them when it is imported. The bar that it may show would stand beside ours.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TQDM_DISABLE", "1")
    settings = load_settings()
    redactor = Redactor(load_keys(settings).derive("redaction"), settings.redact_patterns)
    configure_logging(settings.log_level, redactor.text)
    for relay in ("uvicorn.error", "gateway.evaluation.judging"):  # what fails there is said with the case
        logging.getLogger(relay).setLevel(logging.WARNING)
    return settings


def _run(place: _Place, evaluation: "Evaluation", more_params: dict[str, str]) -> "Result":
    """Run the evaluation with a bar on a terminal, and without a word elsewhere."""
    from gateway.evaluation.offline.judged import judged  # noqa: PLC0415 - see above

    with judged(place.settings, place.database, evaluation.selection.all, runs_agents=True) as judges:
        for note in judges.notes if judges else ():
            output().print(Text(f"Note: {note}"), soft_wrap=True)
        with _bar(len(evaluation.keys)) as advance:
            return evaluation.run(more_params, advance, judges)


@contextmanager
def _bar(cases: int) -> Iterator[Callable[[], None]]:
    """Show how far it is; give what is to be called for each case that was answered."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        answers = progress.add_task("Answering", total=cases)

        def advance() -> None:
            progress.advance(answers)
            if progress.tasks[0].finished:
                progress.update(answers, description="Scoring")

        yield advance


@contextmanager
def _open(settings: Settings, experiment: str | None) -> Iterator[_Place]:
    """Have MLflow and its experiment; an own one needs the gateway's Postgres, which runs meanwhile if it does not."""
    from gateway.evaluation.offline.mlflows import experiment_name, open_experiment  # noqa: PLC0415 - see above
    from gateway.evaluation.store import tracking_uri  # noqa: PLC0415 - see above

    with _database(settings) as database:
        name = experiment or experiment_name(settings)
        experiment_id = open_experiment(settings, tracking_uri(settings, database or ""), name)
        yield _Place(settings, experiment_id, database)


@contextmanager
def _database(settings: Settings) -> Iterator[str | None]:
    """Give the URL of the gateway's database, with MLflow's beside it; it may be missing if MLflow is elsewhere."""
    if not settings.runs_own_mlflow:
        yield known_database(settings)
        return
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres(settings))
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error} For an evaluation, MLflow alone will do: set GATEWAY_MLFLOW_TRACKING_URI to a server's "
                "address, or to sqlite:///mlflow.db."
            ) from None
        create_database(url, "mlflow")
        yield url


def _wanted(
    pass_rate: float | None, score: float | None, margin: float | None, score_margin: float | None, strict: bool
) -> "Wanted":
    from gateway.evaluation.offline.gate import MARGIN, PASS_RATE_THRESHOLD, SCORE_MARGIN, Wanted  # noqa: PLC0415

    for name, share in (("--pass-rate", pass_rate), ("--margin", margin)):
        if share is not None and not 0 <= share <= 1:
            raise ConfigurationError(f"{name} is {share:g}; give a share from 0 to 1.")
    if score_margin is not None and score_margin < 0:
        raise ConfigurationError(f"--score-margin is {score_margin:g}; give 0 or more points.")
    return Wanted(
        PASS_RATE_THRESHOLD if pass_rate is None else pass_rate,
        score,
        margin=MARGIN if margin is None else margin,
        score_margin=SCORE_MARGIN if score_margin is None else score_margin,
        is_strict=strict,
    )


def _workers(workers: int | None) -> int | None:
    if workers is not None and workers < 1:
        raise ConfigurationError(f"--workers is {workers}; give 1 or more.")
    return workers


def _timeout(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not timeout_s > 0:
        raise ConfigurationError(f"--timeout is {timeout_s:g}; give seconds, more than 0.")
    return timeout_s


def _check_writable(folder: Path) -> None:
    """Refuse a report folder that is a file before anything is run for it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--report {folder} is a file; give a folder.")
