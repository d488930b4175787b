"""The gateway's scoring beside MLflow's own: the same traffic, the same judge, the same model behind it, in turn."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .freshness import WARM_UP_S, Found, Traffic, under_load
from .mlflow_side import await_first_job, refusal_of_code, scoring_server, start_judge
from .pages import Page, seconds
from .served import JUDGE, Served, judge_calls, judge_server, judge_settings, served
from .traffic import ask_all, moments
from .usage import cpu_s
from .watching import POLL_S, Watch

_BURST_PER_S = 100.0
_SHARE_S = 300.0
"""The share scored is told of so many seconds after the response."""


@dataclass(frozen=True)
class Burst:
    """What became of many traces at once."""

    traces: int
    scored: int
    scores_per_s: float
    """From the first score that was seen to the last."""


@dataclass(frozen=True)
class Side:
    """One way to score, and what was found of it."""

    found: Found
    burst: Burst | None
    calls: int
    """Of the judges' model, warm-up included."""
    scoring_cpu_s: float
    """Processor time of who scores, during the load: evaluator, or MLflow's server and its jobs."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    traffic: Traffic
    burst_of: int
    """Traces; 0: no burst."""
    judge_ms: float
    settings: dict[str, str]
    """More settings of the gateway."""
    cores: frozenset[int]


def beside(plan: Plan, *, as_it_comes: bool, tell: Callable[[str], None]) -> Page:
    """Measure the gateway, MLflow told not to wait for traces to be over, and, if asked, MLflow as it comes."""
    page = Page("Beside MLflow's own online scoring", "beside-mlflow")
    tell("the gateway")
    ours = _ours(plan)
    tell(_brief(ours))
    tell("MLflow, buffer of 0 s")
    eager, refusal = _mlflows(plan, buffer_s=0, burst_of=plan.burst_of)
    tell(_brief(eager))
    sides = {"gateway": ours, "MLflow, buffer 0 s": eager}
    if as_it_comes:
        tell("MLflow as it comes")
        sides["MLflow as it comes"], _ = _mlflows(plan, buffer_s=None, burst_of=0)
    page.tables.append((("", *sides, "MLflow, buffer 0 s, to gateway"), _rows(sides)))
    said = f"MLflow refuses it: {refusal}" if refusal else "MLflow takes it."
    page.notes += [
        f"One judge (`make_judge`, inputs and outputs, yes or no) on every trace; its model takes {plan.judge_ms:g} ms."
        " The gateway asks it by its relay, MLflow by an endpoint of its gateway without usage tracking. No other "
        "scorers.",
        f"The same requests, {plan.traffic.per_s:g}/s at random for {plan.traffic.seconds:g} s after {WARM_UP_S:g} s "
        f"of warm-up, to the agent `support` through the same gateway; then {plan.burst_of} at once.",
        f"From the end of the response to the score in MLflow's table, looked at every {POLL_S * 1000:g} ms, for at "
        f"most {plan.traffic.limit_s:g} s after the load.",
        "Buffer: MLFLOW_ONLINE_SCORING_DEFAULT_TRACE_COMPLETION_BUFFER_SECONDS, 300 s as it comes. MLflow's scheduler "
        "wakes once a minute and takes at most 500 traces of an experiment.",
        "Its load begins once its first job, with nothing to score, has ended; processor time is that of its server "
        "and jobs, idle ones included, until the last score, and of the gateway's evaluator.",
        f"A scorer in plain code, on a server with MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS=true: {said}",
    ]
    if plan.settings:
        page.notes.append(f"Gateway: {', '.join(f'{name}={value}' for name, value in sorted(plan.settings.items()))}.")
    return page


def _ours(plan: Plan) -> Side:
    with ExitStack() as stack:
        model = _model(stack, plan)
        gateway = stack.enter_context(served([JUDGE], judge_settings(model) | plan.settings, plan.cores))
        found = under_load(gateway, plan.traffic, [JUDGE])
        calls = judge_calls(model)
        burst = _burst(gateway, plan.burst_of, plan.traffic.limit_s)
    return Side(found, burst, calls, found.cpu_s["evaluator"])


def _mlflows(plan: Plan, *, buffer_s: int | None, burst_of: int) -> tuple[Side, str | None]:
    """Return what was found of MLflow's scoring, and what it says to a scorer in plain code."""
    with ExitStack() as stack:
        model = _model(stack, plan)
        gateway = stack.enter_context(served([], plan.settings, plan.cores))
        server = stack.enter_context(scoring_server(gateway, plan.cores, buffer_s))
        refusal = refusal_of_code()
        start_judge(model)
        await_first_job(gateway)
        before_s = cpu_s(server.usage)
        # Each of its jobs is a new process: there is nothing that could be warm.
        found = under_load(gateway, plan.traffic, [JUDGE], awaits_warm_up=False)
        used_s, calls = cpu_s(server.usage) - before_s, judge_calls(model)
        burst = _burst(gateway, burst_of, plan.traffic.limit_s)
    return Side(found, burst, calls, used_s), refusal


