"""The judges of a command go through the same relay as those of an evaluator: counted, bounded, out of one budget.

A command blocks, as `mlflow.genai.evaluate` does, so the relay has an event loop in a thread of its own. With the
gateway's database, concurrency, calls a minute and the budget are those of all workers, this command included. Where
there is none (a CI job has MLflow alone), a call and a scoring have the same limits, and the budget is for the command.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import psycopg
from anyio.from_thread import BlockingPortal, start_blocking_portal

from gateway.errors import ConfigurationError
from gateway.evaluation.judging.binding import calling_under
from gateway.evaluation.judging.leases import Lease, Problem
from gateway.evaluation.judging.limits import ModelLimits
from gateway.evaluation.judging.relay import Relay, RelayParts
from gateway.evaluation.judging.spending import BudgetKeeper, SpendingBook
from gateway.evaluation.parts import judge_budget, judge_calls, judge_limits, judge_prices
from gateway.evaluation.scoring import Failed, LiveScorer, NotApplicable, ScorerOutcome, ScorerTask
from gateway.settings import Settings
from gateway.storage.database import migrate, open_pool

ALONE = (
    "The gateway's database is not there: concurrency and calls a minute of the judges are not bounded together with "
    "those of the evaluators, and what they spend counts for this command's own budget only."
)

PATIENCE_S = 20.0
"""How long a scoring waits for a model that is left alone: the first such time, not those that follow."""

_SHORTEST_PAUSE_S = 0.5
_POOL_SIZE = 4
_CONNECT_S = 5
_USED_UP = (
    "The budget of the judges is used up (GATEWAY_JUDGE_USD_PER_HOUR, …_USD_PER_DAY, GATEWAY_JUDGE_TOKENS_PER_HOUR, "
    "…_TOKENS_PER_DAY). Wait for the next hour or day (UTC), raise it, or name by --scorer only scorers in plain code."
)
_OF_CLIENTS = ("OPENAI_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_KEY")


class Asking:
    """One scoring that asks, under a lease as each scoring of an evaluator has one. Made by `Judges.asking`."""

    def __init__(self, lease: Lease, patience_s: float, over: threading.Event):
        self._lease = lease
        self._patient_until = time.monotonic() + patience_s
        self._over = over

    @property
    def problem(self) -> Problem | None:
        """Why its last call had no answer; ``None``: it had one, or there was none."""
        return self._lease.problem

    @property
    def spent(self) -> dict[str, str]:
        """What it has spent so far, as an assessment's metadata says it; empty if nothing was asked."""
        return self._lease.usage.details()

    def is_worth_another_try(self) -> bool:
        """Whether to ask again now: the model was left alone for a moment, and that, which this waits for, is over.

        An evaluator would score the subject later. Here is no later, and a provider's bad moment must not fail a gate.
        """
        if self.problem is None or self.problem.kind != "breaker_open":
            return False
        pause_s = max(self.problem.retry_after_s or 0.0, _SHORTEST_PAUSE_S)
        if time.monotonic() + pause_s > self._patient_until:
            return False
        return not self._over.wait(pause_s)


class Judges:
    """The way out for the judges of one command, from `judged`. For any thread."""

    def __init__(
        self, portal: BlockingPortal, relay: Relay, notes: Sequence[str] = (), *, patience_s: float = PATIENCE_S
    ):
        self._portal = portal
        self._relay = relay
        self._patience_s = patience_s
        self._over = threading.Event()
        self.notes = notes
        """What holds for this command and not for an evaluator."""

    @contextmanager
    def asking(self, live: LiveScorer, subject: str) -> Iterator[Asking]:
        """Make the judge calls of the block, and of this thread, those of one scoring.

        Args:
            live: the scorer.
            subject: what it scores, for logs.
        """
        lease = self._portal.call(self._relay.lease, f"{subject}/{live.name}", live.name, live.model or "")
        try:
            with calling_under(lease.lease_id):
                yield Asking(lease, self._patience_s, self._over)
        finally:
            self._portal.call(self._relay.close, lease)

    def run(self, task: ScorerTask) -> ScorerOutcome:
        """Run a judge here and now; the scores say what it spent."""
        with self.asking(task.live, task.subject) as asking:
            outcome = task.run()
            while isinstance(outcome, Failed) and asking.is_worth_another_try():
                outcome = task.run()
        if isinstance(outcome, NotApplicable):
            return outcome
        return replace(outcome, scores=[replace(each, details=each.details | asking.spent) for each in outcome.scores])

    def give_up(self) -> None:
        """Wait for no model any more."""
        self._over.set()

    def metrics(self) -> dict[str, float]:
        """Return what all calls so far took; without the cost, if the price of one of them is not known."""
        used = [model.usage for model in self._relay.models.values()]
        metrics: dict[str, float] = {
            "judge_calls": sum(each.calls for each in used),
            "judge_input_tokens": sum(each.tokens.input for each in used),
            "judge_output_tokens": sum(each.tokens.output for each in used),
        }
        if not any(each.unpriced_calls for each in used):
            metrics["judge_cost_usd"] = sum(each.cost_usd for each in used)
        return metrics


