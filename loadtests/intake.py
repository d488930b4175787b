"""Load test of the evaluator's intake: how many traces a second one evaluator takes from the outbox into MLflow.

Each trace has six spans and gets six scores of scorers in plain code::

    python loadtests/intake.py

fills an outbox with encrypted traces as web processes do, empties it into MLflow, several rounds in turn with the store
opened directly and over REST, and prints medians. It starts its own Postgres and MLflow server, in a temporary folder.
The evaluator has one core to itself, the servers have the others. ::

    python loadtests/intake.py --burst-of 3000

writes traces much faster than one evaluator takes them, and shows how the lag rises and falls. The exit code is 1 if a
trace is missing in the end.
"""

import asyncio
import gc
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import httpx
import psutil
import psycopg
from rich.console import Console
from rich.table import Table
from scoring_runs.usage import cpu_s

from gateway.settings import MLFLOW_DEFAULTS, Settings, sibling_database, sqlalchemy_url

os.environ.update(MLFLOW_DEFAULTS)  # before MLflow is imported

from mlflow.entities import Trace as MlflowTrace

from gateway.crypto import Keys, load_keys
from gateway.evaluation.catalog import load_scorers
from gateway.evaluation.export import kept_tags, to_mlflow
from gateway.evaluation.intake import IntakeParts, TraceIntake
from gateway.evaluation.records import redacted
from gateway.evaluation.scoring import LiveScorer, score_trace
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.evaluation.threads import ScorerThreads
from gateway.storage.database import create_database, migrate, open_pool
from gateway.storage.embedded import EmbeddedPostgres
from gateway.tracing.handover.storing import FinishedRun, store_runs
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Span, Trace, decode, encode

ROOT = Path(__file__).parent.parent
SIX = (
    "no_tool_errors",
    "valid_tool_arguments",
    "no_redundant_calls",
    "answer_uses_tool_result",
    "no_ungrounded_values",
    "no_empty_answer",
)
"""Scorers in plain code, those that look at every value of the answer among them."""
TURNS = 3
"""Turns of a session."""
FILL_BATCH = 200
"""Runs that are written in one transaction, as a web process under load does."""
LOOK_S, SAMPLE_S = 0.1, 2.0
"""How often the evaluator looks for more, and how often the lag is looked at."""
MS = 1000.0
LAG = """
    SELECT (SELECT count(*) FROM runs), count(*), extract(epoch FROM now() - min(created_at))::float8
    FROM outbox WHERE NOT held
"""


@dataclass
class Round:
    """What one round took, in seconds for all of its traces."""

    traces: int
    wall_s: float
    decode_s: float
    """CPU: decrypting, decoding, making MLflow's entities."""
    score_s: float
    """CPU: running the scorers, redacting what they say."""
    store_s: float
    """CPU of the evaluator, in MLflow's store or its client."""
    whole_s: float
    """CPU of the evaluator: all of the above, claims and the ledger."""
    servers_s: float
    """CPU of Postgres, and of the MLflow server over REST."""


class TimedStore(MlflowStore):
    """The store, with the CPU time that writing takes."""

    cpu_s = 0.0

    def write_traces(self, traces: list[MlflowTrace]) -> None:
        """Write, and count."""
        started = time.process_time()  # of all threads: over REST there are some
        super().write_traces(traces)
        self.cpu_s += time.process_time() - started


