"""Runs that end badly: what the client is told, in each form, and what is left of them, which is only their trace."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from gateway.testing import ScriptedOpenAI, Slow

from .runs import Web, begun, clerk, decided, desk, ended, events, refusal, say, serving, text, traces, until

SECRET = "hunter22"
FAILURES = [
    ("conjure", 502, "model_behavior_error"),
    ("loop, note it", 422, "max_turns_exceeded"),
    ("forbidden", 422, "run_blocked"),
    ("leak", 422, "run_blocked"),
    ("dawdle", 504, "tool_timeout"),
    ("give_up", 500, "run_failed"),
    ("wait", 504, "run_timeout"),
    ("hang", 504, "run_timeout"),
]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error that ends a stream, of either form."""
    last = events(answer)[-1]
    return dict(last["response"]["error"] if last.get("type") == "response.failed" else last["error"])


@pytest.mark.parametrize(("words", "status", "code"), FAILURES)
async def test_a_failure_has_a_status_and_a_code_in_every_form(make_settings, rows, words, status, code) -> None:
    """JSON has the status and the code, a stream has begun and ends with the code; both name the run's trace."""
    settings = desk(make_settings, run_timeout_s=1.0, max_turns=3)
    chat = {"messages": [{"role": "user", "content": words}]}
    async with serving(settings) as client:
        answers = await asyncio.gather(
            say(client, words),
            client.post("/v1/chat/completions", json=chat),
            client.post("/invocations", json={"input": words}),
            say(client, words, stream=True),
            client.post("/v1/chat/completions", json=chat | {"stream": True}),
        )
        whole, streamed = answers[:3], answers[3:]
        assert [answer.status_code for answer in whole] == [status] * 3
        told = [answer.json() for answer in whole]
        errors = [told[0]["error"], told[1]["error"], *(error_of(answer) for answer in streamed)]
        assert [error["code"] for error in errors] == [code] * 4
        assert told[2]["error_code"] == code.upper()
        assert len({error["message"] for error in errors} | {told[2]["message"]}) == 1
        assert all(event["type"] != "response.completed" for event in events(streamed[0]))
        assert not client.app.state.runner.busy
    named = {errors[0]["trace_id"], errors[1]["trace_id"], told[2]["trace_id"]}
    kept = traces(settings)
    assert (len(kept), named <= kept.keys()) == (5, True)
    assert {trace.error.type for trace in kept.values() if trace.error} == {code.upper()}
    assert rows("SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM paused_runs)") == [(0, 0)]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_takes_too_long(make_settings, stream) -> None:
    """A model call beyond the time that its agent gives it ends the run with a code of its own."""
    async with serving(desk(make_settings)) as client:
        answer = await say(client, "hang", model="bystander", stream=stream)
        assert (error_of(answer)["code"] if stream else refusal(answer)[1]) == "model_timeout"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("words", ["block", "cling", "deaf"])
async def test_what_does_not_heed_its_end_holds_nobody_up(make_settings, rows, words, stream) -> None:
    """A tool in a thread, a tool or a model that swallows its cancellation: the client hears of the end in time."""
    settings = desk(make_settings, run_timeout_s=0.5)
    async with serving(settings) as client:
        asked = say(client, words, "s", stream=stream)
        await begun()
        answer = await asyncio.wait_for(asked, 4)
        assert (error_of(answer)["code"] if stream else refusal(answer)[1]) == "run_timeout"
        assert rows("SELECT count(*) FROM sessions") == [(0,)]
        clerk().gate.set()
        clerk().thread_gate.set()
        assert text(await say(client, "next", "s")) == "1: next"


async def test_a_run_that_is_cancelled_by_its_id_elsewhere(make_settings, rows) -> None:
    """A background run is cancelled from another process, once: its tool stops and its session is as it was."""
    settings = desk(make_settings)
    async with serving(settings) as other, serving(settings) as client:
        await say(client, "hello", "s")
        path = f"/v1/responses/{(await say(client, 'note it, wait', 's', background=True)).json()['id']}"
        await begun()
        cancelled = (await other.post(f"{path}/cancel")).json()
        assert (cancelled["status"], cancelled["error"]["code"]) == ("cancelled", "run_cancelled")
        again = [(await each.post(f"{path}/cancel")).json() for each in (client, other)]
        assert again == [cancelled] * 2
        assert (await client.get(path)).json() == cancelled
        clerk().gate.set()
        assert text(await say(other, "next", "s")) == "2: next"
    assert clerk().done == ["it"]
    [trace] = [trace for trace in traces(settings).values() if trace.error]
    assert trace.error.type == "CANCELLED"
    assert [(span.name, span.outputs) for span in trace.spans if span.kind == "TOOL"] == [
        ("note", "noted it"),
        ("wait", None),
    ]
    assert rows("SELECT status FROM runs ORDER BY started_at") == [("ok",), ("error",), ("ok",)]


