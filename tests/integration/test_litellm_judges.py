"""Judges that MLflow asks by LiteLLM: real LiteLLM, by way of the relay, to a provider that answers by a script."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from mlflow.entities import Trace, TraceData, TraceInfo, TraceLocation, TraceState
from mlflow.exceptions import MlflowException
from mlflow.genai import make_judge
from mlflow.genai.utils.llm_utils import _call_llm

from gateway.evaluation.judging.binding import calling_under
from gateway.evaluation.judging.budget import Budget
from gateway.evaluation.judging.leases import Lease
from gateway.evaluation.judging.limits import JudgeLimits, ModelLimits
from gateway.evaluation.judging.prices import Price, Prices, Tokens
from gateway.evaluation.judging.providers import is_relayed, load_litellm
from gateway.evaluation.judging.relay import Relay, RelayParts
from gateway.evaluation.judging.spending import BudgetKeeper, SpendingBook
from gateway.settings import sibling_database
from gateway.storage.database import open_pool
from gateway.testing import HttpError, ScriptedOpenAI, Slow, ToolCall

pytest.importorskip("litellm", reason="the extra `judges` is not installed")

MODEL = "hosted_vllm:/judge-1"
YES = json.dumps({"result": "yes", "rationale": "it is polite"})
TOO_LONG = "This model's maximum context length is 4096 tokens. However, your messages have 5000 tokens."
PATIENCE_S = 60.0  # for what should take milliseconds, on a machine that is busy with other tests


@pytest.fixture(scope="module")
def database(postgres_url) -> Iterator[str]:
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE litellm_judges TEMPLATE gateway")
        yield sibling_database(postgres_url, "litellm_judges")
        connection.execute("DROP DATABASE litellm_judges WITH (FORCE)")


@pytest.fixture
def asking(database, monkeypatch) -> Callable[..., Any]:
    """Run a relay, and have the local providers be the scripted one; other arguments are limits."""
    load_litellm()  # once, and not in the time of a judge
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")

    @asynccontextmanager
    async def run(url: str, **limits: Any) -> Any:
        monkeypatch.setenv("HOSTED_VLLM_API_BASE", url)
        monkeypatch.setenv("LM_STUDIO_API_BASE", url)
        values = {"backoff_s": 0.01, "call_timeout_s": PATIENCE_S} | limits
        async with open_pool(database, max_size=4, name="test") as pool:
            book = SpendingBook(pool)
            keeper = BudgetKeeper(Budget(), book)
            prices = Prices({MODEL: Price(input_usd=1.0, output_usd=2.0)})
            parts = RelayParts(JudgeLimits(url, **values), prices, pool, database, book, keeper.may_call)
            async with Relay(parts) as relay:
                with relay.routing_judges():
                    yield relay

    return run


async def judged(lease: Lease, model: str = MODEL, **subject: Any) -> Any:
    """Run a judge in a thread of its own, under the lease."""
    text = "Is {{ trace }} polite?" if "trace" in subject else "Is {{ outputs }} polite? Say yes or no."

    def run() -> Any:
        with calling_under(lease.lease_id):
            return make_judge(name="polite", instructions=text, model=model)(**(subject or {"outputs": "Thank you."}))

    return await asyncio.wait_for(asyncio.to_thread(run), PATIENCE_S)


def scripted(*replies: Any) -> ScriptedOpenAI:
    """A provider that gives these replies in order, the last one for ever."""
    left = list(replies)
    return ScriptedOpenAI(lambda _: left.pop(0) if len(left) > 1 else left[0])


async def test_answer_is_counted(asking):
    """A judge of a provider that only LiteLLM knows gets its verdict; lease and model say what it took."""
    with scripted(YES) as provider:
        async with asking(provider.url) as relay:
            lease = relay.lease("tr-1", "polite", MODEL)
            feedback = await judged(lease)
            assert list(relay.models) == [MODEL]
    (request,) = provider.requests
    assert (feedback.value, feedback.source.source_id) == ("yes", MODEL)
    assert request["model"] == "judge-1"
    assert "Thank you." in json.dumps(request["messages"])
    assert set(request["response_format"]["json_schema"]["schema"]["properties"]) == {"result", "rationale"}
    assert (lease.usage.calls, lease.usage.tokens, lease.problem) == (1, Tokens(10, 5), None)
    assert lease.usage.details()["mlflow.assessment.judgeCost"] == "0.00002000"
    assert is_relayed(MODEL)


async def test_one_at_a_time(asking):
    """Five judges at once share a model's one slot: the provider never has more than one call."""
    loop, asked = asyncio.get_running_loop(), asyncio.Semaphore(0)
    gates = [Slow(YES) for _ in range(5)]
    left = iter(gates)

    def script(_body: dict[str, Any]) -> Slow:
        loop.call_soon_threadsafe(asked.release)
        return next(left)

    with ScriptedOpenAI(script) as provider:
        async with asking(provider.url, default=ModelLimits(concurrency=1)) as relay:
            judging = [asyncio.create_task(judged(relay.lease(f"tr-{n}", "polite", MODEL))) for n in range(5)]
            for number, slow in enumerate(gates):
                await asyncio.wait_for(asked.acquire(), PATIENCE_S)
                assert len(provider.requests) == number + 1  # the others wait
                slow.gate.set()
            assert [each.value for each in await asyncio.gather(*judging)] == ["yes"] * 5