class Bench:
    """One evaluator on a database of its own."""

    def __init__(self, settings: Settings, servers: list[psutil.Process]):
        self.settings = settings
        self.keys: Keys = load_keys(settings)
        self.redactor = Redactor(self.keys.derive("redaction"))
        self.scorers = six_scorers(settings)
        self._servers = servers

    @asynccontextmanager
    async def evaluator(self, uri: str) -> AsyncIterator[tuple[TraceIntake, TimedStore]]:
        """Open an evaluator's intake that writes to MLflow at ``uri``."""
        configure_mlflow(self.settings, uri)
        store = TimedStore(uri, "intake")
        url = database_of(self.settings)
        async with open_pool(url, max_size=6, name="load-test") as pool:
            async with pool.connection() as connection:
                cursor = await connection.execute(
                    "INSERT INTO evaluators (host, pid) VALUES ('load test', 0) RETURNING evaluator_id"
                )
                [number] = await cursor.fetchone() or [0]
            parts = IntakeParts(lambda: self.scorers, ScorerThreads(), self.redactor)
            yield TraceIntake(self.settings, self.keys, pool, store, int(str(number)), parts), store

    def servers_s(self) -> float:
        """Return the CPU time that the servers have taken so far."""
        return sum(map(cpu_s, self._servers))

    async def round(self, intake: TraceIntake, store: TimedStore, traces: int) -> Round:
        """Fill the outbox, take the traces in, and see where the time went."""
        await fill(self.settings, traces)
        decode_s, score_s = self._apart(store.experiment_id, traces)
        store_s, servers_s = store.cpu_s, self.servers_s()
        cpu_s, started = time.process_time(), time.perf_counter()
        await intake.drain()
        wall_s, whole_s = time.perf_counter() - started, time.process_time() - cpu_s
        with psycopg.connect(database_of(self.settings)) as connection:
            left = connection.execute("SELECT state, scored_by, count(*) FROM runs GROUP BY 1, 2").fetchall()
            connection.execute("TRUNCATE runs, scores, conversations, sampled_sessions CASCADE")
        if left != [("scored", len(SIX), traces)]:
            raise SystemExit(f"not all of {traces} traces were scored by {len(SIX)}: {left}")
        return Round(traces, wall_s, decode_s, score_s, store.cpu_s - store_s, whole_s, self.servers_s() - servers_s)

    def _apart(self, experiment_id: str, traces: int) -> tuple[float, float]:
        """Return the CPU time of decoding and of scoring what waits, each done by itself."""
        with psycopg.connect(database_of(self.settings)) as connection:
            rows = connection.execute("SELECT trace_id, payload FROM outbox LIMIT %s", [traces]).fetchall()
        started = time.process_time()
        decoded = [decode(self.keys.outbox.decrypt(payload, trace_id)) for trace_id, payload in rows]
        entities = [to_mlflow(trace, experiment_id, kept_tags(1.0, ["sampled"])) for trace in decoded]
        between = time.process_time()  # of all threads: MLflow gives each scorer one of its own
        for trace, entity in zip(decoded, entities, strict=True):
            scores = [score for live in self.scorers for score in score_trace(live, entity, trace.agent)]
            redacted(self.redactor, trace.session_id, scores)
        return between - started, time.process_time() - between


def six_scorers(settings: Settings) -> list[LiveScorer]:
    """Return six of the project's scorers of single traces, in plain code; each says something of each trace."""
    known = {live.name: live for live in load_scorers(settings)}
    return [known[name] for name in SIX]


def realistic(number: int) -> Trace:
    """Return a finished run of six spans: the agent, three model calls, two tool calls."""
    order, trace_id = f"A-{1000 + number}", f"tr-{uuid.uuid4().hex}"
    root, ms = trace_id[-16:], 1_000_000
    started = time.time_ns() - 2500 * ms
    answer = {"role": "assistant", "content": f"Order {order} was shipped with Kestrel Freight and arrives on Tuesday."}
    asked = {"role": "user", "content": f"Where is my order {order}, and when does it arrive? " * 3}
    system = {"role": "system", "content": "You help the customers of a shop with their orders and returns. " * 15}
    tools = [definition(name) for name in ("lookup_order", "track_shipment", "refund_order", "search_policies")]
    found = {"order_id": order, "status": "shipped", "carrier": "Kestrel Freight", "arrives": "Tuesday"}
    messages: list[dict[str, Any]] = [system, asked]
    spans = [
        Span(
            root, None, "support", "AGENT", started, started + 2400 * ms, {"messages": [asked]}, {"messages": [answer]}
        )
    ]
    for step, tool in enumerate(("lookup_order", "track_shipment", None)):
        at = started + step * 800 * ms
        call = {
            "id": f"call_{step}",
            "type": "function",
            "function": {"name": tool, "arguments": json.dumps({"order_id": order})},
        }
        message = {"role": "assistant", "content": None, "tool_calls": [call]} if tool else answer
        usage = {"input_tokens": 600 + 80 * step, "output_tokens": 40, "total_tokens": 640 + 80 * step}
        attributes = {
            "mlflow.llm.model": "gpt-4o-mini",
            "mlflow.llm.provider": "openai",
            "mlflow.chat.tools": tools,
            "mlflow.chat.tokenUsage": usage,
        }
        given, made = {"messages": list(messages)}, {"choices": [{"index": 0, "message": message}]}
        spans.append(
            Span(secrets.token_hex(8), root, "gpt-4o-mini", "CHAT_MODEL", at, at + 600 * ms, given, made, attributes)
        )
        messages.append(message)
        if tool:
            arguments = {"order_id": order}
            spans.append(Span(secrets.token_hex(8), root, tool, "TOOL", at + 600 * ms, at + 800 * ms, arguments, found))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(found)})
    session = f"session-{number // TURNS}-{os.getpid()}"
    frame = (trace_id, "support", "load-test", session, f"user-{number % 50}", False)
    return Trace(*frame, started, started + 2400 * ms, spans)


