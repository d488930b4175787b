"""What the tests of the evaluator share: finished runs in the outbox, and an evaluator's parts driven by hand."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psycopg

from gateway.crypto import load_keys
from gateway.evaluation.catalog import load_scorers
from gateway.evaluation.claims import PRESENCE_LOCK
from gateway.evaluation.conversations import ConversationScoring
from gateway.evaluation.datasets import DatasetFeeder
from gateway.evaluation.erasure import MlflowErasure
from gateway.evaluation.intake import TraceIntake
from gateway.evaluation.parts import Ground, judge_calls, put_together
from gateway.evaluation.pressure import Pressure
from gateway.evaluation.promotion import TagProjection
from gateway.evaluation.scoring import LiveScorer
from gateway.evaluation.scoring_worker import ScoringWorker
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.settings import Settings
from gateway.storage.database import Pool, open_pool
from gateway.storage.queue import open_queue
from gateway.tracing.handover.storing import FinishedRun, store_runs
from gateway.tracing.spans import Span, Trace, encode

MS = 1_000_000


class Parts(NamedTuple):
    """The evaluator's parts, driven by hand instead of by jobs."""

    settings: Settings
    pool: Pool
    store: Any
    intake: TraceIntake
    conversations: ConversationScoring
    worker: ScoringWorker
    pressure: Pressure
    datasets: DatasetFeeder
    erasure: MlflowErasure
    projection: TagProjection


def made(session: str = "s-1", text: str = "12 + 30", **fields: Any) -> Trace:
    """Return a finished trace: the agent, and one model call."""
    digits, started = uuid.uuid4().hex, time.time_ns() - 100 * MS
    asked = [{"role": "user", "content": text}]
    answer = {"role": "assistant", "content": "It is 42."}
    usage = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
    attributes = {"mlflow.llm.model": "gpt-4o-mini", "mlflow.llm.provider": "openai", "mlflow.chat.tokenUsage": usage}
    outputs = {"choices": [{"index": 0, "message": answer}]}
    root = Span(
        digits[16:], None, "math", "AGENT", started, started + 90 * MS, {"messages": asked}, {"messages": [answer]}
    )
    call = Span(
        uuid.uuid4().hex[:16], root.span_id, "gpt-4o-mini", "CHAT_MODEL", started + MS, started + 80 * MS,
        {"messages": [{"role": "system", "content": "You calculate."}, *asked]}, outputs, attributes,
    )  # fmt: skip
    frame = {"agent": "math", "agent_version": "v1", "session_id": session, "user_id": "u-1", "offline": False}
    times = {"started_ns": started, "ended_ns": started + 90 * MS}
    return Trace(trace_id=f"tr-{digits}", spans=[root, call], **(frame | times | fields))


def fill(
    settings: Settings, *traces: Trace, rate: float = 1.0, drawn: bool = True, rules: Sequence[str] = ()
) -> list[str]:
    """Hand traces over as a web process does, and return their ids."""
    cipher = load_keys(settings).outbox
    runs = [
        FinishedRun(
            trace.trace_id, trace.agent, trace.agent_version, trace.session_id, trace.user_id, trace.key_id, 1,
            trace.error is not None, trace.offline, trace.started_ns, trace.duration_ms, rate, drawn, list(rules),
            "pending", cipher.encrypt(encode(trace), trace.trace_id),
        )
        for trace in traces
    ]  # fmt: skip

    async def store() -> None:
        async with await psycopg.AsyncConnection.connect(url_of(settings)) as connection:  # commits at its end
            await store_runs(connection, runs, hold=True)

    with ThreadPoolExecutor(1) as thread:  # beside the test's own event loop
        thread.submit(asyncio.run, store()).result()
    return [trace.trace_id for trace in traces]


def url_of(settings: Settings) -> str:
    """Return the URL of the test's database."""
    assert settings.database_url
    return settings.database_url.get_secret_value()


@asynccontextmanager
async def evaluator(
    settings: Settings,
    uri: str,
    store_type: type[MlflowStore] = MlflowStore,
    scorers: list[LiveScorer] | None = None,
    entities: Callable[[Trace], Trace] | None = None,
    *,
    alive: bool = False,
) -> AsyncIterator[Parts]:
    """Open an evaluator's parts on the test's database, with MLflow at ``uri``.

    Without ``alive`` it is, to the claims, one that has died.
    """
    configure_mlflow(settings, uri)
    store = await asyncio.to_thread(store_type, uri, settings.mlflow_experiment)
    live = await asyncio.to_thread(load_scorers, settings) if scorers is None else scorers
    async with (
        open_pool(url_of(settings), max_size=8, name="test") as pool,
        await psycopg.AsyncConnection.connect(url_of(settings), autocommit=True) as presence,
        judge_calls(settings, pool) as (relay, budget),
    ):
        cursor = await presence.execute("INSERT INTO evaluators (host, pid) VALUES ('test', 1) RETURNING evaluator_id")
        [number] = await cursor.fetchone() or [0]
        if alive:
            await presence.execute("SELECT pg_advisory_lock(%s, %s)", [PRESENCE_LOCK, number])
        ground = Ground(settings, load_keys(settings), pool, await open_queue(pool), store, number, lambda: live)
        parts = put_together(ground, relay, budget, entities)
        yield Parts(settings, pool, store, **vars(parts))
