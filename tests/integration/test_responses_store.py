"""Stored responses: what is kept of them for whom, and the conversations that begin at one of them."""

import asyncio

import httpx
import psycopg
import psycopg.conninfo

from gateway.settings import sibling_database

from .runs import Web, begun, clerk, desk, ended, events, headers, refusal, say, serving, text, until

COUNTS = (
    "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM session_turns), (SELECT count(*) FROM responses)"
)


def after(client: Web, answer: httpx.Response, words: str, **fields: object) -> asyncio.Task[httpx.Response]:
    """Send a turn that follows a response."""
    return say(client, words, previous_response_id=answer.json()["id"], **fields)


async def said(client: Web, session: str) -> list[str]:
    """Return what was said by the user, turn by turn."""
    shown = (await client.get(f"/v1/sessions/{session}")).json()
    return [turn["items"][0]["content"] for turn in shown["turns"]]


async def test_a_response_is_followed_in_its_own_session(make_settings) -> None:
    """As long as it is the last one, whatever follows a response stays in its session, in other processes too."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        first = await say(one, "one")
        second = await after(two, first, "two")
        third = await after(one, second, "three")
        assert [text(each) for each in (first, second, third)] == ["1: one", "2: two", "3: three"]
        assert {each.json()["session_id"] for each in (first, second, third)} == {first.json()["session_id"]}


async def test_an_earlier_response_is_followed_in_a_fork(make_settings, rows) -> None:
    """A session that has gone on is left alone: a fork begins with copies of the turns so far, and both go on."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        first = await say(one, "one", "s")
        await after(one, first, "two")
        fork = await after(two, first, "two of the fork")
        name = fork.json()["session_id"]
        assert name != "s"
        assert text(fork) == "2: two of the fork"
        assert text(await after(one, fork, "three of the fork")) == "3: three of the fork"
        assert text(await say(two, "four of the fork", name)) == "4: four of the fork"
        assert text(await say(two, "three", "s")) == "3: three"
        assert await said(one, "s") == ["one", "two", "three"]
        assert await said(one, name) == ["one", "two of the fork", "three of the fork", "four of the fork"]
        first_turns = [(await one.get(f"/v1/sessions/{each}")).json()["turns"][0] for each in ("s", name)]
        assert first_turns[0] == first_turns[1]
    assert rows("SELECT session_id FROM sessions WHERE forked_from = 's'") == [(name,)]