async def test_a_run_that_is_cancelled_by_its_id_here(make_settings) -> None:
    """A run that streams or waits for its session's turn is cancelled as well; one that is done stays as it is."""
    async with serving(desk(make_settings)) as client:
        done = (await say(client, "hello", "s")).json()
        assert (await client.post(f"/v1/responses/{done['id']}/cancel")).json() == done
        streamed = say(client, "wait", "s", stream=True)
        await begun()
        [trace_id] = client.app.state.runner._active
        waiting = (await say(client, "later", "s", background=True)).json()
        late = (await client.post(f"/v1/responses/{waiting['id']}/cancel")).json()
        assert late["status"] == "cancelled"
        stopped = await client.post(f"/v1/responses/{trace_id.replace('tr-', 'resp_')}/cancel")
        assert stopped.json()["status"] == "failed"
        assert error_of(await streamed)["code"] == "run_cancelled"
        assert text(await say(client, "next", "s")) == "2: next"


@pytest.mark.parametrize("stream", [True, False])
async def test_the_model_call_of_a_cancelled_run_is_closed(make_settings, stream) -> None:
    """When a run is cancelled the connection to its model is closed, in the middle of a stream too."""
    with ScriptedOpenAI(lambda _body: Slow("some words and more", after=2)) as model:
        settings = desk(make_settings, model="scripted-1", OPENAI_API_KEY="sk-x", OPENAI_BASE_URL=model.url)
        async with serving(settings) as client:
            kind = {"stream": True} if stream else {"background": True}
            asked = say(client, "hello", **kind)
            await until(lambda: model.requests)
            [trace_id] = client.app.state.runner._active
            await client.post(f"/v1/responses/{trace_id.replace('tr-', 'resp_')}/cancel")
            await until(lambda: model.cancelled == 1)
            await asked
    [trace] = traces(settings).values()
    assert (trace.error.type, [span.name for span in trace.spans if span.kind == "CHAT_MODEL"]) == (
        "CANCELLED",
        ["scripted-1"],
    )


@asynccontextmanager
async def upstream(status: str, error: dict[str, str], *fields: str) -> AsyncIterator[str]:
    """Answer every request with an error as the model's provider does; give the base URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1]))
        body = json.dumps({"error": error}).encode()
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *fields]
        writer.write("\r\n".join([*lines, "x-should-retry: false", "connection: close", "", ""]).encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("status", "error_code", "fields", "told"),
    [
        ("429 Too Many", "rate_limit_exceeded", ["retry-after: 7"], (503, "model_rate_limited", "7")),
        ("429 Too Many", "rate_limit_exceeded", [], (503, "model_rate_limited", "5")),
        ("400 Bad", "context_length_exceeded", [], (422, "context_length_exceeded", None)),
        ("400 Bad", "anything", [], (502, "model_error", None)),
        ("401 Unauthorized", "invalid_api_key", [], (502, "model_error", None)),
        ("500 Oh", "server_error", [], (502, "model_error", None)),
    ],
)
async def test_what_the_models_provider_answers(make_settings, status, error_code, fields, told) -> None:
    """Each kind of error of the model's provider has a code of its own, and none of its words reaches the client."""
    error = {"message": f"{SECRET} said: my question", "type": SECRET, "code": error_code}
    async with upstream(status, error, *fields) as url:
        settings = desk(make_settings, model="scripted-1", OPENAI_API_KEY="sk-planted-key", OPENAI_BASE_URL=url)
        async with serving(settings) as client:
            whole = await say(client, "my question")
            streamed = await say(client, "my question", stream=True)
    assert (*refusal(whole), whole.headers.get("retry-after")) == told
    assert error_of(streamed)["code"] == told[1]
    for answer in (whole, streamed):
        assert not [each for each in (SECRET, "my question", "planted", "127.0.0.1", url) if each in answer.text]


