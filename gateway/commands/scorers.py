"""``gateway scorers``: which scorers there are, and what one of them says of a stored trace or conversation."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from gateway.commands.stored import known_database, output, use_mlflow
from gateway.errors import ConfigurationError
from gateway.rules import ScorerRule
from gateway.settings import Settings, load_settings

if TYPE_CHECKING:  # these take seconds to import, which `--help` need not wait for
    from mlflow.entities import Trace

    from gateway.evaluation.scoring import LiveScorer, Score, ScorerOutcome

scorers = App(name="scorers", help="List the scorers, and try one on a stored trace or conversation.")

_MOST_TURNS = 500
_SPENT = {
    "mlflow.assessment.judgeCost": "{} USD",
    "mlflow.assessment.judgeInputTokens": "{} tokens in",
    "mlflow.assessment.judgeOutputTokens": "{} tokens out",
}
_VERDICTS = {True: "passed", False: "failed", None: "no verdict"}


def register(app: App) -> None:
    """Add the commands to the application."""
    app.command(scorers)


@scorers.command(name="list")
def list_() -> None:
    """Show all scorers: which run live, by which rule, and why the others do not."""
    from gateway.evaluation.catalog import find_scorers  # noqa: PLC0415 - see above

    table = Table("scorer", "scores", "live", "agents", "share", "filter", "asks", "fails go to", "version", "from")
    for live in sorted(find_scorers(load_settings()).values(), key=lambda each: each.name):
        table.add_row(*(Text(cell) for cell in _cells(live)))
    output().print(table)


@scorers.command
def check(
    name: str,
    *,
    trace: Annotated[str | None, Parameter(negative="")] = None,
    session: Annotated[str | None, Parameter(negative="")] = None,
    judge_model: Annotated[str | None, Parameter(negative="")] = None,
) -> None:
    """Run one scorer on a stored trace or conversation and show what it says; nothing is stored.

    Args:
        name: The scorer, or the class of one of MLflow's built-ins, as Safety.
        trace: Id of the trace in MLflow: tr-...
        session: Id of the session, for scorers of conversations.
        judge_model: Model to ask instead of its own, as openai:/gpt-4o-mini.
    """
    if (trace is None) == (session is None):
        raise ConfigurationError("Give either --trace with the id of a trace, or --session with that of a session.")
    settings = load_settings()
    use_mlflow(settings)
    live = _scorer(settings, name, judge_model)
    if live.scores_conversations != (trace is None):
        wanted = "conversations: give --session" if live.scores_conversations else "single traces: give --trace"
        raise ConfigurationError(f"{live.name} scores {wanted}.")
    traces = _session(settings, str(session)) if trace is None else [_trace(trace)]
    _show(live, traces, *_run(settings, live, traces, session))


def _scorer(settings: Settings, name: str, judge_model: str | None) -> "LiveScorer":
    from gateway.evaluation.catalog import find_scorer  # noqa: PLC0415 - see above
    from gateway.evaluation.mistakes import mistakes_of_scorers, mistakes_of_settings  # noqa: PLC0415 - see above

    live = find_scorer(settings, name, judge_model)
    for finding in (*mistakes_of_scorers([live]), *mistakes_of_settings(settings, [live])):
        if finding.severity == "error":
            raise ConfigurationError(str(finding))
    return live


def _trace(trace_id: str) -> "Trace":
    from mlflow import MlflowClient  # noqa: PLC0415 - see above
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - see above

    try:
        return MlflowClient().get_trace(trace_id)
    except MlflowException as error:
        raise ConfigurationError(f"MLflow has no trace {trace_id}: {error.message.splitlines()[0]}") from None


def _session(settings: Settings, session_id: str) -> "list[Trace]":
    """Return the traces of a session, oldest first."""
    from mlflow import MlflowClient  # noqa: PLC0415 - see above

    client = MlflowClient()
    experiment = client.get_experiment_by_name(settings.mlflow_experiment)
    quote = '"' if "'" in session_id else "'"  # MLflow's filters know no other way to have one of them inside
    found = experiment and client.search_traces(
        locations=[experiment.experiment_id],
        filter_string=f"metadata.`mlflow.trace.session` = {quote}{session_id}{quote}",
        max_results=_MOST_TURNS,
        order_by=["timestamp_ms ASC"],
    )
    if not found:
        raise ConfigurationError(
            f"MLflow's experiment {settings.mlflow_experiment} has no traces of a session {session_id}."
        )
    return list(found)


def _run(
    settings: Settings, live: "LiveScorer", traces: "list[Trace]", session: str | None
) -> "tuple[ScorerOutcome, float]":
    """Run the scorer; return what became of it, and the seconds that it took."""
    from gateway.evaluation.filters import TraceFacts  # noqa: PLC0415 - see above
    from gateway.evaluation.offline.judged import judged  # noqa: PLC0415 - see above
    from gateway.evaluation.scoring import conversation_task, trace_task  # noqa: PLC0415 - see above

    agent = TraceFacts(traces).agent
    task = trace_task(live, traces[0], agent) if session is None else conversation_task(live, traces, session, agent)
    with judged(settings, known_database(settings), [live], runs_agents=False) as judges:
        for note in judges.notes if judges else ():
            output().print(Text(f"Note: {note}"), soft_wrap=True)
        begun = time.perf_counter()
        outcome = judges.run(task) if judges and live.is_judge else task.run()
        return outcome, time.perf_counter() - begun


def _show(live: "LiveScorer", traces: "list[Trace]", outcome: "ScorerOutcome", took_s: float) -> None:
    from gateway.evaluation.catalog import runs_live  # noqa: PLC0415 - see above
    from gateway.evaluation.filters import TraceFacts  # noqa: PLC0415 - see above
    from gateway.evaluation.scoring import NotApplicable  # noqa: PLC0415 - see above

    console = output()
    reason = live.applies(TraceFacts(traces))
    of_live = "switched off" if not runs_live(live) else f"not on this one: {reason}" if reason else "yes"
    lines = [("scorer", f"{live.name} ({live.place}), version {live.version}"), ("live", f"{of_live}{_share(live)}")]
    for score in outcome.scores:
        lines += _said(score)
    if isinstance(outcome, NotApplicable):
        lines.append(("result", f"not applicable: {outcome.reason}"))
    lines += [("took", f"{took_s:.2f} s")]
    for what, text in lines:
        console.print(Text.assemble((f"{what:<10}", "bold"), text), soft_wrap=True)


def _share(live: "LiveScorer") -> str:
    return "" if live.rule.share == 1 else f", a share of {live.rule.share:g}"


def _said(score: "Score") -> Iterator[tuple[str, str]]:
    yield "assessment", score.name
    if score.error is not None:
        yield "failed", score.error
    else:
        yield "value", repr(score.value)
        yield "verdict", _VERDICTS[score.passed]
    if score.rationale:
        yield "rationale", score.rationale
    if spent := [text.format(score.details[key]) for key, text in _SPENT.items() if key in score.details]:
        yield "cost", ", ".join(spent)


def _cells(live: "LiveScorer") -> Iterator[str]:
    from gateway.evaluation.catalog import runs_live  # noqa: PLC0415 - see above

    rule = live.rule
    yield live.name
    yield "conversations" if live.scores_conversations else "traces"
    yield "yes" if runs_live(live) else "no: switched off" if not rule.enabled else "no: no judge model"
    yield "all" if rule.agents is None else ", ".join(rule.agents)
    yield f"{rule.share:g}"
    yield _filter(rule)
    yield live.model or ""
    yield rule.dataset or ""
    yield live.version
    yield live.place


def _filter(rule: ScorerRule) -> str:
    wanted = rule.filter
    parts = [f"status {wanted.status}"] if wanted.status else []
    parts += [f"{key}={value}" for key, value in wanted.tags.items()]
    parts += [f"calls {' or '.join(wanted.tools)}"] if wanted.tools else []
    parts += [f"{wanted.slower_than_s:g} s or more"] if wanted.slower_than_s is not None else []
    parts += [f"less than {wanted.faster_than_s:g} s"] if wanted.faster_than_s is not None else []
    return ", ".join(parts)
