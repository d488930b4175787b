"""Load test: users that hold conversations with both example agents, and a summary that counts what was lost.

A bounded run against a gateway on this machine, without Locust's web page::

    locust -f loadtests/locustfile.py --headless -u 10 -r 5 -t 30s --host http://127.0.0.1:8000

Each user holds one conversation after the other, of 1 to 4 turns. When the load has ended, the summary sets what was
answered against what the ledger of the gateway counted (``GET /v1/quality``). It expects to be the only client: runs of
others are counted as runs of this test. The exit code is 1 if a request failed or a run is missing or lost.

A key for the API is read from ``GATEWAY_API_KEY``; it needs the scopes ``invoke`` and ``ops``.
"""

import json
import os
import random
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gevent
from locust import FastHttpUser, between, events
from locust.runners import WorkerRunner
from rich.console import Console
from rich.table import Table

DEFAULT_HOST = "http://127.0.0.1:8000"
KEY = os.environ.get("GATEWAY_API_KEY")
HEADERS = {"Authorization": f"Bearer {KEY}"} if KEY else {}
SCORES_TIMEOUT_S = 120.0
"""How long to wait, after the load, until no run is on its way any more."""
SAMPLE_S = 1.0
"""How often the backlog is read while the load is on; each read costs the gateway some milliseconds."""
DRAIN_POLL_S = 0.2
READ_TIMEOUT_S = 15.0
LONGEST_CONVERSATION = 4

MATH_STARTS = (
    "What is 15% of 240?",
    "What is 12 plus 30?",
    "Divide 10 by 4.",
    "I bought 2 shares at $100 each. It's now worth $150. How much profit?",
    "What is 10 divided by 0?",
)
MATH_FOLLOW_UPS = ("And times 3?", "Add 10 to that", "Subtract 4", "What is 7 times 8?", "Thanks!")
SUPPORT_STARTS = (
    "What is the status of order A-1001?",
    "Where is my parcel for order A-1004?",
    "Can you list my orders? I ordered with leila.marchetti@example.com",
    "I'd like a refund for order A-1003 because the grinder is too loud.",
    "Do you offer gift wrapping?",
)
SUPPORT_FOLLOW_UPS = (
    "And what about A-1002?",
    "How long does a refund take?",
    "Where is A-1009?",
    "Is it still under warranty?",
    "Thank you!",
)
TEXTS = {"math": (MATH_STARTS, MATH_FOLLOW_UPS), "support": (SUPPORT_STARTS, SUPPORT_FOLLOW_UPS)}

RUN_CODES = ("RUN_BLOCKED", "MAX_TURNS_EXCEEDED", "RUN_FAILED", "MODEL_ERROR", "RUN_TIMEOUT")
"""Error codes of runs that were begun: they are in the ledger like those that were answered."""
LOST_STATES = ("redaction_blocked", "dropped", "failed")


class Client(FastHttpUser):  # type: ignore[misc]  # Locust is untyped for us
    """One person who talks to the agents, a conversation at a time."""

    host = DEFAULT_HOST
    wait_time = between(0.1, 0.5)

    def calculate(self) -> None:
        """Talk to the math agent in Responses form; the gateway makes the session's id."""
        self._converse("math", lambda text: {"input": text})

    def get_support(self) -> None:
        """Talk to the support agent in chat form, with a session id of our own."""
        session_id = f"load-{uuid.uuid4().hex}"
        self._converse("support", lambda text: {"messages": [{"role": "user", "content": text}]}, session_id)

    def stream(self) -> None:
        """Talk to the math agent and have the answers streamed."""
        self._converse("math", lambda text: {"input": text, "stream": True})

    def respond(self) -> None:
        """Talk to the support agent by OpenAI's Responses API."""
        self._converse("support", lambda text: {"input": text}, path="/v1/responses")

    tasks = {calculate: 2, get_support: 3, stream: 2, respond: 1}  # noqa: RUF012 - the attribute that Locust reads

    def _converse(
        self,
        agent: str,
        turn: Callable[[str], dict[str, Any]],
        session_id: str | None = None,
        path: str = "/invocations",
    ) -> None:
        """Hold one conversation; it ends early when a turn fails."""
        for text in conversation(agent):
            session_id = self._ask(path, agent, turn(text), session_id)
            if session_id is None:
                return

    def _ask(self, path: str, agent: str, turn: dict[str, Any], session_id: str | None) -> str | None:
        """Send one turn and check its answer; return the session's id, or ``None`` if it failed."""
        body = {"model": agent, **turn} | ({"session_id": session_id} if session_id else {})
        name = f"{path} ({agent}{', stream' if 'stream' in turn else ''})"
        with self.client.post(path, json=body, headers=HEADERS, name=name, catch_response=True) as response:
            problem, answer = check(response.status_code, response.text, agent, session_id)
            if problem:
                response.failure(problem)
                return None
        self.wait()
        return str(answer["session_id"])


