"""The relay of the judges: real MLflow judges, over real HTTP, to a provider that answers by a script."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import openai
import psycopg
import pytest
from mlflow.exceptions import MlflowException
from mlflow.genai import make_judge, scorer
from mlflow.genai.judges.adapters import gateway_adapter
from mlflow.genai.scorers import Guidelines

from gateway.evaluation.judging.binding import calling_under
from gateway.evaluation.judging.budget import Budget, Spent
from gateway.evaluation.judging.leases import Lease
from gateway.evaluation.judging.limits import JudgeLimits, ModelLimits, RequestRate, SlotKeeper
from gateway.evaluation.judging.prices import Price, Prices, Tokens
from gateway.evaluation.judging.providers import is_relayed
from gateway.evaluation.judging.relay import Relay, RelayParts, upstream_of
from gateway.evaluation.judging.spending import BudgetKeeper, SpendingBook
from gateway.settings import sibling_database
from gateway.storage.database import Pool, open_pool
from gateway.testing import HttpError, ScriptedOpenAI, Slow, ToolCall

MODEL = "openai:/judge-x"
MODEL_OF_ONE = "openai:/judge-once-a-minute"
YES = json.dumps({"result": "yes", "rationale": "it is polite"})
PATIENCE_S = 60.0  # for what should take milliseconds, on a machine that is busy with other tests


@pytest.fixture(autouse=True)
def _no_price_list_from_the_web(monkeypatch):
    """Leave MLflow the list that it ships, as the evaluator does."""
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")


@pytest.fixture(scope="module")
def database(postgres_url) -> Iterator[str]:
    """One database for all these tests: they are many, and each needs little of it."""
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE judge_relay TEMPLATE gateway")
        yield sibling_database(postgres_url, "judge_relay")
        connection.execute("DROP DATABASE judge_relay WITH (FORCE)")


@pytest.fixture(scope="module")
async def module_pool(database) -> AsyncIterator[Pool]:
    async with open_pool(database, max_size=4, name="test") as opened:
        yield opened


@pytest.fixture
async def pool(module_pool) -> Pool:
    async with module_pool.connection() as connection:
        await connection.execute("DELETE FROM judge_spending")
    return module_pool


@dataclass
class Worker:
    """One evaluator's relay, with what it counts in."""

    relay: Relay
    book: SpendingBook

    def lease(self, **limits: Any) -> Lease:
        return self.relay.lease("tr-1", "polite", MODEL, **limits)

    async def judge(self, lease: Lease, judge: Any = None, **subject: Any) -> Any:
        """Run a judge in a thread of its own, under the lease."""

        def run() -> Any:
            with calling_under(lease.lease_id):
                return (judge or polite())(**(subject or {"outputs": "Thank you."}))

        return await asyncio.wait_for(asyncio.to_thread(run), PATIENCE_S)


@pytest.fixture
def working(pool, database) -> Callable[..., Any]:
    """Run a worker whose judges are sent to ``url``; other arguments are its limits."""

    @asynccontextmanager
    async def run(
        url: str, *, clock: Any = time.monotonic, budget: Budget | None = None, routed: bool = True, **limits: Any
    ) -> Any:
        book = SpendingBook(pool)
        values = {"backoff_s": 0.01, "api_key": "sk-real", "call_timeout_s": PATIENCE_S} | limits
        prices = Prices({MODEL: Price(input_usd=1.0, output_usd=2.0)})
        keeper = BudgetKeeper(budget or Budget(), book)
        parts = RelayParts(JudgeLimits(url, **values), prices, pool, database, book, keeper.may_call, clock)
        async with Relay(parts) as relay:
            with relay.routing_judges() if routed else nullcontext():
                yield Worker(relay, book)

    return run


def polite() -> Any:
    return make_judge(name="polite", instructions="Is {{ outputs }} polite? Say yes or no.", model=MODEL)


def scripted(*replies: Any) -> ScriptedOpenAI:
    """A provider that gives these replies in order, the last one for ever."""
    left = list(replies)
    return ScriptedOpenAI(lambda _: left.pop(0) if len(left) > 1 else left[0])


