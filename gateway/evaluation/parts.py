"""The only place where an evaluator is put together."""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from procrastinate import App

from gateway.crypto import Keys
from gateway.evaluation.conversations import ConversationScoring
from gateway.evaluation.datasets import DatasetFeeder
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.entities import EntityRedactor
from gateway.evaluation.erasure import MlflowErasure
from gateway.evaluation.intake import IntakeParts, TraceIntake
from gateway.evaluation.judging.budget import Budget
from gateway.evaluation.judging.limits import JudgeLimits, ModelLimits
from gateway.evaluation.judging.prices import Price, Prices
from gateway.evaluation.judging.relay import Relay, RelayParts, upstream_of
from gateway.evaluation.judging.spending import BudgetKeeper, SpendingBook
from gateway.evaluation.pressure import Pressure
from gateway.evaluation.promotion import TagProjection
from gateway.evaluation.scoring import LiveScorer
from gateway.evaluation.scoring_worker import ScoringWorker, WorkerParts
from gateway.evaluation.scorings import Scorings
from gateway.evaluation.selection import Room
from gateway.evaluation.store import MlflowStore
from gateway.evaluation.threads import ScorerThreads
from gateway.rules import JudgeModelRule
from gateway.settings import Settings
from gateway.storage.database import Pool, database_url
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Trace


@dataclass(frozen=True)
class Ground:
    """What an evaluator stands on."""

    settings: Settings
    keys: Keys
    pool: Pool
    queue: App
    store: MlflowStore
    evaluator_id: int
    scorers: Callable[[], Sequence[LiveScorer]]
    """Those that run live, as they are now."""
    rules: Callable[[], Rules] = dict
    """Rules of the datasets, as they are now."""


@dataclass(frozen=True)
class EvaluatorParts:
    """What does the work."""

    intake: TraceIntake
    conversations: ConversationScoring
    worker: ScoringWorker
    pressure: Pressure
    datasets: DatasetFeeder
    erasure: MlflowErasure
    projection: TagProjection


def put_together(
    ground: Ground,
    relay: Relay | None = None,
    budget: BudgetKeeper | None = None,
    entities: Callable[[Trace], Trace] | None = None,
) -> EvaluatorParts:
    """Put an evaluator together.

    Args:
        ground: what it stands on.
        relay: through which judges ask; ``None``: directly, and without limits.
        budget: of the judges; ``None``: none.
        entities: replaces named entities; ``None``: what the settings say.
    """
    settings, pool, store = ground.settings, ground.pool, ground.store
    redactor = Redactor(ground.keys.derive("redaction"), settings.redact_patterns)
    if entities is None and settings.ner:
        entities = EntityRedactor(settings, redactor).trace
    threads = ScorerThreads()

    pressure = Pressure(settings, pool)

    def room() -> Room:
        return Room(1.0 if budget is None else budget.share, pressure.share)

    worker = _worker(ground, threads, redactor, relay, pressure, room)
    parts = IntakeParts(
        ground.scorers,
        threads,
        redactor,
        room=room,
        rules=ground.rules,
        entities=entities,
        wake=worker.wake,
        give_way=pressure.give_way,
    )
    datasets = DatasetFeeder(pool, store, redactor, ground.rules)
    return EvaluatorParts(
        TraceIntake(settings, ground.keys, pool, store, ground.evaluator_id, parts),
        ConversationScoring(ground.keys, pool, ground.queue, store, parts, timeout_s=settings.scorer_timeout_s),
        worker,
        pressure,
        datasets,
        MlflowErasure(pool, ground.queue, store, datasets),
        TagProjection(pool, store),
    )


def _worker(
    ground: Ground,
    threads: ScorerThreads,
    redactor: Redactor,
    relay: Relay | None,
    pressure: Pressure,
    room: Callable[[], Room],
) -> ScoringWorker:
    settings = ground.settings
    return ScoringWorker(
        WorkerParts(
            ground.pool,
            ground.store,
            Scorings(ground.pool, ground.evaluator_id),
            ground.scorers,
            threads,
            redactor,
            relay,
            ground.rules,
            concurrency=settings.judge_concurrency,
            timeout_s=settings.judge_timeout_s,
            share_key=ground.keys.derive("sampling"),
            room=room,
            is_pressed=lambda: pressure.is_high,
        )
    )


@asynccontextmanager
async def judge_calls(settings: Settings, pool: Pool) -> AsyncIterator[tuple[Relay, BudgetKeeper]]:
    """Run the relay, and send the judges of this process there until the block is left.

    Raises:
        ConfigurationError: the judges' base URL is none, or this MLflow calls judges in a way that we do not know.
    """
    book = SpendingBook(pool)
    budget = BudgetKeeper(judge_budget(settings), book)
    limits, prices = judge_limits(settings), judge_prices(settings)
    parts = RelayParts(limits, prices, pool, database_url(settings), book, may_call=budget.may_call)
    async with Relay(parts) as relay:
        with relay.routing_judges():
            yield relay, budget


def judge_limits(settings: Settings) -> JudgeLimits:
    """Return what bounds the calls of judges, by the settings and, for where they go, the environment as it is.

    Raises:
        ConfigurationError: the judges' base URL is none.
    """
    api_key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else None
    base_url, key = upstream_of(os.environ, settings.judge_base_url, api_key)
    rules = settings.judge_models
    return JudgeLimits(
        base_url=base_url,
        api_key=key,
        call_timeout_s=settings.judge_call_timeout_s,
        scoring_timeout_s=settings.judge_timeout_s,
        calls_per_scoring=settings.judge_calls,
        tokens_per_scoring=settings.judge_tokens,
        models={model: ModelLimits(rule.concurrency, rule.requests_per_minute) for model, rule in rules.items()},
    )


def judge_prices(settings: Settings) -> Prices:
    """Return what judge models cost: those with a price in the settings by that, the others by MLflow's list."""
    rules = settings.judge_models
    return Prices({model: _price(rule) for model, rule in rules.items() if rule.input_usd is not None})


def _price(rule: JudgeModelRule) -> Price:
    return Price(rule.input_usd or 0.0, rule.output_usd or 0.0, rule.cached_input_usd)


def judge_budget(settings: Settings) -> Budget:
    """Return what all judges together may spend, by the settings."""
    return Budget(
        settings.judge_usd_per_hour,
        settings.judge_usd_per_day,
        settings.judge_tokens_per_hour,
        settings.judge_tokens_per_day,
    )