def definition(name: str) -> dict[str, Any]:
    """Return a tool's definition as the model gets it."""
    about = {"order_id": {"type": "string", "description": "Id of the order, such as A-1001, as the customer gave it."}}
    parameters = {"type": "object", "properties": about, "required": ["order_id"], "additionalProperties": False}
    described = f"The tool {name} of the shop: takes the id of an order and tells what is known of it."
    return {"type": "function", "function": {"name": name, "description": described, "parameters": parameters}}


async def fill(settings: Settings, traces: int) -> None:
    """Write finished runs into the outbox, as a web process does."""
    cipher = load_keys(settings).outbox
    async with await psycopg.AsyncConnection.connect(database_of(settings), autocommit=True) as connection:
        for first in range(0, traces, FILL_BATCH):
            batch = [realistic(number) for number in range(first, min(first + FILL_BATCH, traces))]
            async with connection.transaction():
                await store_runs(connection, [finished(trace, cipher) for trace in batch], hold=True)


def finished(trace: Trace, cipher: Any) -> FinishedRun:
    """Return a run as the ledger takes it."""
    return FinishedRun(
        trace_id=trace.trace_id,
        agent=trace.agent,
        agent_version=trace.agent_version,
        session_id=trace.session_id,
        user_id=trace.user_id,
        key_id=trace.key_id,
        process_id=1,
        failed=False,
        offline=False,
        started_ns=trace.started_ns,
        duration_ms=trace.duration_ms,
        rate=1.0,
        drawn=True,
        rules=[],
        state="pending",
        payload=cipher.encrypt(encode(trace), trace.trace_id),
    )


def fill_elsewhere(settings: dict[str, Any], traces: int) -> None:
    """Fill the outbox from a process of its own."""
    asyncio.run(fill(Settings(**settings), traces))


def database_of(settings: Settings) -> str:
    """Return the URL of the gateway's database."""
    if settings.database_url is None:
        raise SystemExit("the load test makes a database of its own")
    return settings.database_url.get_secret_value()


@contextmanager
def mlflow_server(uri: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run an MLflow server as `gateway serve` does; return its URL and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)  # noqa: S603 - ours
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                httpx.get(f"{url}/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url, psutil.Process(server.pid)
    finally:
        for process in (*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)):
            process.terminate()
        server.wait(20)


async def measure(bench: Bench, uris: dict[str, str], traces: int, rounds: int) -> dict[str, list[Round]]:
    """Measure each way of writing in turn; the first round of each only warms up."""
    results: dict[str, list[Round]] = {name: [] for name in uris}
    for number in range(rounds + 1):
        for name, uri in uris.items():
            async with bench.evaluator(uri) as (intake, store):
                result = await bench.round(intake, store, traces if number else bench.settings.evaluator_batch)
            if number:
                results[name].append(result)
    return results


async def burst(bench: Bench, uri: str, traces: int) -> bool:
    """Write traces much faster than they are taken in; return whether all are in MLflow in the end."""
    settings: dict[str, Any] = bench.settings.model_dump(include={"home", "database_url", "secret_key"})
    writer = multiprocessing.get_context("spawn").Process(target=fill_elsewhere, args=(settings, traces))
    table = Table("s", "written", "waiting", "oldest, s", "taken in", title="Burst", title_justify="left")

    async def work(intake: TraceIntake) -> None:
        while True:
            await intake.drain()
            await asyncio.sleep(LOOK_S)

    async with bench.evaluator(uri) as (intake, store):
        writer.start()
        working, started = asyncio.create_task(work(intake)), time.perf_counter()
        written = waiting = 0
        async with await psycopg.AsyncConnection.connect(database_of(bench.settings), autocommit=True) as connection:
            while not working.done() and (writer.is_alive() or waiting):
                await asyncio.sleep(SAMPLE_S)
                written, waiting, oldest_s = await (await connection.execute(LAG)).fetchone() or (0, 0, 0.0)
                if written:
                    now, oldest = f"{time.perf_counter() - started:.0f}", f"{oldest_s or 0:.1f}"
                    table.add_row(now, f"{written}", f"{waiting}", oldest, f"{written - waiting}")
            working.cancel()
            cursor = await connection.execute("SELECT trace_id FROM runs WHERE state = 'scored'")
            scored = [str(row[0]) for row in await cursor.fetchall()]
        known = {each for at in range(0, len(scored), 100) for each in store.known(scored[at : at + 100])}
    writer.join()
    Console().print(table, f"{traces} traces written, {len(scored)} scored, {len(known)} in MLflow", sep="\n")
    return len(scored) == len(known) == traces