async def test_many_at_once_after_one_response_are_branches(make_settings, rows) -> None:
    """Of many turns at once after one response one goes on in its session, each other in a fork of its own."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        first = await say(one, "begin", "s")
        branches = await asyncio.gather(*(after((one, two)[n % 2], first, f"branch {n}") for n in range(12)))
        assert [text(each) for each in branches] == [f"2: branch {n}" for n in range(12)]
        names = [each.json()["session_id"] for each in branches]
        assert (len(set(names)), names.count("s") <= 1) == (12, True)
        for number, name in enumerate(names):
            assert await said(one, name) == ["begin", f"branch {number}"]
    assert rows("SELECT count(*) FROM sessions WHERE turn_owner IS NOT NULL") == [(0,)]


async def test_a_fork_that_does_not_succeed_leaves_nothing(make_settings, rows) -> None:
    """A fork whose run fails, or is too late, is gone without a trace in any session."""
    async with serving(desk(make_settings, run_timeout_s=1.0)) as client:
        first = await say(client, "one", "s")
        await after(client, first, "two")
        sessions = "SELECT to_jsonb(sessions) - 'used_at' FROM sessions"
        before = rows(sessions), rows("SELECT * FROM session_turns")
        for words, code in (("conjure", "model_behavior_error"), ("wait", "run_timeout")):
            assert refusal(await after(client, first, words))[1] == code
            streamed = await after(client, first, words, stream=True)
            assert events(streamed)[-1]["response"]["error"]["code"] == code
        assert (rows(sessions), rows("SELECT * FROM session_turns")) == before


async def test_a_fork_of_what_is_forgotten_meanwhile_is_not_kept(make_settings, rows) -> None:
    """A run in a fork cannot bring turns back that are forgotten while it is under way."""
    async with serving(desk(make_settings)) as client:
        first = await say(client, "one", "s")
        await after(client, first, "two")
        fork = after(client, first, "wait")
        await begun()
        assert (await client.delete("/v1/sessions/s")).status_code == 200
        clerk().gate.set()
        assert refusal(await fork) == (409, "run_cancelled")
    assert rows(COUNTS) == [(0, 0, 0)]


async def test_what_is_not_to_be_stored_is_not(make_settings, rows) -> None:
    """With `store` false the run sees the conversation, and neither its turn nor its answer is kept."""
    async with serving(desk(make_settings)) as client:
        first = await say(client, "one", "s")
        before = rows(COUNTS)
        unstored = await after(client, first, "two", store=False)
        assert text(unstored) == "2: two"
        assert text(await say(client, "alone", store=False)) == "1: alone"
        assert text(await say(client, "alone", store=False, stream=False)) == "1: alone"
        events(await say(client, "alone", store=False, stream=True))
        assert rows(COUNTS) == before
        assert refusal(await client.get(f"/v1/responses/{unstored.json()['id']}")) == (404, "response_not_found")
        assert refusal(await after(client, unstored, "three")) == (404, "response_not_found")


async def test_a_named_conversation_goes_on_although_the_answer_is_not_stored(make_settings, rows) -> None:
    """With `store` false and a conversation that is named, the turn is kept and the response is not."""
    async with serving(desk(make_settings)) as client:
        answer = await say(client, "one", "s", store=False)
        assert text(await say(client, "two", "s")) == "2: two"
        assert (await client.get(f"/v1/responses/{answer.json()['id']}")).status_code == 404
    assert rows(COUNTS) == [(1, 2, 1)]


async def test_a_stored_response_is_given_as_it_was(make_settings) -> None:
    """A response, streamed or not, is given again as it was answered, with its input, until it is deleted."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        whole = (await say(one, "note a", "s")).json()
        streamed = events(await say(one, "note b", "s", stream=True))[-1]["response"]
        for response in (whole, streamed):
            path = f"/v1/responses/{response['id']}"
            assert (await two.get(path)).json() == response
            [item] = (await two.get(f"{path}/input_items")).json()["data"]
            assert item["content"][0]["text"].startswith("note")
            assert (await two.delete(path)).json()["deleted"] is True
            assert [(await one.get(path)).status_code, (await one.delete(path)).status_code] == [404, 404]
        assert text(await say(two, "still here", "s")) == "3: still here"


async def test_a_response_that_failed_cannot_be_followed(make_settings) -> None:
    """A failed stream is stored as failed, and nothing follows it; nor does anything follow what is under way."""
    async with serving(desk(make_settings)) as client:
        failed = events(await say(client, "conjure", "s", stream=True))[-1]["response"]
        stored = (await client.get(f"/v1/responses/{failed['id']}")).json()
        assert (stored["status"], stored["error"]["code"]) == ("failed", "model_behavior_error")
        assert refusal(await say(client, "more", previous_response_id=failed["id"])) == (404, "response_not_found")
        under_way = await say(client, "wait", "s", background=True)
        await begun()
        assert under_way.json()["status"] == "in_progress"
        assert refusal(await after(client, under_way, "more")) == (404, "response_not_found")
        clerk().gate.set()


async def test_a_response_in_the_background_is_fetched_when_it_is_done(make_settings) -> None:
    """A background run is answered at once, its response is found in every process, first under way, then as it is."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        begin = (await say(one, "wait here", "s", background=True)).json()
        path = f"/v1/responses/{begin['id']}"
        assert (await two.get(path)).json() == begin
        await begun()
        clerk().gate.set()
        found = await ended(two, path)
        assert found["output"][-1]["content"][0]["text"] == "waited here"
        assert text(await say(two, "next", previous_response_id=begin["id"])) == "2: next"


async def test_a_response_whose_process_died_has_failed(make_settings) -> None:
    """Nobody waits for a background run whose process is gone: its response is shown as failed."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        path = f"/v1/responses/{(await say(one, 'wait', 's', background=True)).json()['id']}"
        await begun()
        await one.app.state.sessions._signals.stop()
        found = await ended(two, path)
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
        assert (await two.post(f"{path}/cancel")).json()["status"] == "failed"
        clerk().gate.set()