@dataclass
class RawProvider:
    """A provider below the level of JSON: answers with bytes, and keeps what it was sent."""

    answer: Callable[[int], bytes]
    hold_s: float = 0.0
    """How long it works on an answer."""
    heads: list[str] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            self.heads.append(head)
            await reader.readexactly(int(head.partition("content-length:")[2].split("\r\n")[0]))
            await asyncio.sleep(self.hold_s)
        finally:
            self._at_once -= 1
        writer.write(self.answer(len(self.heads)))
        with suppress(OSError):
            await writer.drain()
        writer.close()


def http(body: str, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def completion(text: str = YES) -> str:
    return json.dumps(
        {
            "id": "c-1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge-x",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    )


async def test_answer_is_counted(working, pool):
    """A judge gets its answer; the lease, the model and the table say what it took."""
    with scripted(YES) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease()
            feedback = await worker.judge(lease)
            await worker.book.write()
    assert (feedback.value, feedback.source.source_id) == ("yes", MODEL)
    assert "Thank you." in json.dumps(provider.requests[0]["messages"])
    assert (lease.usage.calls, lease.usage.tokens, lease.problem) == (1, Tokens(10, 5), None)
    assert lease.usage.details() == {
        "mlflow.assessment.judgeInputTokens": "10",
        "mlflow.assessment.judgeOutputTokens": "5",
        "mlflow.assessment.judgeCost": "0.00002000",
        "gateway.judge_calls": "1",
    }
    async with pool.connection() as connection:
        spent = await connection.execute(
            "SELECT model, calls, input_tokens, output_tokens, cost_usd, unpriced_calls FROM judge_spending"
        )
        assert await spent.fetchall() == [(MODEL, 1, 10, 5, pytest.approx(20e-6), 0)]


async def test_keys_stay_where_they_belong(working):
    """The provider gets the real key and nothing of the relay's; the judge never sees the real one."""
    provider = RawProvider(lambda _: http(completion()))
    async with provider.serving() as url, working(url) as worker:
        await worker.judge(worker.lease())
    (head,) = provider.heads
    assert "authorization: bearer sk-real\r\n" in head
    assert "x-gateway" not in head


async def test_429_then_an_answer(working):
    """A provider that is busy is asked again after the time that it names; the judge sees only the answer."""
    busy = http("{}", "429 Too Many Requests", Retry_After="0.3")
    provider = RawProvider(lambda number: http(completion()) if number > 1 else busy)
    async with provider.serving() as url, working(url) as worker:
        lease = worker.lease()
        began = time.monotonic()
        feedback = await worker.judge(lease)
        assert time.monotonic() - began >= 0.3
    assert feedback.value == "yes"
    assert (lease.usage.calls, lease.usage.outcomes) == (2, {"rate_limited": 1, "answered": 1})


async def test_asked_to_wait_too_long(working):
    """A provider that wants a longer pause than the scoring may take fails it at once; the pause is known to us."""
    provider = RawProvider(lambda _: http("{}", "429 Too Many Requests", Retry_After="3600"))
    async with provider.serving() as url, working(url) as worker:
        lease = worker.lease()
        with pytest.raises(MlflowException, match="answered 429"):
            await worker.judge(lease)
    assert lease.usage.calls == 1
    assert (lease.problem.is_passing, lease.problem.retry_after_s) == (True, 3600.0)


async def test_500_for_ever(working):
    """A provider that stays broken is asked four times, not forty-four; the failure says what happened."""
    with scripted(HttpError(500, "out of order")) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease()
            with pytest.raises(MlflowException, match="openai:/judge-x answered 500: out of order"):
                await worker.judge(lease)
    assert len(provider.requests) == lease.usage.calls == 4
    assert (lease.problem.kind, lease.problem.is_passing) == ("server_error", True)


async def test_hanging_provider(working):
    """An attempt that gets no answer ends at its time; its prompt counts as used."""
    with scripted(Slow(YES)) as provider:
        async with working(provider.url, call_timeout_s=0.2, attempts=2) as worker:
            lease = worker.lease()
            with pytest.raises(MlflowException, match="did not answer within"):
                await worker.judge(lease)
    assert lease.usage.outcomes == {"timeout": 2}
    assert len(provider.requests) <= 2  # fewer if this machine was too slow to send it in time
    assert lease.usage.tokens.input > 20


async def test_deadline_of_the_scoring(working):
    """All calls of a scoring end at its deadline, in the middle of an attempt too."""
    with scripted(Slow(YES)) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease(timeout_s=0.3)
            with pytest.raises(
                MlflowException, match=r"time for the judge calls of this scoring is over|did not answer"
            ):
                await worker.judge(lease)
    assert lease.problem.kind in {"deadline", "timeout"}
    assert len(provider.requests) <= 1  # none if this machine was too slow to send it in time


@pytest.mark.parametrize("body", ["<html>502</html>", "[]", '{"object": "error"}', ""])
async def test_nonsense(working, body):
    """What is no answer of the API is tried again, and is a failure in the end, not a verdict."""
    provider = RawProvider(lambda _: http(body))
    async with provider.serving() as url, working(url, attempts=2) as worker:
        lease = worker.lease()
        with pytest.raises(MlflowException, match="what is no answer of its API"):
            await worker.judge(lease)
    assert lease.usage.outcomes == {"nonsense": 2}


async def test_refusal_is_passed_on(working):
    """A refused request comes back as it is: MLflow's judge takes a hint about the format and asks without it."""
    refused = HttpError(400, "response_format json_schema is not supported by this model")
    with scripted(refused, YES) as provider:
        async with working(provider.url) as worker:
            judge = make_judge(name="polite", instructions="Is {{ outputs }} polite?", model="openai:/judge-plain")
            lease = worker.lease()
            assert (await worker.judge(lease, judge)).value == "yes"
    assert ["response_format" in request for request in provider.requests] == [True, False]
    assert (lease.usage.outcomes, lease.problem) == ({"refused": 1, "answered": 1}, None)


async def test_provider_that_is_not_there(working):
    """Where nobody listens the judge fails with the reason, and nothing was spent."""
    async with working("http://127.0.0.1:9/v1", attempts=2) as worker:
        lease = worker.lease()
        with pytest.raises(MlflowException, match="cannot be reached: ConnectError"):
            await worker.judge(lease)
    assert lease.usage.tokens == Tokens()


async def test_given_up_in_the_middle(working):
    """A scoring that is given up while its judge waits: the call ends, its thread with it, and no other one leaves."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def script(_body: dict[str, Any]) -> Slow:
        loop.call_soon_threadsafe(asked.set)
        return Slow(YES)

    with ScriptedOpenAI(script) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease()
            judging = asyncio.create_task(worker.judge(lease))
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
            worker.relay.close(lease)
            with pytest.raises(MlflowException, match="given up"):
                await judging
            with pytest.raises(MlflowException, match="has ended"):
                await worker.judge(lease)
    assert len(provider.requests) == 1
    assert (lease.usage.calls, lease.problem.kind, lease.problem.is_passing) == (1, "given_up", False)


async def test_relay_that_stops_frees_the_threads(working):
    """Closing the relay ends the calls under way: no judge's thread holds the process up."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def script(_body: dict[str, Any]) -> Slow:
        loop.call_soon_threadsafe(asked.set)
        return Slow(YES)

    with ScriptedOpenAI(script) as provider:
        async with working(provider.url) as worker:
            judging = asyncio.create_task(worker.judge(worker.lease()))
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
        with pytest.raises(MlflowException, match="given up"):
            await judging


async def test_calls_of_one_scoring(working):
    """A judge that goes on calling tools of its own is stopped at the calls that one scoring may make."""
    with scripted([ToolCall("get_trace_info", {})]) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease(most_calls=3)
            with pytest.raises(MlflowException, match="may make 3 judge calls"):
                await worker.judge(lease)
    assert len(provider.requests) == 3
    assert lease.problem.kind == "calls_used_up"


async def test_tokens_of_one_scoring(working):
    """A prompt that is longer than what is left of a scoring's tokens does not leave."""
    with scripted(YES) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease(most_tokens=1000)
            with pytest.raises(MlflowException, match="may use 1000 tokens"):
                await worker.judge(lease, outputs="word " * 1000)
    assert (provider.requests, lease.problem.kind) == ([], "tokens_used_up")


async def test_inner_judges_belong_to_the_scoring(working):
    """Judges inside a scorer's function, built-in ones and in MLflow's own thread too, call under its lease."""

    @scorer(timeout=PATIENCE_S)
    def both(outputs: str) -> bool:
        kind = Guidelines(name="kind", guidelines=["Be kind."], model=MODEL)
        return kind(inputs={"q": "?"}, outputs=outputs).value == polite()(outputs=outputs).value

    with scripted(YES) as provider:
        async with working(provider.url) as worker:
            lease = worker.lease()
            assert await worker.judge(lease, both.run) is True
    assert (len(provider.requests), lease.usage.calls) == (2, 2)


async def test_eight_threads_at_once(working):
    """Eight judges of two workers share a model's three slots; each gets its own answer, under its own lease."""
    provider = RawProvider(lambda _: http(completion()), hold_s=0.1)
    limits = {"default": ModelLimits(concurrency=3)}
    async with provider.serving() as url, working(url, **limits) as other, working(url, routed=False, **limits) as one:
        # The judges of a process go to one relay; the other one is asked by hand.
        by_hand = [_ask(one) for _ in range(4)]
        leases = [other.lease() for _ in range(4)]
        answers = await asyncio.gather(*by_hand, *(other.judge(lease) for lease in leases))
    assert [getattr(answer, "value", answer) for answer in answers] == [200] * 4 + ["yes"] * 4
    assert [lease.usage.calls for lease in leases] == [1] * 4
    assert 2 <= provider.most_at_once <= 3


async def _ask(worker: Worker, **body: Any) -> int:
    """Ask by a client that knows nothing of leases; return the status."""
    key = worker.relay.environment({})["OPENAI_API_KEY"]
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.post(
            f"{worker.relay.url}/chat/completions",
            json={"model": "judge-x", "messages": []} | body,
            headers={"Authorization": f"Bearer {key}"},
        )
    return answer.status_code


async def test_breaker(working):
    """A model that fails again and again is left alone, then tried by one call, and is back when that succeeds."""
    later_s = 0.0
    replies: list[Any] = [HttpError(503)] * 4
    with ScriptedOpenAI(lambda _: replies.pop(0) if replies else YES) as provider:
        async with working(provider.url, clock=lambda: time.monotonic() + later_s, breaker_failures=4) as worker:
            with pytest.raises(MlflowException, match="answered 503"):
                await worker.judge(worker.lease())
            lease = worker.lease()
            with pytest.raises(MlflowException, match="failed again and again"):
                await worker.judge(lease)
            assert (len(provider.requests), lease.usage.calls, lease.problem.kind) == (4, 0, "breaker_open")
            assert worker.relay.models[MODEL].breaker.state == "open"
            later_s = 20.0
            assert (await worker.judge(worker.lease())).value == "yes"
            assert worker.relay.models[MODEL].breaker.state == "closed"


async def test_rate_of_a_model(working):
    """A call whose turn would come after the scoring's time is refused at once, and can be made later."""
    with scripted(YES) as provider:
        async with working(provider.url, models={MODEL_OF_ONE: ModelLimits(requests_per_minute=1)}) as worker:
            judge = make_judge(name="polite", instructions="Is {{ outputs }} polite?", model=MODEL_OF_ONE)
            await worker.judge(worker.lease(), judge)
            lease = worker.lease(timeout_s=20)
            with pytest.raises(MlflowException, match="promised to others"):
                await worker.judge(lease, judge)
    assert (len(provider.requests), lease.usage.calls) == (1, 0)
    assert (lease.problem.kind, lease.problem.is_passing) == ("busy", True)


async def test_used_up_budget_stops_every_call(working, pool):
    """Once a budget is used up nothing leaves, whatever was decided before, and whoever used it up."""
    other = SpendingBook(pool)
    with scripted(YES) as provider:
        async with working(provider.url, budget=Budget(tokens_per_day=10_000)) as worker:
            worker.book.add(MODEL, Tokens(9_300, 0), None)
            assert (await worker.judge(worker.lease())).value == "yes"
            other.add(MODEL, Tokens(700, 0), None)
            await other.write()
            lease = worker.lease()
            with pytest.raises(MlflowException, match="budget of the judges is used up"):
                await worker.judge(lease)
    assert (len(provider.requests), lease.usage.calls) == (1, 0)
    assert (lease.problem.kind, lease.problem.is_passing) == ("budget_used_up", False)


async def test_other_clients_are_counted_too(working):
    """A scorer that asks by OpenAI's own client goes through the relay as well, without a lease."""
    with scripted("hello") as provider:
        async with working(provider.url) as worker:

            def ask() -> str | None:
                client = openai.OpenAI(max_retries=0)
                answer = client.chat.completions.create(model="judge-x", messages=[{"role": "user", "content": "hi"}])
                return answer.choices[0].message.content

            assert await asyncio.wait_for(asyncio.to_thread(ask), PATIENCE_S) == "hello"
            assert worker.relay.models[MODEL].usage.calls == 1


async def test_other_providers_go_through_the_relay(working):
    """A judge of another provider: its own headers and key travel on, its own way of counting tokens is understood."""
    message = json.dumps({"content": [], "usage": {"input_tokens": 7, "output_tokens": 3}})
    provider = RawProvider(lambda _: http(message))
    async with provider.serving() as url, working("http://127.0.0.1:9/v1") as worker:
        lease = worker.relay.lease("tr-1", "polite", "anthropic:/claude-x")

        def ask() -> Any:
            with calling_under(lease.lease_id):
                return gateway_adapter.send_chat_request(
                    endpoint=f"{url}/messages", headers={"x-api-key": "sk-ant"}, payload={"model": "claude-x"},
                    num_retries=10,
                )  # fmt: skip

        assert await asyncio.wait_for(asyncio.to_thread(ask), PATIENCE_S) == json.loads(message)
        assert list(worker.relay.models) == ["anthropic:/claude-x"]
    assert (lease.usage.tokens, lease.usage.unpriced_calls) == (Tokens(7, 3), 1)
    assert "post /v1/messages " in provider.heads[0]
    assert "x-api-key: sk-ant\r\n" in provider.heads[0]
    assert "x-gateway" not in provider.heads[0]
    assert is_relayed("anthropic:/claude-x")
    assert not is_relayed("bedrock:/claude-x")


async def test_strangers_are_refused(working):
    """Another process of the machine spends nothing here; streams and other requests are refused, too."""
    with scripted(YES) as provider:
        async with working(provider.url) as worker, httpx.AsyncClient(timeout=PATIENCE_S) as client:
            url = f"{worker.relay.url}/chat/completions"
            assert (await client.post(url, json={"model": "judge-x"})).status_code == 401
            wrong = {"Authorization": "Bearer sk-real"}
            assert (await client.post(url, json={"model": "judge-x"}, headers=wrong)).status_code == 401
            assert await _ask(worker, stream=True) == 400
    assert provider.requests == []


async def test_environment_is_as_before(working, monkeypatch):
    """While judges run the environment sends them to the relay, past any proxy; afterwards it is as it was."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    send = gateway_adapter.send_chat_request
    with scripted(YES) as provider:
        monkeypatch.setenv("no_proxy", "127.0.0.1")  # the scripted provider is on this machine, too
        async with working(provider.url) as worker:
            assert os.environ["OPENAI_API_BASE"] == worker.relay.url
            assert os.environ["OPENAI_API_KEY"] != "sk-mine"
            assert (await worker.judge(worker.lease())).value == "yes"
    assert (os.environ["OPENAI_API_KEY"], os.environ.get("OPENAI_API_BASE")) == ("sk-mine", None)
    assert gateway_adapter.send_chat_request is send


def test_upstream_of():
    """The settings say where judges are sent, then MLflow's variables, then OpenAI's."""
    assert upstream_of({}, None, None) == ("https://api.openai.com/v1", None)
    both = {"OPENAI_API_BASE": "http://a/v1", "OPENAI_BASE_URL": "http://b/v1", "OPENAI_API_KEY": "k"}
    assert upstream_of(both, None, None) == ("http://a/v1", "k")
    assert upstream_of(both, "http://c/v1", "mine") == ("http://c/v1", "mine")


async def test_slots_of_a_dead_worker_are_free(database):
    """A worker that dies with a slot leaves it to the one that waits."""
    dead, living = SlotKeeper(database), SlotKeeper(database)
    got = asyncio.Event()

    async def wait() -> None:
        async with living.slot(MODEL, 1):
            got.set()

    async with dead.slot(MODEL, 1):
        waiting = asyncio.create_task(wait())
        with psycopg.connect(database, autocommit=True) as connection:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ).fetchall()
        assert ended == [(True,)]
        await asyncio.wait_for(got.wait(), PATIENCE_S)
    await waiting
    await dead.close()
    await living.close()


async def test_cancelled_wait_keeps_no_slot(database):
    """Calls that are given up while they wait for a slot, or just as they get it, leave it to the others."""
    keeper, other = SlotKeeper(database), SlotKeeper(database)

    async def hold() -> None:
        async with keeper.slot(MODEL, 1):
            await asyncio.Event().wait()

    for turns in range(12):
        holding = asyncio.create_task(hold())
        for _ in range(turns):  # a few turns of the event loop: before, while and after it takes the slot
            await asyncio.sleep(0)
        holding.cancel()
        with suppress(asyncio.CancelledError):
            await holding
    await keeper.close()
    async with asyncio.timeout(PATIENCE_S), other.slot(MODEL, 1):
        await other.close()


async def test_rate_is_shared_and_even(pool):
    """Two workers take turns in one row: a few calls leave at once, the others one after the other."""
    workers = [RequestRate(pool), RequestRate(pool)]
    began = time.monotonic()
    waits = [await workers[number % 2].reserve(MODEL, 60, 3600) for number in range(13)]
    took_s = time.monotonic() - began
    assert waits[:3] == [0.0, 0.0, 0.0]
    assert waits[12] == pytest.approx(10 / 0.95, abs=took_s + 0.01)
    assert await workers[0].reserve(MODEL, 60, within_s=1.0) is None
    assert await workers[0].reserve(MODEL, 60, 3600) == pytest.approx(11 / 0.95, abs=time.monotonic() - began + 0.01)
    assert await workers[0].reserve("openai:/another", 60, 1.0) == 0.0


async def test_books_of_two_workers(pool):
    """Each worker counts at once what is its own, and what others spent once it has read it."""
    mine, other = SpendingBook(pool), SpendingBook(pool)
    mine.add(MODEL, Tokens(100, 10), 0.5)
    assert sum(mine.hours().values(), Spent()) == Spent(0.5, 110)
    await asyncio.gather(mine.write(), other.write())
    other.add(MODEL, Tokens(1, 1), None)
    await other.write()
    other.add("openai:/another", Tokens(1000, 0), 1.0)
    for book in (mine, other):
        await book.read()
    assert sum(mine.hours().values(), Spent()) == Spent(0.5, 112)
    assert sum(other.hours().values(), Spent()) == Spent(1.5, 1112)
    with other.expecting(Spent(0.25, 10)):
        assert sum(other.hours().values(), Spent()) == Spent(1.75, 1122)
    assert sum(other.hours().values(), Spent()) == Spent(1.5, 1112)


async def test_budget_keeper(pool):
    """A keeper's share falls with what another worker spends, and what it counted last is written when it stops."""
    budget = Budget(usd_per_day=100.0)
    spender, watcher = SpendingBook(pool), SpendingBook(pool)
    keeper = BudgetKeeper(budget, watcher)
    assert (keeper.share, await keeper.may_call()) == (1.0, True)
    spender.add(MODEL, Tokens(1, 1), 99.9)
    await spender.write()
    await keeper.look()
    assert 0.0 < keeper.share < 0.1
    running = asyncio.create_task(keeper.run())
    await asyncio.sleep(0)  # it begins
    watcher.add(MODEL, Tokens(1, 1), 0.2)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert await keeper.may_call() is False
    await spender.read()
    assert sum(spender.hours().values(), Spent()) == Spent(pytest.approx(100.1), 4)


async def test_spending_outlives_an_outage(database, pool):
    """What cannot be written while the database is away is counted all the same, and written later, once."""
    closed = open_pool(database, max_size=2, name="away")
    book = SpendingBook(closed)
    book.add(MODEL, Tokens(5, 5), 1.0)
    with pytest.raises(psycopg.OperationalError):
        await book.write()
    assert sum(book.hours().values(), Spent()) == Spent(1.0, 10)
    async with closed:
        await book.write()
        await book.write()
    reader = SpendingBook(pool, lambda: book.now() + timedelta(hours=1))
    await reader.read()
    assert sum(reader.hours().values(), Spent()) == Spent(1.0, 10)