def conversation(agent: str) -> list[str]:
    """Return what the user will say, in 1 to 4 turns."""
    starts, follow_ups = TEXTS[agent]
    turns = random.randint(1, LONGEST_CONVERSATION)
    return [random.choice(starts), *random.choices(follow_ups, k=turns - 1)]


def check(status: int, text: str | None, agent: str, session_id: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return what is wrong with an answer (``None``: nothing), and its body."""
    try:
        body = last_of_stream(text) if text and text.startswith("event: ") else json.loads(text or "")
    except (ValueError, LookupError):
        return f"status {status} without an answer", {}
    if status != 200 or body.get("error"):
        code = body.get("error_code") or (body.get("error") or {}).get("code", "no error code")
        return f"{code.upper()}, status {status}", body
    if not str(body.get("trace_id", "")).startswith("tr-"):
        return "answer without a trace_id", body
    if body.get("agent") != agent or (session_id is not None and body.get("session_id") != session_id):
        return "answer of another agent or session", body
    if not (body.get("output") or body["choices"][0]["message"]["content"]):
        return "empty answer", body
    return None, body


def last_of_stream(text: str) -> dict[str, Any]:
    """Return the response that a stream ended with; raise ``ValueError`` or ``LookupError`` if it broke off."""
    *_, last, done = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if done != "[DONE]":
        raise ValueError(done)
    response: dict[str, Any] = json.loads(last)["response"]
    return response


@dataclass
class Ledger:
    """The ledger of the last day, as the gateway showed it at one moment."""

    total: int
    states: dict[str, int]

    @property
    def pending(self) -> int:
        """Runs on their way to MLflow and the scorers."""
        return self.states["pending"]

    @property
    def lost(self) -> int:
        """Runs that were withheld, dropped or given up."""
        return sum(self.states[state] for state in LOST_STATES)


def read_ledger(host: str) -> Ledger:
    """Return the ledger; raise ``OSError`` if the gateway does not answer."""
    request = urllib.request.Request(f"{host}/v1/quality", headers=HEADERS)  # noqa: S310 - the host that was named
    with urllib.request.urlopen(request, timeout=READ_TIMEOUT_S) as answer:  # noqa: S310 - as above
        ledger = json.load(answer)["day"]["ledger"]
    return Ledger(ledger["total"], {entry["state"]: entry["runs"] for entry in ledger["states"]})


@dataclass
class Observer:
    """Watches the gateway's ledger from the start of the test to the summary."""

    host: str
    before: Ledger
    started: float = field(default_factory=time.monotonic)
    backlog: list[int] = field(default_factory=list)
    """Pending runs, read once a second."""

    def sample(self) -> None:
        """Read the backlog until the greenlet is killed."""
        while True:
            gevent.sleep(SAMPLE_S)
            try:
                self.backlog.append(read_ledger(self.host).pending)
            except OSError:
                continue  # the summary says what the requests themselves met

    def drain(self, runs: int) -> tuple[Ledger, float]:
        """Wait until the ledger has ``runs`` more and none is pending; return it, and the seconds that took."""
        began = time.monotonic()
        while True:
            now = read_ledger(self.host)
            waited_s = time.monotonic() - began
            if (now.total - self.before.total >= runs and not now.pending) or waited_s > SCORES_TIMEOUT_S:
                return now, waited_s
            gevent.sleep(DRAIN_POLL_S)


def watch(environment: Any, **_: Any) -> None:
    """Note the ledger before the load, and start to sample the backlog."""
    if isinstance(environment.runner, WorkerRunner):
        return  # of several load generators, the master alone watches
    host = (environment.host or DEFAULT_HOST).rstrip("/")
    try:
        environment.observer = Observer(host, read_ledger(host))
    except OSError as error:
        sys.exit(f"No gateway answers at {host} ({error}). Start one, or name another with --host.")
    environment.sampler = gevent.spawn(environment.observer.sample)


def summarise(environment: Any, **_: Any) -> None:
    """Print the summary and set the exit code."""
    if isinstance(environment.runner, WorkerRunner):
        return
    environment.sampler.kill()
    observer: Observer = environment.observer
    load_s = time.monotonic() - observer.started
    stats = environment.stats
    failures = stats.total.num_failures
    answered = stats.total.num_requests - failures
    ended_badly = sum(
        error.occurrences for error in stats.errors.values() if any(code in str(error.error) for code in RUN_CODES)
    )
    runs = answered + ended_badly
    try:
        after, drained_s = observer.drain(runs)
    except OSError as error:
        Console().print(f"The gateway no longer answers ({error}): what it lost is not known.", style="red")
        environment.process_exit_code = 1
        return
    counted = after.total - observer.before.total
    lost = after.lost - observer.before.lost
    missing = max(0, runs - counted)

    table = Table(title="Load test", title_justify="left", show_header=False)
    table.add_row("requests", f"{stats.total.num_requests}, {stats.total.num_requests / load_s:.1f} a second")
    table.add_row("failures", f"{failures}")
    table.add_row("latency p50, p95", f"{_percentile(stats, 0.5)} ms, {_percentile(stats, 0.95)} ms")
    table.add_row("runs served", f"{runs}: {answered} answered, {ended_badly} ended with an error")
    table.add_row("runs in the ledger", f"{counted}: {_changes(observer.before, after)}")
    table.add_row("trace loss", f"{missing + lost}: {missing} without a row, {lost} withheld, dropped or failed")
    table.add_row("score freshness", _freshness(observer.backlog, runs / load_s, drained_s, after.pending))
    Console().print(table)
    environment.process_exit_code = 1 if failures or missing or lost or after.pending else 0


def _percentile(stats: Any, share: float) -> str:
    value = stats.total.get_response_time_percentile(share)
    return "-" if value is None else f"{value:.0f}"


def _changes(before: Ledger, after: Ledger) -> str:
    changed = {state: after.states[state] - before.states.get(state, 0) for state in after.states}
    return ", ".join(f"{runs} {state}" for state, runs in changed.items() if runs) or "none"


def _freshness(backlog: list[int], runs_per_s: float, drained_s: float, left: int) -> str:
    """Say how far the scores were behind.

    The mean wait follows from Little's law: the mean number of pending runs, divided by the runs a second.
    """
    if left:
        end = f"{left} runs still pending {drained_s:.0f} s after the load"
    else:
        end = f"all runs settled {drained_s:.1f} s after the load"
    if not backlog or not runs_per_s:
        return end
    mean_wait_s = sum(backlog) / len(backlog) / runs_per_s
    return f"{end}; during it {max(backlog)} pending at the most, about {mean_wait_s:.1f} s from served to scored"


events.test_start.add_listener(watch)
events.test_stop.add_listener(summarise)
