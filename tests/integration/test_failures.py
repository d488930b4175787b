"""Runs that end badly: what the client is told, in each form, and what is left of them, which is only their trace."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psycopg
import pytest

from gateway.testing import ScriptedOpenAI, Slow

from .runs import Web, approvals, begun, clerk, decided, desk, ended, events, refusal, say, serving, text, traces, until

SECRET = "hunter22"
FAILURES = [
    ("clerk", "conjure", 502, "model_behavior_error"),
    ("clerk", "loop, note it", 422, "max_turns_exceeded"),
    ("clerk", "forbidden", 422, "run_blocked"),
    ("clerk", "leak", 422, "run_blocked"),
    ("clerk", "dawdle", 504, "tool_timeout"),
    ("clerk", "give_up", 500, "run_failed"),
    ("clerk", "wait", 504, "run_timeout"),
    ("clerk", "hang", 504, "run_timeout"),
    ("bystander", "hang", 504, "model_timeout"),
]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error that ends a stream, of either form."""
    last = events(answer)[-1]
    return dict(last["response"]["error"] if last.get("type") == "response.failed" else last["error"])


async def test_a_failure_has_a_status_and_a_code_in_every_form(make_settings, rows) -> None:
    """JSON has the status and the code, a stream has begun and ends with the code; both name the run's trace."""
    settings = desk(make_settings, run_timeout_s=4.0, max_turns=3)

    async def fail(client: Web, model: str, words: str, status: int, code: str) -> set[str]:
        body = {"model": model, "input": words}
        chat = {"model": model, "messages": [{"role": "user", "content": words}]}
        answers = await asyncio.gather(
            client.post("/v1/responses", json=body),
            client.post("/v1/chat/completions", json=chat),
            client.post("/invocations", json=body),
            client.post("/v1/responses", json=body | {"stream": True}),
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
        return {errors[0]["trace_id"], errors[1]["trace_id"], told[2]["trace_id"]}

    async with serving(settings) as client:
        named = await asyncio.gather(*(fail(client, *failure) for failure in FAILURES))
        assert not client.app.state.runner.busy
    kept = traces(settings)
    for trace_ids, (_, _, _, code) in zip(named, FAILURES, strict=True):
        assert {kept[trace_id].error.type for trace_id in trace_ids} == {code.upper()}
    assert len(kept) == 5 * len(FAILURES)
    assert rows("SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM paused_runs)") == [(0, 0)]


async def test_what_does_not_heed_its_end_holds_nobody_up(make_settings, rows) -> None:
    """A tool in a thread, a tool or a model that swallows its cancellation: the client hears of the end in time."""
    settings = desk(make_settings, run_timeout_s=0.5)
    ways = [(words, stream) for words in ("block", "cling", "deaf") for stream in (True, False)]
    async with serving(settings) as client:
        asked = [say(client, words, f"{words} {stream}".replace(" ", "-"), stream=stream) for words, stream in ways]
        answers = await asyncio.wait_for(asyncio.gather(*asked), 5)
        codes = [
            error_of(answer)["code"] if stream else refusal(answer)[1]
            for answer, (_, stream) in zip(answers, ways, strict=True)
        ]
        assert codes == ["run_timeout"] * 6
        assert rows("SELECT count(*) FROM sessions") == [(0,)]
        clerk().gate.set()
        clerk().thread_gate.set()
        assert text(await say(client, "next", "block-True")) == "1: next"


async def test_the_trace_of_a_run_that_was_cut_off_is_whole(make_settings) -> None:
    """What was under way when a run was ended is in its trace, also where nothing else keeps the run from ending."""
    settings = desk(make_settings, run_timeout_s=1.0)
    asked = [(words, stream) for words in ("note it, wait", "hang") for stream in (True, False)]
    async with serving(settings) as client:
        await asyncio.gather(*(say(client, words, store=False, stream=stream) for words, stream in asked))
    names = sorted(sorted(span.name for span in trace.spans[1:]) for trace in traces(settings).values())
    assert names == [["no_forbidden", "note", "offline", "wait"]] * 2 + [["no_forbidden", "offline"]] * 2


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


PROVIDER = [
    ("429 Too Many", "rate_limit_exceeded", ["retry-after: 7"], (503, "model_rate_limited", "7")),
    ("429 Too Many", "rate_limit_exceeded", [], (503, "model_rate_limited", "5")),
    ("400 Bad", "context_length_exceeded", [], (422, "context_length_exceeded", None)),
    ("400 Bad", "anything", [], (502, "model_error", None)),
    ("401 Unauthorized", "invalid_api_key", [], (502, "model_error", None)),
    ("500 Oh", "server_error", [], (502, "model_error", None)),
]


@asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """Answer with the error that the question names by its number, as a model's provider does; give the base URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1]))
        status, code, fields, _ = PROVIDER[int(re.search(rb"question (\d)", asked)[1])]
        error = {"message": f"{SECRET} said: {asked.decode()}", "type": SECRET, "code": code}
        body = json.dumps({"error": error}).encode()
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *fields]
        writer.write("\r\n".join([*lines, "x-should-retry: false", "connection: close", "", ""]).encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def test_what_the_models_provider_answers(make_settings) -> None:
    """Each kind of error of the model's provider has a code of its own, and none of its words reaches the client."""
    async with provider() as url:
        settings = desk(make_settings, model="scripted-1", OPENAI_API_KEY="sk-planted-key", OPENAI_BASE_URL=url)
        async with serving(settings) as client:
            for number, (*_, told) in enumerate(PROVIDER):
                whole = await say(client, f"question {number}")
                streamed = await say(client, f"question {number}", stream=True)
                assert (*refusal(whole), whole.headers.get("retry-after")) == told
                assert error_of(streamed)["code"] == told[1]
                for answer in (whole, streamed):
                    assert not [word for word in (SECRET, "question", "planted", "127.0.0.1") if word in answer.text]


async def test_no_error_says_what_a_tool_raised(make_settings) -> None:
    """What a tool raised stands in the trace and in no answer: JSON, stream, stored, of a resumed run or a batch."""
    settings = desk(make_settings)
    async with serving(settings) as client:
        clerk().gate.set()
        whole = [await say(client, words) for words in ("crash", "wait boom")]
        streamed = [await say(client, words, stream=True) for words in ("crash", "wait boom")]
        for stream, told in ((False, whole), (True, streamed)):
            paused = await say(client, "refund boom")
            told.append(await decided(client, *approvals(paused), stream=stream))
        assert [answer.status_code for answer in whole] == [500] * 3
        assert {error_of(answer)["code"] for answer in streamed} == {refusal(answer)[1] for answer in whole}
        stored = await client.get(f"/v1/responses/{events(streamed[0])[-1]['response']['id']}")
        batch = await client.post("/invocations", json={"inputs": ["crash", "hello"]})
        for each in (*whole, *streamed, stored, batch):
            assert not [word for word in (SECRET, "RuntimeError", "Traceback", ".py") if word in each.text]
    assert sum(SECRET in str(trace.error) for trace in traces(settings).values()) == 7


async def test_a_run_that_is_cancelled_while_its_failure_is_stored(make_settings, database_url, rows) -> None:
    """A run that has failed cannot be cancelled any more: its client is told of the failure, and nothing is left."""
    async with serving(desk(make_settings)) as client:
        asked = say(client, "wait boom", stream=True)
        await begun()
        [trace_id] = client.app.state.runner._active
        with psycopg.connect(database_url) as other:
            other.execute("SELECT 1 FROM responses FOR UPDATE")
            clerk().gate.set()
            await until(lambda: rows(BLOCKED) == [(1,)])
            client.app.state.runner.stop(trace_id, "too late")
        assert error_of(await asked)["message"] != "too late"
        assert not client.app.state.runner.busy


async def test_a_run_that_begins_while_the_process_stops(make_settings, database_url, rows) -> None:
    """A run that is not quite begun when the process stops is ended like all others."""
    async with serving(desk(make_settings)) as client:
        with psycopg.connect(database_url) as other:
            other.execute("LOCK TABLE responses IN EXCLUSIVE MODE")
            asked = say(client, "wait", stream=True)
            await until(lambda: rows(BLOCKED) == [(1,)])
            ending = asyncio.create_task(client.app.state.runner.end(0))
            await asyncio.sleep(0.05)
        await asyncio.wait_for(ending, 5)
        assert refusal(await asked) == (503, "temporarily_unavailable")
    assert clerk().seen == []


BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


async def test_no_error_of_ours_is_for_the_client(make_settings) -> None:
    """What is wrong with the gateway's own settings is said in its log, and in no answer, JSON, stream or batch."""
    async with serving(desk(make_settings)) as client:
        await say(client, "hello", "s")
    async with serving(desk(make_settings, secret_key="another secret for tests")) as client:
        told = [
            await say(client, "hello", "s"),
            await say(client, "hello", "s", stream=True),
            await client.post("/invocations", json={"inputs": [{"input": "hello", "session_id": "s"}, "hello"]}),
        ]
    assert [answer.status_code for answer in told] == [500, 500, 200]
    assert all("INTERNAL_ERROR" in answer.text.upper() for answer in told)
    assert not [answer.text for answer in told if "GATEWAY_" in answer.text or "key" in answer.text]


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
        assert (state.runner._active, state.sessions._line._sleepers, state.sessions._line._settling) == ({}, {}, set())
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
