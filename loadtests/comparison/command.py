"""What ``python loadtests/compare.py`` does."""

import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markdown import Markdown

from .contest import Plan, contest
from .contestants import CONTESTANTS, ModelKind
from .figures import OWN_LOADS, RequestsFailedError, from_contest
from .machine import Cores, Machine
from .processes import NotStartedError, Shared, shared
from .profiling import ProfilerMissingError, take_profile
from .report import Report

Part = Literal["contest", "turns", "history", "arrivals", "crowd"]
Name = Literal["autolog", "agent-server", "gateway", "gateway-untraced", "bare", "litestar"]
_Many = Parameter(negative="", consume_multiple=True)

console = Console()


def main(
    *,
    only: Annotated[list[Part] | None, _Many] = None,
    contestants: Annotated[list[Name] | None, _Many] = None,
    models: Annotated[list[ModelKind] | None, _Many] = None,
    profile: Annotated[list[Name] | None, _Many] = None,
    quick: bool = False,
    rounds: int = 8,
    seconds: float = 2.0,
    warm_up: float = 3.0,
    connections: int = 16,
    drain_limit: float = 180.0,
    arrivals_per_s: float = 100.0,
    results: Path = Path(__file__).parent.parent / "results",
) -> None:
    """Compare the gateway with what one would use otherwise, and write a dated report.

    Args:
        only: Parts to run: contest, turns, history, arrivals, crowd; all if left out.
        contestants: Who takes part in the contest; all if left out.
        models: Where the contest's model is: in-process, http; both if left out.
        profile: Contestants to run under a sampling profiler, with each of the models; then nothing else is run
            unless `--only` names it.
        quick: One round of 2 s each: whether it works, in a minute or so a part; the figures say little.
        rounds: Rounds of each measurement.
        seconds: Length of each measurement.
        warm_up: Seconds of load before it that are not counted.
        connections: Connections that ask at once.
        drain_limit: Seconds that traces are waited for.
        arrivals_per_s: Requests a second where they arrive at random; the target is for 100.
        results: Folder of the report.
    """
    plan = Plan(rounds, seconds, warm_up, connections, drain_limit, arrivals_per_s)
    if quick:
        plan = Plan(1, 2.0, 1.0, connections, 60.0)
    if not only and not profile:
        only = ["contest", "turns", "history", "arrivals", "crowd"]
    cores = Cores.split()
    report = Report(Machine.here(cores), plan, datetime.now().astimezone())
    os.sched_setaffinity(0, cores.others)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        with shared(cores) as parts:
            _run(report, parts, only or [], contestants or list(CONTESTANTS), models or ["in-process", "http"])
            for name in profile or []:
                for model in models or ["in-process", "http"]:
                    console.print(f"profiling {name}, model {model}")
                    report.profiles.append(take_profile(parts, CONTESTANTS[name], model, plan))
    except (NotStartedError, ProfilerMissingError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("ended")
    if console.is_terminal:
        console.print(Markdown(report.markdown()))
    else:
        console.out(report.markdown(), highlight=False)
    for path in report.write(results):
        console.print(f"written: {path}", soft_wrap=True)
    sys.exit(1 if report.problems else 0)


def _run(
    report: Report, parts: Shared, only: list[Part], names: list[Name] | list[str], models: list[ModelKind]
) -> None:
    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if "contest" in only:
        entrants = [contestant for name, contestant in CONTESTANTS.items() if name in names]
        report.samples = contest(parts, entrants, models, report.plan, tell)
        report.figures += from_contest(report.samples)
    for name, measure in OWN_LOADS.items():
        if name in only:
            try:
                report.figures.append(measure(parts, report.plan, tell))
            except RequestsFailedError as error:
                report.problems.append(f"{name}: {error}")
                tell(report.problems[-1])