def report(results: dict[str, list[Round]]) -> Table:
    """Return the medians as a table."""

    def median(rounds: list[Round], name: str) -> float:
        return statistics.median([float(getattr(each, name)) / each.traces * MS for each in rounds])

    table = Table("", *results, title="Intake, medians", title_justify="left")
    rates = [[each.traces / each.wall_s for each in rounds] for rounds in results.values()]
    table.add_row("traces/s, one evaluator on one core", *(f"{statistics.median(each):.0f}" for each in rates))
    by_cpu = [statistics.median([each.traces / each.whole_s for each in rounds]) for rounds in results.values()]
    table.add_row("  from round to round", *(f"{min(each):.0f} to {max(each):.0f}" for each in rates))
    table.add_row("traces/s of its processor time", *(f"{each:.0f}" for each in by_cpu))
    rows = {
        "whole_s": "evaluator, ms CPU a trace",
        "decode_s": "  decode",
        "score_s": "  score",
        "store_s": "  store",
        "servers_s": "servers, ms CPU a trace",
    }
    for name, label in rows.items():
        table.add_row(label, *(f"{median(rounds, name):.1f}" for rounds in results.values()))
    return table


def main(*, traces: int = 500, rounds: int = 3, rest: bool = True, burst_of: int | None = None) -> None:
    """Measure the intake.

    Args:
        traces: Traces of a round.
        rounds: Rounds of each way of writing.
        rest: Write over REST as well.
        burst_of: Instead, show the lag while so many traces are written at once.
    """
    if burst_of is not None:
        with ground() as parts:
            own_core()
            is_whole = asyncio.run(burst(Bench(parts.settings, [parts.database]), parts.uri, burst_of))
        sys.exit(0 if is_whole else 1)
    Console().print(report(take_in(traces, rounds, rest=rest)))


@dataclass(frozen=True)
class Ground:
    """What the evaluator stands on."""

    settings: Settings
    uri: str
    """MLflow's database, as SQLAlchemy takes it."""
    database: psutil.Process
    folder: Path


@contextmanager
def ground() -> Iterator[Ground]:
    """Run a Postgres with both databases, in a temporary folder, until the block is left."""
    with tempfile.TemporaryDirectory(prefix="intake-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # for a Postgres that may run as somebody else
        postgres = EmbeddedPostgres(folder / "postgres")
        url = postgres.start()
        try:
            migrate(url)
            create_database(url, "mlflow")
            uri = sqlalchemy_url(sibling_database(url, "mlflow"))
            settings = Settings(
                home=folder / "home",
                database_url=url,  # type: ignore[arg-type]
                secret_key="the secret of a load test",  # type: ignore[arg-type]  # noqa: S106
                agents_dir=ROOT / "agents",
                scorers_dir=ROOT / "scorers",
            )
            MlflowStore(uri, "intake")  # makes the tables, before a server would
            yield Ground(settings, uri, psutil.Process(postgres.pid), folder)
        finally:
            postgres.stop()


def take_in(traces: int, rounds: int, *, rest: bool) -> dict[str, list[Round]]:
    """Take traces in, directly and, if ``rest``, over REST in turn; return the rounds of each."""
    with ground() as parts:
        if not rest:
            own_core()
            return asyncio.run(measure(Bench(parts.settings, [parts.database]), {"direct": parts.uri}, traces, rounds))
        with mlflow_server(parts.uri, parts.folder) as (url, server):
            own_core()
            bench = Bench(parts.settings, [parts.database, server])
            return asyncio.run(measure(bench, {"direct": parts.uri, "REST": url}, traces, rounds))


def own_core() -> None:
    """Keep this process to one core, once its servers are started, and its memory as an evaluator does."""
    gc.collect()
    gc.freeze()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    cyclopts.run(main)
