"""``gateway rescore``: a scorer's verdicts on what was served before it was there."""

import asyncio
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.progress import Progress
from rich.prompt import Confirm

from gateway.commands.stored import in_database, need_mlflow, output, time_of
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError
from gateway.settings import Settings, load_settings

if TYPE_CHECKING:
    from gateway.evaluation.rescoring import Cost, Window
    from gateway.evaluation.scoring import LiveScorer

_LOOK_S = 1.0


def register(app: App) -> None:
    """Add the command to the application."""
    app.command(rescore)


def rescore(
    *,
    scorer: str,
    since: str,
    until: str | None = None,
    agent: Annotated[list[str] | None, Parameter(negative="")] = None,
    share: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 1.0,
    yes: Annotated[bool, Parameter(negative="")] = False,
    wait: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Have a scorer score what was served before; say first what that costs, and ask.

    What this version of the scorer has scored already is left as it is. The evaluators that run, or will, do it after
    all that is live; for judges, only while the budget is not short.

    Args:
        scorer: Its name. It must run live; with `share = 0` in its rule it scores nothing but what it is told to here.
        since: Begin of the window: a time as 2026-01-31T08:00:00Z, or how long ago as 90s, 15m, 24h or 7d.
        until: End of the window, in the same form; now if left out.
        agent: Of this agent alone; may be given several times.
        share: Share of the traces, or conversations, above 0 and up to 1: a small one shows what the rest would cost.
        yes: Do not ask.
        wait: Stay until it is done.
    """
    need_mlflow()
    from gateway.evaluation.rescoring import Window  # noqa: PLC0415 - takes seconds to import

    settings = load_settings()
    window = Window(time_of("--since", since), time_of("--until", until) if until else None, agent)
    live = _scorer(settings, scorer)
    in_database(settings, lambda connection: _rescore(connection, settings, live, window, share, yes=yes, wait=wait))


def _scorer(settings: Settings, name: str) -> "LiveScorer":
    from gateway.evaluation.catalog import load_scorers  # noqa: PLC0415 - takes seconds to import
    from gateway.evaluation.store import configure_judges  # noqa: PLC0415 - as above

    configure_judges(settings)
    known = {live.name: live for live in load_scorers(settings)}
    if name not in known:
        raise ConfigurationError(
            f"No scorer {name} runs live, and evaluators know no others than {', '.join(sorted(known))}. Give it a "
            "rule in gateway.toml, with `share = 0` if it is to score nothing but what was served before."
        )
    return known[name]


async def _rescore(
    connection: psycopg.AsyncConnection[Any],
    settings: Settings,
    live: "LiveScorer",
    window: "Window",
    share: float,
    *,
    yes: bool,
    wait: bool,
) -> None:
    from gateway.evaluation.rescoring import cost_of_one, enqueue_back_fill, unscored  # noqa: PLC0415 - as above

    subjects, drawn_from = await unscored(connection, live, window, share, load_keys(settings).derive("sampling"))
    what = "conversations" if live.scores_conversations else "traces"
    asks = f" ({live.model})" if live.model else ""
    among = "" if share == 1 else f" of {drawn_from:,}"
    console = output()
    console.print(f"{live.name}{asks}: {len(subjects):,}{among} {what} since {_shown(window.since)} to be scored.")
    if not subjects:
        return
    cost = await cost_of_one(connection, live) if live.is_judge else None
    console.print(_estimate(settings, live, cost, len(subjects)))
    await connection.rollback()  # a transaction must not stay open while a person thinks
    if not yes and not _agreed():
        console.print("Nothing was done.")
        return
    async with connection.transaction():
        await enqueue_back_fill(connection, live, window, share, subjects)
    if wait:
        await _await_end(connection, live, len(subjects))
    else:
        console.print("The evaluators score them, after what is live. `gateway scores failed` shows what fails.")


def _estimate(settings: Settings, live: "LiveScorer", cost: "Cost | None", count: int) -> str:
    """Say what it will cost, and how that compares with the budget."""
    if not live.is_judge:
        return "It is plain code and asks no model: it costs the evaluators' time alone."
    if cost is None:
        return (
            "What one costs is not known: this judge has not been asked yet. Score a few first, with --share "
            f"{max(20 / count, 0.0001):.2g} for some {min(20, count)}, and ask again."
        )
    tokens = f"{cost.tokens * count:,.0f} tokens"
    usd = "" if cost.usd is None else f" and ${cost.usd * count:,.2f}"
    text = f"Its last {cost.scorings} took {cost.tokens:,.0f} tokens each on average: about {tokens}{usd}."
    if cost.usd is None:
        text += " The model has no price; set one in [judge_models]."
    budget = settings.judge_usd_per_day
    if budget is not None and cost.usd is not None:
        text += f" The judges' budget is ${budget:,.2f} a day."
    return text


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError("Nobody can be asked here; add --yes to have it done.")
    return Confirm.ask("Have it done?", default=False)


async def _await_end(connection: psycopg.AsyncConnection[Any], live: "LiveScorer", count: int) -> None:
    from gateway.evaluation.rescoring import left  # noqa: PLC0415 - as above

    console = output()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scored", total=count)
        while remaining := await left(connection, live):
            await connection.rollback()
            progress.update(task, total=max(count, remaining), completed=max(count - remaining, 0))
            await asyncio.sleep(_LOOK_S)
    console.print("Done. `gateway scores failed` shows what has failed.")


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