@pytest.mark.parametrize("words", ["crash", "refund boom", "wait boom"])
async def test_no_error_says_what_a_tool_raised(make_settings, words) -> None:
    """What a tool raised stands in the trace and in no answer: JSON, stream, stored, of a resumed run or a batch."""
    settings = desk(make_settings)
    async with serving(settings) as client:
        clerk().gate.set()
        told = []
        for stream in (True, False):
            answer = await say(client, words, stream=stream)
            if words.startswith("refund"):
                approval = re.search(r"mcpr_\w+", answer.text)
                answer = await decided(client, approval[0], stream=stream)
            told.append(answer)
        assert (error_of(told[0])["code"], told[1].status_code) == (refusal(told[1])[1], 500)
        stored = await client.get(f"/v1/responses/{events(told[0])[-1]['response']['id']}")
        batch = await client.post("/invocations", json={"inputs": [words, "hello"]})
        for each in (*told, stored, batch):
            assert not [word for word in (SECRET, "RuntimeError", "Traceback", ".py") if word in each.text]
    assert any(SECRET in str(trace.error) for trace in traces(settings).values())


async def test_no_more_runs_are_taken_than_may_be_under_way(make_settings) -> None:
    """With every place taken, also by runs that wait, a request gets 503 and Retry-After until a place is free."""
    async with serving(desk(make_settings, max_concurrent_runs=2)) as client:
        taken = [say(client, "wait", "s")]
        await begun()
        taken.append(say(client, "second", "s"))
        await until(lambda: len(client.app.state.runner._active) == 2)
        chat = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        refused = [
            await say(client, "third"),
            await say(client, "third", stream=True),
            await client.post("/v1/chat/completions", json=chat),
        ]
        assert [(*refusal(each), each.headers["retry-after"]) for each in refused] == [(503, "overloaded", "1")] * 3
        other = await client.post("/invocations", json={"input": "third"})
        assert (other.status_code, other.json()["error_code"]) == (503, "OVERLOADED")
        clerk().gate.set()
        assert [text(each) for each in await asyncio.gather(*taken)] == ["waited ", "2: second"]
        assert text(await say(client, "third")) == "1: third"


async def test_requests_that_are_too_large(make_settings, rows) -> None:
    """Too many items are refused with 400 and the field, too many bytes with 413, each in the form of its address."""
    settings = desk(make_settings, max_input_items=3, max_body_bytes=5000)
    many = [{"role": "user", "content": str(number)} for number in range(4)]
    async with serving(settings) as client:
        assert refusal(await client.post("/v1/responses", json={"input": many})) == (400, "invalid_parameter_value")
        chat = await client.post("/v1/chat/completions", json={"messages": many})
        assert (chat.status_code, chat.json()["error"]["param"]) == (400, "messages")
        batch = await client.post("/invocations", json={"inputs": ["x"] * 4})
        assert (batch.status_code, batch.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        large = {"input": "x" * 5000}
        assert refusal(await client.post("/v1/responses", json=large)) == (413, "request_too_large")
        other = await client.post("/invocations", json=large)
        assert (other.status_code, other.json()["error_code"]) == (413, "REQUEST_TOO_LARGE")
    assert rows("SELECT count(*) FROM runs") == [(0,)]


async def test_nothing_leaks(make_settings, rows) -> None:
    """After runs that succeeded, failed, paused, waited or were cancelled no task, turn or connection is in use."""
    async with serving(desk(make_settings)) as client:
        await say(client, "hello")
        before = asyncio.all_tasks()
        await asyncio.gather(*(one_of_many(client, number) for number in range(200)))
        state = client.app.state
        assert (state.runner._active, state.sessions._sleepers, state.sessions._leaving) == ({}, {}, set())
        assert state.executor._capture._runs == {}
        async with asyncio.timeout(5):
            while left := asyncio.all_tasks() - before:
                await asyncio.wait(left)
        await until(lambda: state.pool.get_stats()["pool_available"] == state.pool.get_stats()["pool_size"])
    assert rows("SELECT (SELECT count(*) FROM session_waiters), count(turn_owner) FROM sessions") == [(0, 0)]
    assert rows("SELECT count(*) FROM runs") == [(201,)]


async def one_of_many(client: Web, number: int) -> None:
    """Make one request of its kind, and see it to its end."""
    session, stream = f"s{number % 20}", bool(number % 2)
    match number % 5:
        case 0:
            await say(client, "conjure", session, stream=stream)
        case 1:
            await say(client, "refund it", session, stream=stream)
        case 2:
            path = f"/v1/responses/{(await say(client, 'hang', background=True)).json()['id']}"
            await client.post(f"{path}/cancel")
            assert (await ended(client, path))["status"] == "cancelled"
        case _:
            await say(client, f"no {number}", session, stream=stream)
