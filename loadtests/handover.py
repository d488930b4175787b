"""What the hand-over of finished runs costs, and how long it takes: ``python loadtests/handover.py``.

Starts an embedded Postgres in a folder of its own and puts the tracing side of a web process on it, all on one event
loop that stands for the web process' own. Runs the agent `support` with its offline model once, and offers copies of
that run at a steady rate. Prints

- the time from `offer` to when the commit was heard of (looked for each millisecond), in ms;
- how late the event loop was meanwhile, in ms, beside how late it was with nothing to do;
- the CPU a run of each step, in microseconds: assemble, redact, encode, encrypt, store (the client's side of it).
"""

import argparse
import asyncio
import copy
import math
import socket
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from gateway.crypto import Keys, load_keys
from gateway.plugins import load_agents
from gateway.reloading import LiveSettings
from gateway.runs.execution import AgentExecutor
from gateway.settings import Settings
from gateway.storage.database import Pool, migrate, open_pool
from gateway.storage.embedded import EmbeddedPostgres
from gateway.storage.queue import open_queue
from gateway.tracing.capture import SpanCapture
from gateway.tracing.capture.assembly import assemble
from gateway.tracing.capture.recording import RunCapture
from gateway.tracing.handover.outbox import OutboxWriter, open_files
from gateway.tracing.handover.preparing import Preparer
from gateway.tracing.handover.settling import database_identity
from gateway.tracing.handover.storing import store_runs, transaction
from gateway.tracing.handover.tally import Owner
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.sampling import Draw
from gateway.tracing.spans import Trace, encode

KEPT = Draw(1.0, drawn=True, asked=False)
AGENT = "support"
QUESTION = "I am ana.perez@example.com. What is the status of order A-1001?"


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")


def new_trace() -> Trace:
    """Return the frame of a run that begins now."""
    return Trace(
        trace_id=f"tr-{uuid.uuid4().hex}",
        agent=AGENT,
        agent_version="1",
        session_id=f"s-{uuid.uuid4().hex}",
        user_id=None,
        offline=True,
        started_ns=time.time_ns(),
    )


async def typical_run(settings: Settings) -> RunCapture:
    """Run the agent once and return what the run left behind."""
    capture = SpanCapture()
    capture.install()
    plugins = load_agents(settings.agents_dir)
    executor = AgentExecutor(settings, plugins, capture)
    run = RunCapture(new_trace(), [{"role": "user", "content": QUESTION}], sampled=True)
    capture.begin(run)
    with capture.inside(run):
        run.answer = (await executor.execute(plugins[AGENT], run.turn_input, run)).answer
    capture.end(run)
    capture.uninstall()
    run.trace.ended_ns = time.time_ns()
    return run


def again(run: RunCapture) -> RunCapture:
    """Return the same run as one of its own."""
    copied = copy.copy(run)
    copied.trace = new_trace()
    copied.trace.ended_ns = time.time_ns()
    return copied


class Hand:
    """The parts of a web process that hand runs over."""

    def __init__(self, settings: Settings, keys: Keys, pool: Pool, outbox: OutboxWriter, preparer: Preparer):
        self.settings = settings
        self.keys = keys
        self.pool = pool
        self.outbox = outbox
        self.preparer = preparer
        self.redactor = Redactor(keys.derive("redaction"))


async def put_together(settings: Settings, url: str) -> Hand:
    """Put the parts together as `gateway.app` does."""
    live, keys = LiveSettings(settings), load_keys(settings)
    pool = open_pool(url, max_size=5, name="handover")
    await pool.open(wait=True)
    owner = Owner(1, await database_identity(pool), socket.gethostname(), time.time_ns(), (AGENT,))
    preparer = Preparer(Redactor(keys.derive("redaction")), keys.outbox, live, process_id=1)
    files = open_files(settings.home / "web", owner, keys.outbox, spill_max_bytes=settings.spill_max_bytes)
    outbox = OutboxWriter(pool, await open_queue(pool), preparer, *files, live)
    return Hand(settings, keys, pool, outbox, preparer)


async def offer_steadily(hand: Hand, run: RunCapture, rate: float, count: int) -> list[float]:
    """Offer runs at that rate a second; return how long each took until it was stored, in milliseconds."""
    offered: list[float] = []
    took_ms: list[float] = []
    base = hand.outbox.statistics().handed_over_runs

    async def watch() -> None:
        while len(took_ms) < count:
            now, stored = time.perf_counter(), hand.outbox.statistics().handed_over_runs - base
            took_ms.extend((now - offered[number]) * 1e3 for number in range(len(took_ms), stored))
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    begin = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(begin + number / rate - time.perf_counter())
        offered.append(time.perf_counter())
        hand.outbox.begin(AGENT)
        hand.outbox.offer(again(run), KEPT)
    await watching
    return took_ms