async def test_a_response_that_was_deleted_stays_deleted(make_settings, rows) -> None:
    """A run whose response is deleted while it is under way does not store it again, however it ends."""
    async with serving(desk(make_settings)) as client:
        for words in ("wait", "wait boom"):
            path = f"/v1/responses/{(await say(client, words, background=True)).json()['id']}"
            await begun()
            assert (await client.delete(path)).status_code == 200
        clerk().gate.set()
        await client.app.state.runner.end(5)
    assert rows("SELECT count(*) FROM responses") == [(0,)]
    assert rows("SELECT status FROM runs ORDER BY started_at") == [("ok",), ("error",)]


async def test_a_run_that_ends_while_the_database_is_away_has_failed(make_settings, database_url, rows) -> None:
    """When the database is back, a response that was under way is stored as failed, so that nobody waits for it."""
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    async with serving(desk(make_settings)) as client:
        client.app.state.pool.timeout = 0.5
        await say(client, "wait", "s", background=True)
        await begun()
        with psycopg.connect(sibling_database(database_url, "postgres"), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            clerk().gate.set()
            await until(lambda: not client.app.state.runner.busy)
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await until(lambda: rows("SELECT status FROM responses") == [("failed",)])
        await until(lambda: rows("SELECT count(*) FROM sessions") == [(0,)])


async def test_nothing_of_a_forgotten_session_comes_back_with_the_end_of_its_run(make_settings, rows) -> None:
    """A session that is forgotten while runs are under way on it leaves neither turns nor responses."""
    async with serving(desk(make_settings)) as client:
        await say(client, "one", "s")
        streamed = say(client, "wait", "s", stream=True)
        await begun()
        assert (await client.delete("/v1/sessions/s")).status_code == 200
        assert events(await streamed)[-1]["response"]["error"]["code"] == "run_cancelled"
    assert rows(COUNTS) == [(0, 0, 0)]


async def test_a_response_belongs_to_its_key(make_settings) -> None:
    """Another key gets 404 for a response by whatever address; a key for administration sees it."""
    settings = desk(make_settings)
    ann, bob = await headers(settings, "ann", "bob")
    [admin] = await headers(settings, "admin", scopes=["admin"])
    async with serving(settings) as client:
        mine = (await client.post("/v1/responses", json={"input": "hello"}, headers=ann)).json()
        path = f"/v1/responses/{mine['id']}"
        foreign = [
            await client.get(path, headers=bob),
            await client.get(f"{path}/input_items", headers=bob),
            await client.post(f"{path}/cancel", headers=bob),
            await client.delete(path, headers=bob),
            await client.post("/v1/responses", json={"input": "hi", "previous_response_id": mine["id"]}, headers=bob),
            await client.get("/v1/responses/resp_nothing", headers=ann),
        ]
        assert [refusal(each) for each in foreign] == [(404, "response_not_found")] * 6
        assert (await client.get(path, headers=admin)).json() == mine
        assert (await client.get(path, headers=ann)).json() == mine


async def test_stored_responses_are_encrypted(make_settings, rows) -> None:
    """Neither question nor answer can be read in the database, of a response that is done, under way or failed."""
    async with serving(desk(make_settings)) as client:
        await say(client, "note kettle")
        await say(client, "conjure kettle", stream=True)
        await say(client, "wait for the kettle", background=True)
        await begun()
        stored = str(rows("SELECT * FROM responses"))
        assert stored.count("resp_") == 3
        assert "kettle" not in stored
        clerk().gate.set()


async def test_a_run_that_cannot_be_announced_is_no_run(make_settings, database_url, rows) -> None:
    """When the database is away as a stream is to begin, the client gets 503 and nothing is left under way."""
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    async with serving(desk(make_settings)) as client:
        await say(client, "hello")  # the keys are known for a while
        client.app.state.pool.timeout = 0.5
        with psycopg.connect(sibling_database(database_url, "postgres"), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            answer = await say(client, "hello", stream=True)
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert refusal(answer) == (503, "temporarily_unavailable")
        assert not client.app.state.runner.busy
        await until(lambda: rows("SELECT count(*) FROM responses") == [(1,)])