def _model(stack: ExitStack, plan: Plan) -> str:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="judge-")))
    return stack.enter_context(judge_server(folder, plan.judge_ms, plan.cores))


def _burst(gateway: Served, count: int, limit_s: float) -> Burst | None:
    """Ask for many traces as fast as they are served, and see how fast they are scored."""
    if not count:
        return None
    due_s = moments(_BURST_PER_S, count / _BURST_PER_S, seed=3)
    with Watch(gateway.mlflow_database, [JUDGE]) as watch:
        asyncio.run(ask_all(gateway.url, due_s, watch.ended))
        watch.await_all(limit_s)
        seen = watch.seen(JUDGE)
    took_s = seen[-1] - seen[0] if len(seen) > 1 else float("nan")
    return Burst(len(watch.trace_ids), len(seen), (len(seen) - 1) / took_s if took_s else float("nan"))


def _rows(sides: dict[str, Side]) -> list[Sequence[str]]:
    ours, eager = sides["gateway"], sides["MLflow, buffer 0 s"]
    waits = {name: side.found.waits[JUDGE] for name, side in sides.items()}

    def waited(label: str, figure: Callable[[str], float]) -> Sequence[str]:
        ratio = figure("MLflow, buffer 0 s") / figure("gateway")
        return (label, *(seconds(figure(name)) for name in sides), f"{ratio:.1f} times")

    rows: list[Sequence[str]] = [
        waited("p50", lambda name: waits[name].percentile(0.5)),
        waited("p95", lambda name: waits[name].percentile(0.95)),
        waited("worst", lambda name: max(waits[name].seconds, default=float("nan"))),
        (f"scored within {_SHARE_S:g} s", *(f"{each.within(_SHARE_S):.1%}" for each in waits.values()), ""),
        ("scored in the end", *(f"{len(each.seconds)} of {each.traces}" for each in waits.values()), ""),
        ("requests failed", *(f"{side.found.outcome.failures}" for side in sides.values()), ""),
        ("burst: scored", *(_scored(side.burst) for side in sides.values()), ""),
    ]
    if ours.burst and eager.burst:
        ratio = eager.burst.scores_per_s / ours.burst.scores_per_s
        rates = (f"{side.burst.scores_per_s:.1f}" if side.burst else "-" for side in sides.values())
        rows.append(("burst: scores/s, first to last", *rates, f"{ratio:.2f} times"))
    rows.append(("calls of the judges' model, warm-up included", *(f"{side.calls}" for side in sides.values()), ""))
    ratio = _ms_a_score(eager) / _ms_a_score(ours)
    shown = (f"{_ms_a_score(side):.0f}" for side in sides.values())
    rows.append(("who scores, ms CPU a score", *shown, f"{ratio:.1f} times"))
    return rows


def _brief(side: Side) -> str:
    waits = side.found.waits[JUDGE]
    rate = f", burst {side.burst.scores_per_s:.1f} scores/s" if side.burst else ""
    return (
        f"  {len(waits.seconds)} of {waits.traces} scored, p50 {waits.percentile(0.5):.2f} s, "
        f"p95 {waits.percentile(0.95):.2f} s{rate}"
    )


def _scored(burst: Burst | None) -> str:
    return f"{burst.scored} of {burst.traces}" if burst else "-"


def _ms_a_score(side: Side) -> float:
    return side.scoring_cpu_s * 1000 / max(len(side.found.waits[JUDGE].seconds), 1)