async def lateness(until: asyncio.Task[Any]) -> list[float]:
    """Return by how many milliseconds the event loop was late for a timer, over and over until a task is done."""
    late_ms = []
    while not until.done():
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        late_ms.append((time.perf_counter() - due) * 1e3)
    return late_ms


def cpu_us(work: Callable[[], Any], rounds: int) -> float:
    """Return the CPU that one call takes, in microseconds: the median of ten groups of ``rounds``."""
    groups = []
    for _ in range(10):
        begin = time.thread_time_ns()
        for _ in range(rounds):
            work()
        groups.append((time.thread_time_ns() - begin) / rounds / 1e3)
    return statistics.median(groups)


async def steps(hand: Hand, run: RunCapture) -> dict[str, float]:
    """Return the CPU a run of each step, in microseconds."""
    trace = assemble(again(run))
    encoded = encode(hand.redactor.trace(trace))
    say(f"a run has {len(trace.spans)} spans and {len(encoded):,} bytes")
    found = {
        "copy the run (not part of it)": cpu_us(lambda: again(run), 50),
        "assemble": cpu_us(lambda: assemble(again(run)), 50),
        "redact": cpu_us(lambda: hand.redactor.trace(assemble(again(run))), 50),
        "encode": cpu_us(lambda: encode(trace), 50),
        "encrypt": cpu_us(lambda: hand.keys.outbox.encrypt(encoded, trace.trace_id), 50),
        "prepare, all of it": cpu_us(lambda: hand.preparer.prepare(again(run), KEPT), 50),
    }
    found["redact"] -= found["assemble"]
    for name in ("assemble", "prepare, all of it"):
        found[name] -= found["copy the run (not part of it)"]
    for size in (1, 5, 20, 200):
        found[f"store, {size} a batch"] = statistics.median([await store_us(hand, run, size) for _ in range(10)])
    return found


async def store_us(hand: Hand, run: RunCapture, size: int) -> float:
    """Return this side's CPU for a run of a batch of that size, in microseconds."""
    finished = [hand.preparer.prepare(again(run), KEPT) for _ in range(size)]
    begin = time.thread_time_ns()
    async with transaction(hand.pool) as connection:
        await store_runs(connection, finished, hold=True)
    return (time.thread_time_ns() - begin) / size / 1e3


def spread(values_ms: Sequence[float]) -> str:
    """Return percentiles in words."""
    ordered = sorted(values_ms)
    shown = {f"p{percent}": ordered[math.ceil(len(ordered) * percent / 100) - 1] for percent in (50, 95, 99)}
    return ", ".join(f"{name} {value:.1f}" for name, value in shown.items()) + f", worst {ordered[-1]:.1f}"


async def measure(settings: Settings, url: str, rates: Sequence[float], seconds: float) -> None:
    """Measure and print."""
    hand = await put_together(settings, url)
    run = await typical_run(settings)
    say(f"event loop, idle: {spread(await lateness(asyncio.create_task(asyncio.sleep(3))))} ms late")
    hand.outbox.start()
    await offer_steadily(hand, run, 50, 50)  # connections and caches are warm from here on
    for rate in rates:
        begin = time.process_time()
        offering = asyncio.create_task(offer_steadily(hand, run, rate, int(rate * seconds)))
        late_ms = await lateness(offering)
        took_ms = await offering
        cpu = (time.process_time() - begin) / len(took_ms) * 1e6
        say(
            f"{rate:g} runs/s, {len(took_ms)} runs: offer to commit {spread(took_ms)} ms; "
            f"event loop {spread(late_ms)} ms late"
        )
        say(f"    CPU of this process, timers of the measurement included: {cpu:,.0f} us a run")
    await hand.outbox.stop(5)
    for name, figure in (await steps(hand, run)).items():
        say(f"{name}: {figure:,.0f} us")
    await hand.pool.close()


def main() -> None:
    """Measure on a Postgres of our own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 100.0], help="runs/s, one after the other")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate lasts")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        postgres = EmbeddedPostgres(home)
        url = postgres.start()
        try:
            migrate(url)
            settings = Settings(home=home, database_url=SecretStr(url))
            asyncio.run(measure(settings, url, chosen.rates, chosen.seconds))
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