@pytest.mark.parametrize("model", [MODEL, "lm_studio:/judge-1"], ids=["its own client", "OpenAI's client"])
async def test_429_is_retried_by_the_relay_alone(asking, model):
    """A busy provider is asked as often as the relay says, not by the counts of MLflow, LiteLLM or its clients."""
    with scripted(HttpError(429, "busy")) as provider:
        async with asking(provider.url, attempts=3) as relay:
            lease = relay.lease("tr-1", "polite", model)
            with pytest.raises(MlflowException, match=f"{model} answered 429"):
                await judged(lease, model)
    assert len(provider.requests) == lease.usage.calls == 3
    assert (lease.usage.outcomes, lease.problem.is_passing) == ({"rate_limited": 3}, True)


async def test_asked_to_wait_too_long(asking):
    """What a provider says of the next try comes through LiteLLM: longer than a scoring may take, it is not tried."""
    asked = []

    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3600\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(busy, "127.0.0.1", 0)
    async with server, asking(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as relay:
        lease = relay.lease("tr-1", "polite", MODEL)
        with pytest.raises(MlflowException, match="answered 429"):
            await judged(lease)
    assert (len(asked), lease.problem.retry_after_s) == (1, 3600.0)


async def test_lease_that_is_over(asking):
    """A scoring that has ended asks nobody any more; one whose time is over is stopped in the middle of its call."""
    with scripted(Slow(YES)) as provider:
        async with asking(provider.url) as relay:
            over = relay.lease("tr-1", "polite", MODEL)
            relay.close(over)
            with pytest.raises(MlflowException, match="has ended"):
                await judged(over)
            assert provider.requests == []
            began = time.monotonic()
            with pytest.raises(MlflowException, match=r"time for the judge calls|did not answer"):
                await judged(relay.lease("tr-2", "polite", MODEL, timeout_s=0.3))
            assert time.monotonic() - began < PATIENCE_S / 2


async def test_format_that_a_model_does_not_take(asking):
    """A refusal of the answer's form comes back to MLflow as LiteLLM's own error: it asks again without the form."""
    refused = HttpError(400, "response_format json_schema is not supported by this model")
    with scripted(refused, YES) as provider:
        async with asking(provider.url) as relay:
            lease = relay.lease("tr-1", "polite", "hosted_vllm:/judge-plain")
            assert (await judged(lease, "hosted_vllm:/judge-plain")).value == "yes"
    assert ["response_format" in request for request in provider.requests] == [True, False]
    assert lease.usage.outcomes == {"refused": 1, "answered": 1}


async def test_context_window(asking):
    """A prompt that is too long comes back to MLflow as LiteLLM's own error: it leaves the oldest tool call out."""
    model = "hosted_vllm:/judge-small"
    load_litellm().register_model(
        {"hosted_vllm/judge-small": {"max_input_tokens": 10, "litellm_provider": "hosted_vllm", "mode": "chat"}}
    )
    info = TraceInfo("tr-1", TraceLocation.from_experiment_id("0"), request_time=0, state=TraceState.OK)
    trace = Trace(info, TraceData())
    with scripted([ToolCall("get_trace_info", {})], HttpError(400, TOO_LONG), YES) as provider:
        async with asking(provider.url) as relay:
            lease = relay.lease("tr-1", "polite", model)
            assert (await judged(lease, model, trace=trace)).value == "yes"
    roles = [[message["role"] for message in request["messages"]] for request in provider.requests]
    assert roles[1] == [*roles[0], "assistant", "tool"]
    assert roles[2] == roles[0]
    assert lease.usage.calls == 3


async def test_other_callers_of_mlflow(asking):
    """Where LiteLLM is installed MLflow's simulator of users asks OpenAI by it, too: it passes the relay once."""
    with scripted("hello") as provider:
        async with asking(provider.url) as relay:
            lease = relay.lease("tr-1", "polite", "openai:/judge-x")

            def ask() -> Any:
                with calling_under(lease.lease_id):
                    return _call_llm("openai:/judge-x", [{"role": "user", "content": "hi"}])

            answer = await asyncio.wait_for(asyncio.to_thread(ask), PATIENCE_S)
            assert answer.choices[0].message.content == "hello"
            assert list(relay.models) == ["openai:/judge-x"]
    assert len(provider.requests) == lease.usage.calls == 1