@contextmanager
def judged(
    settings: Settings,
    database: str | None,
    scorers: Sequence[LiveScorer],
    *,
    runs_agents: bool,
    patience_s: float = PATIENCE_S,
) -> Iterator[Judges | None]:
    """Send the judges of this process to a relay until the block is left; ``None``: there is none to send.

    Args:
        settings: with the limits, prices and budgets.
        database: URL of the gateway's; ``None``: it has none here.
        scorers: those that will run.
        runs_agents: agents run in this process, too: what they ask by clients of OpenAI is no judging.
        patience_s: how long a scoring waits for a model that is left alone.

    Raises:
        ConfigurationError: the budget is used up; the judges' base URL is none, or this MLflow calls judges in a way
            that we do not know.
    """
    has_judges = any(each.is_judge for each in scorers)
    if not has_judges and not settings.judge_model:  # a function that asks a judge is none, and asks the default model
        yield None
        return
    with start_blocking_portal() as portal:
        if database is not None and settings.database_url is None:
            migrate(database)  # the home's own: nothing else may ever have run on it
        is_shared = database is not None and portal.call(_is_there, database)
        relaying = _shared(settings, str(database)) if is_shared else _alone(settings)
        before = {name: os.environ.get(name) for name in _OF_CLIENTS}
        with portal.wrap_async_context_manager(relaying) as (relay, budget):
            if has_judges and portal.call(lambda: budget.used) >= 1.0:
                raise ConfigurationError(_USED_UP)
            if runs_agents:
                _put_back(before)
            judges = Judges(portal, relay, [ALONE] if has_judges and not is_shared else [], patience_s=patience_s)
            try:
                yield judges
            finally:
                judges.give_up()


async def _is_there(url: str) -> bool:
    """Whether a database answers and has the book of what judges spend; it is not brought up to date for that."""
    try:
        async with await psycopg.AsyncConnection.connect(url, connect_timeout=_CONNECT_S) as connection:
            row = await (await connection.execute("SELECT to_regclass('judge_spending') IS NOT NULL")).fetchone()
    except psycopg.OperationalError:
        return False
    return row == (True,)


@asynccontextmanager
async def _shared(settings: Settings, url: str) -> AsyncIterator[tuple[Relay, BudgetKeeper]]:
    async with (
        open_pool(url, max_size=_POOL_SIZE, name="judges") as pool,
        AsyncExitStack() as at_last,
        judge_calls(settings, pool) as (relay, budget),
    ):
        await budget.look()
        at_last.push_async_callback(budget.look)  # once more when the relay has given up what was under way
        keeping = asyncio.create_task(budget.run(), name="budget")
        try:
            yield relay, budget
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


@asynccontextmanager
async def _alone(settings: Settings) -> AsyncIterator[tuple[Relay, BudgetKeeper]]:
    """Run a relay that needs no database: nothing is shared, and the book is kept in memory."""
    pool = open_pool("", max_size=1, name="judges")  # never opened: nobody asks it for a connection
    book = SpendingBook(pool)
    budget = BudgetKeeper(judge_budget(settings), book)

    async def may_call() -> bool:
        return budget.used < 1.0

    limits = replace(judge_limits(settings), default=ModelLimits(concurrency=None), models={})
    async with Relay(RelayParts(limits, judge_prices(settings), pool, "", book, may_call)) as relay:
        with relay.routing_judges():
            yield relay, budget


def _put_back(before: dict[str, str | None]) -> None:
    """Let clients find their API where it was. Judges' calls reach the relay without it, where MLflow sends them."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
