"""Load tests of live scoring: ``python loadtests/scoring.py freshness``, ``throughput`` or ``beside-mlflow``.

Each starts what it needs by itself, in a temporary folder and on free ports, prints a table, and with ``--report``
writes it to loadtests/results as well. ``loadtests/README.md`` says what is measured; `scoring_runs` does it.
"""

import os
import signal
import sys
from typing import Annotated

import cyclopts
from comparison.processes import NotStartedError
from cyclopts import Parameter
from rich.console import Console
from scoring_runs.freshness import Traffic, freshness
from scoring_runs.pages import Page
from scoring_runs.served import SIX

Many = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)]

app = cyclopts.App(help=__doc__)


def _finish(page: Page, *, report: bool) -> None:
    page.show()
    if report:
        Console().print(f"written: {page.write()}", soft_wrap=True)


def _cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def _environment(settings: tuple[str, ...]) -> dict[str, str]:
    if wrong := [each for each in settings if "=" not in each]:
        sys.exit(f"a setting is NAME=VALUE; {wrong[0]} is none")
    return dict(each.split("=", 1) for each in settings)


@app.command(name="freshness")
def measure_freshness(
    *,
    per_s: float = 20.0,
    seconds: float = 60.0,
    judge_ms: float = 300.0,
    judge: bool = True,
    settings: Many = (),
    scorers: Many = SIX,
    limit: float = 120.0,
    report: bool = False,
) -> None:
    """Measure how soon after the end of a response its scores are in MLflow.

    Args:
        per_s: Requests a second, arriving at random.
        seconds: For how long.
        judge_ms: How long the judge's model takes for an answer.
        judge: Measure with a judge too, after the scorers in plain code alone.
        settings: More settings of the gateway, as GATEWAY_JUDGE_CONCURRENCY=16.
        scorers: The scorers in plain code; no_empty_answer must be one of them.
        limit: Seconds that scores are waited for after the load.
        report: Write the table to loadtests/results as well.
    """
    traffic, environment = Traffic(per_s, seconds, limit), _environment(settings)
    page = freshness(traffic, scorers, _cores(), judge_ms=judge_ms if judge else None, environment=environment)
    _finish(page, report=report)


@app.command(name="throughput")
def measure_throughput(*, traces: int = 2000, rounds: int = 3, rest: bool = True, report: bool = False) -> None:
    """Measure how many traces a second one evaluator on one core takes from the outbox into MLflow, with six scores.

    Args:
        traces: Traces of a round.
        rounds: Rounds of each way of writing.
        rest: Write over REST as well as directly.
        report: Write the table to loadtests/results as well.
    """
    # Imports MLflow, which takes seconds.
    from scoring_runs.throughput import throughput  # noqa: PLC0415

    _finish(throughput(traces, rounds, rest=rest), report=report)


@app.command(name="beside-mlflow")
def measure_beside_mlflow(
    *,
    per_s: float = 20.0,
    seconds: float = 60.0,
    burst_of: int = 1000,
    judge_ms: float = 300.0,
    as_it_comes: bool = True,
    settings: Many = (),
    limit: float = 900.0,
    report: bool = False,
) -> None:
    """Measure one judge on every trace, by the gateway's scoring and by MLflow's own, in turn.

    Args:
        per_s: Requests a second, arriving at random.
        seconds: For how long.
        burst_of: Traces of the burst that comes after; 0: none.
        judge_ms: How long the judge's model takes for an answer.
        as_it_comes: Measure MLflow with its buffer of 300 s too, which takes some ten minutes more.
        settings: More settings of the gateway, as GATEWAY_JUDGE_CONCURRENCY=10.
        limit: Seconds that scores are waited for after each load.
        report: Write the table to loadtests/results as well.
    """
    # Imports MLflow, which takes seconds.
    from scoring_runs.beside import Plan, beside  # noqa: PLC0415

    traffic = Traffic(per_s, seconds, limit)
    plan = Plan(traffic, burst_of, judge_ms, _environment(settings), _cores())
    _finish(beside(plan, as_it_comes=as_it_comes, tell=Console().print), report=report)


def main() -> None:
    """Run the command that was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        app()
    except NotStartedError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("ended")


if __name__ == "__main__":
    main()
