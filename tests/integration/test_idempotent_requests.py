"""`Idempotency-Key` over HTTP: one request runs, its twins get the same answer, in whatever process they arrive."""

import asyncio
from typing import Any

import httpx
import pytest

from .runs import Web, begun, clerk, desk, events, headers, refusal, serving, text

ROUTES = [
    ("/v1/responses", {"input": "note it"}),
    ("/v1/responses", {"input": "note it", "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "note it"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "note it"}], "stream": True}),
    ("/invocations", {"input": "note it"}),
    ("/invocations", {"inputs": ["note it"]}),
]


def post(
    client: Web, path: str, body: dict[str, Any], key: str = "once", **fields: str
) -> asyncio.Task[httpx.Response]:
    """Send a request with an idempotency key; keyword arguments are further headers."""
    return asyncio.create_task(client.post(path, json=body, headers={"idempotency-key": key, **fields}))


async def test_the_same_request_gets_the_same_answer(make_settings, rows) -> None:
    """Sent again, also to another process, a request is answered with the same bytes and headers, and does not run."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        for number, (path, body) in enumerate(ROUTES, start=1):
            first = await post(one, path, body, key=f"key {number}")
            assert first.status_code == 200
            for client in (one, two):
                again = await post(client, path, body, key=f"key {number}")
                assert again.headers["idempotent-replayed"] == "true"
                assert (again.status_code, again.content) == (200, first.content)
                for name in ("content-type", "x-session-id", "cache-control"):
                    assert again.headers.get(name) == first.headers.get(name)
            assert len(clerk().done) == number
    assert rows("SELECT count(*) FROM runs") == [(len(ROUTES),)]
    assert "note it" not in str(rows("SELECT * FROM idempotency_keys"))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_twin_waits_for_the_answer(make_settings, stream) -> None:
    """Requests that come while the first is under way, in both processes, wait and get its answer; one runs."""
    settings = desk(make_settings)
    body = {"input": "wait here", "conversation": "s", "stream": stream}
    async with serving(settings) as one, serving(settings) as two:
        twins = [post((one, two)[number % 2], "/v1/responses", body) for number in range(8)]
        await begun()
        clerk().gate.set()
        answers = await asyncio.gather(*twins)
        assert {answer.content for answer in answers} == {answers[0].content}
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 7
        assert "waited here" in answers[0].text
    assert clerk().done == ["waited here"]


async def test_a_twin_that_waited_long_enough_is_told_to_come_back(make_settings) -> None:
    """A twin that waits for as long as a run may take gets 409."""
    async with serving(desk(make_settings, run_timeout_s=20.0)) as client:
        client.app.state.service._idempotency._wait_s = 0.1
        first = post(client, "/v1/responses", {"input": "wait"})
        await begun()
        assert refusal(await post(client, "/v1/responses", {"input": "wait"})) == (409, "idempotency_key_in_use")
        clerk().gate.set()
        assert text(await first) == "waited "


async def test_a_key_is_for_one_request(make_settings) -> None:
    """With another body, or at another address, a used key is refused with 422 in every process."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        await post(one, "/v1/responses", {"input": "note it"})
        for client in (one, two):
            refused = await post(client, "/v1/responses", {"input": "note something else"})
            assert refusal(refused) == (422, "idempotency_key_reused")
        other = await post(one, "/invocations", {"input": "note it"})
        assert (other.status_code, other.json()["error_code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
        assert refusal(await post(one, "/v1/responses", {"input": "x"}, key=""))[0] == 400
    assert clerk().done == ["it"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_failed_may_be_sent_again(make_settings, stream) -> None:
    """After a run that failed, a refusal or a full process, the same key runs."""
    settings = desk(make_settings, max_concurrent_runs=1)
    async with serving(settings) as client:
        body = {"input": "wait boom", "stream": stream}
        failed = post(client, "/v1/responses", body)
        await begun()
        other = {"input": "note it", "stream": stream}
        assert refusal(await post(client, "/v1/responses", other, key="other")) == (503, "overloaded")
        clerk().gate.set()
        first = await failed
        again = await post(client, "/v1/responses", body)
        assert "idempotent-replayed" not in again.headers
        assert again.content != first.content
        assert "noted it" in (await post(client, "/v1/responses", other, key="other")).text
    assert clerk().done == ["it"]


async def test_a_background_run_is_begun_once(make_settings, rows) -> None:
    """The same background request again is answered with the same response under way, and begins nothing."""
    async with serving(desk(make_settings)) as client:
        body = {"input": "wait", "background": True}
        first, again = [await post(client, "/v1/responses", body) for _ in range(2)]
        assert first.json()["id"] == again.json()["id"]
        await begun()
        clerk().gate.set()
    assert rows("SELECT count(*) FROM responses") == [(1,)]


async def test_a_key_belongs_to_an_api_key(make_settings) -> None:
    """Two callers may use the same idempotency key: each gets an answer of its own."""
    settings = desk(make_settings)
    ann, bob = await headers(settings, "ann", "bob")
    async with serving(settings) as client:
        mine = await post(client, "/v1/responses", {"input": "note it"}, **ann)
        theirs = await post(client, "/v1/responses", {"input": "note it"}, **bob)
        assert mine.json()["id"] != theirs.json()["id"]
        assert (await post(client, "/v1/responses", {"input": "note it"}, **ann)).content == mine.content
    assert clerk().done == ["it", "it"]


async def test_an_approval_is_used_once_though_its_answer_is_sent_again(make_settings) -> None:
    """Where an approval is answered with an idempotency key, sending it again gives the answer instead of a 409."""
    async with serving(desk(make_settings)) as client:
        paused = events(await post(client, "/v1/responses", {"input": "refund A-1", "stream": True}, key="ask"))
        [request] = [item for item in paused[-1]["response"]["output"] if item["type"] == "mcp_approval_request"]
        body = {"approvals": [{"approval_request_id": request["id"], "approve": True}]}
        first, again = [await post(client, "/v1/responses", body) for _ in range(2)]
        assert text(first) == text(again) == "refunded A-1"
    assert clerk().done == ["refund A-1"]
