"""Sessions: one run at a time, in order, over several web processes that come and go."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import psycopg
import psycopg.conninfo
import pytest

from gateway.crypto import Keys
from gateway.errors import RunCancelled, SessionBusy
from gateway.runs.sessions import SessionStore
from gateway.settings import sibling_database
from gateway.storage.database import open_pool
from gateway.storage.signals import STOP_RUN, Signals

from .runs import Web, approvals, begun, clerk, decided, desk, headers, refusal, say, serving, text, traces, until

Process = Callable[..., AbstractAsyncContextManager[SessionStore]]
ITEMS = [{"role": "user", "content": "hello"}]
LOOK_UP = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def process(database_url: str) -> Process:
    """The sessions of a web process that lives for as long as the context."""

    @asynccontextmanager
    async def living(**bounds: Any) -> AsyncIterator[SessionStore]:
        signals = Signals(database_url)
        try:
            async with open_pool(database_url, max_size=5, name="sessions") as pool:
                store = SessionStore(pool, Keys(b"x" * 16).history, signals, history_turns=20, hold_s=60, **bounds)
                await signals.start()
                yield store
        finally:
            await signals.stop()

    return living


@pytest.fixture
def waiting(rows: Callable[..., Any]) -> Callable[[int], Any]:
    """Wait until so many requests wait for a turn."""
    return lambda count: until(lambda: rows("SELECT count(*) FROM session_waiters") == [(count,)])


async def turns(client: Web, session: str = "s") -> list[str]:
    """Return what was said by the user, turn by turn."""
    shown = (await client.get(f"/v1/sessions/{session}")).json()
    return [turn["items"][0]["content"] for turn in shown["turns"]]


async def test_fifty_at_once_lose_double_and_mix_up_nothing(make_settings, rows) -> None:
    """Fifty requests at once over two processes are fifty turns, each run having seen exactly those before it."""
    settings = desk(make_settings, history_turns=100)
    async with serving(settings) as one, serving(settings) as two:
        answers = await asyncio.gather(*(say((one, two)[number % 2], f"no {number}", "s") for number in range(50)))
        shown = (await one.get("/v1/sessions/s")).json()["turns"]
    told = sorted(text(answer) for answer in answers)
    stored = [(turn["items"][0]["content"], turn["items"][1]["content"][0]["text"]) for turn in shown]
    assert sorted(answer for _, answer in stored) == told
    assert stored == [(said, f"{number}: {said}") for number, (said, _) in enumerate(stored, start=1)]
    assert Counter(said for said, _ in stored) == Counter(f"no {number}" for number in range(50))
    assert rows("SELECT turns, turn_owner FROM sessions") == [(50, None)]
    assert rows("SELECT count(*) FROM session_waiters") == [(0,)]


async def test_a_session_that_nobody_can_know_is_stored_with_its_first_answer(make_settings, rows) -> None:
    """A request that names no session and no user has no row before its answer; then it can be gone on with."""
    async with serving(desk(make_settings)) as client:
        asked = say(client, "wait for it")
        await begun()
        assert rows("SELECT count(*) FROM sessions") == [(0,)]
        clerk().gate.set()
        session = (await asked).headers["x-session-id"]
        assert text(await say(client, "and now", session)) == "2: and now"
        assert rows("SELECT session_id, turns, turn_owner FROM sessions") == [(session, 2, None)]


async def test_a_session_that_came_to_be_meanwhile_is_not_written_over(process, rows) -> None:
    """The first turn of a session that is there by the time of its commit is refused, and nothing of it is stored."""
    async with process() as store:
        async with store.turn("s", "tr-other") as other:
            await store.commit(other, ITEMS)
        with pytest.raises(SessionBusy):
            await store.commit(store.begin("s", "tr-mine"), ITEMS)
        assert [turn.number for turn in await store.turns("s")] == [1]


async def test_who_waits_is_served_in_order_of_arrival(make_settings, waiting) -> None:
    """Requests that wait in two processes get the turn in the order in which they came."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        asked = [say(one, "wait for it", "s")]
        await begun()
        for number in range(6):
            asked.append(say((one, two)[number % 2], f"no {number}", "s"))
            await waiting(number + 1)
        clerk().gate.set()
        await asyncio.gather(*asked)
        assert await turns(one) == ["wait for it", *(f"no {number}" for number in range(6))]


async def test_the_next_in_line_is_woken_at_once(process, waiting) -> None:
    """Whoever gives the turn back wakes the first in line, in another process too, long before it would look itself."""
    order = []

    async def take(store: SessionStore, owner: str) -> None:
        async with store.turn("s", owner) as turn:
            order.append(owner)
            await store.commit(turn, ITEMS)

    async with process() as one, process() as two:
        async with one.turn("s", "first"):
            line = []
            for store, owner in ((two, "second"), (one, "third"), (two, "fourth")):
                line.append(asyncio.create_task(take(store, owner)))
                await waiting(len(line))
        async with asyncio.timeout(0.8):
            await asyncio.gather(*line)
    assert order == ["second", "third", "fourth"]


async def test_a_request_is_refused_where_that_is_the_policy(make_settings, rows) -> None:
    """With the policy `reject`, a request on a busy session gets 409 at once and is no run; it may be sent again."""
    settings = desk(make_settings, session_policy="reject")
    async with serving(settings) as one, serving(settings) as two:
        first = say(one, "wait", "s")
        await begun()
        assert refusal(await say(two, "now", "s")) == (409, "session_busy")
        assert (await say(two, "elsewhere", "t")).status_code == 200
        clerk().gate.set()
        await first
        assert text(await say(two, "now", "s")) == "2: now"
    assert rows("SELECT count(*) FROM runs") == [(3,)]


async def test_the_newest_request_counts_where_that_is_the_policy(make_settings) -> None:
    """With the policy `interrupt`, a newer request ends the run under way, in another process too, and is served."""
    settings = desk(make_settings, session_policy="interrupt")
    async with serving(settings) as one, serving(settings) as two:
        asked = [say(one, "wait for one", "s")]
        await begun()
        asked.append(say(two, "wait for two", "s"))
        await begun()
        asked.append(say(one, "three", "s"))
        first, second, third = await asyncio.gather(*asked)
        assert refusal(first) == refusal(second) == (409, "run_cancelled")
        assert text(third) == "1: three"
        assert await turns(one) == ["three"]
    assert clerk().done == []
    left = [trace.error.type if trace.error else None for trace in traces(settings).values()]
    assert left == ["CANCELLED", "CANCELLED", None]


async def test_the_newest_request_passes_those_that_wait(make_settings, waiting) -> None:
    """With the policy `interrupt`, a request that waits for its turn is ended by a newer one, elsewhere too."""
    settings = desk(make_settings, session_policy="interrupt")
    async with serving(settings) as one, serving(settings) as two:
        await say(one, "begin", "s")
        async with one.app.state.sessions.hold("s"):
            older = say(two, "older", "s")
            await waiting(1)
            newer = say(one, "newer", "s")
            assert refusal(await older) == (409, "run_cancelled")
        assert text(await newer) == "2: newer"
    assert [trace.error.type for trace in traces(settings).values() if trace.error] == ["CANCELLED"]


async def test_an_interrupt_that_was_not_heard_is_said_again(process, database_url) -> None:
    """A run whose process missed the signal is told again, so that a newer request need not wait for its end."""
    told: list[str] = []
    async with process() as one, process() as two:
        one._signals.on(STOP_RUN, told.append)
        async with one.turn("s", "older"):
            taking = asyncio.create_task(two.turn("s", "newer", policy="interrupt").__aenter__())
            await until(lambda: told.count("older") == 2)
        await taking


async def test_the_turn_of_a_dead_process_is_free_at_once(process) -> None:
    """When a process goes without giving a turn back, the next request gets it at once and sees the turns so far."""
    async with process() as living:
        async with process() as dying:
            async with dying.turn("s", "committed") as turn:
                await dying.commit(turn, ITEMS)
            await dying.turn("s", "lost").__aenter__()
            waiting = asyncio.create_task(living.turn("s", "next").__aenter__())
            await dying._signals.stop()
            turn = await asyncio.wait_for(waiting, 2)
        assert (turn.number, turn.history) == (2, ITEMS)


async def test_who_lost_its_turn_stores_nothing(make_settings) -> None:
    """A run whose process seemed dead, and whose turn another took, gets 409 and leaves nothing; the other's counts."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        lost = say(one, "wait", "s")
        await begun()
        await one.app.state.sessions._signals.stop()
        assert text(await say(two, "hello", "s")) == "1: hello"
        clerk().gate.set()
        assert refusal(await lost) == (409, "session_busy")
        assert await turns(two) == ["hello"]


async def test_lost_connections_for_signals_are_made_anew(make_settings, waiting, rows) -> None:
    """After all processes have lost their connections for signals, turns are kept and taken away as before."""
    settings = desk(make_settings, session_policy="interrupt")
    async with serving(settings) as one, serving(settings) as two:
        asked = [say(one, "wait", "s")]
        await begun()
        cut = rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gateway-signals'")
        assert len(cut) == 2
        await until(lambda: rows("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted") == [(2,)])
        asked.append(say(two, "two", "s"))
        first, second = await asyncio.gather(*asked)
        assert (refusal(first), text(second)) == ((409, "run_cancelled"), "1: two")


async def test_a_process_keeps_its_turn_while_it_reconnects(process, database_url) -> None:
    """Without its connection for signals a process still knows its own turns: no second request there takes one."""
    async with process() as store, store.turn("s", "holder") as turn:
        await store._signals.stop()
        with pytest.raises(SessionBusy):
            await store.turn("s", "other", policy="reject").__aenter__()
        await store.commit(turn, ITEMS)


@pytest.mark.parametrize("policy", ["enqueue", "interrupt"])
async def test_a_request_that_is_cancelled_at_any_moment_leaves_the_turn(process, policy) -> None:
    """A request that goes away at any moment of its taking the turn leaves it, and its place in line, to the next."""
    async with process() as store, process() as other:

        async def take() -> None:
            async with store.turn("s", "fleeting", policy=policy):
                await asyncio.sleep(0)

        for steps in range(60):
            async with other.turn("s", f"holder {steps}"):
                taking = asyncio.create_task(take())
                for _ in range(steps):
                    await asyncio.sleep(0)
                if steps % 2:
                    taking.cancel()
                    await asyncio.wait({taking})
            taking.cancel()
            await asyncio.wait({taking})
        async with asyncio.timeout(2), store.turn("s", "last") as turn:
            assert turn.number == 1
        assert not store._line._sleepers
        async with asyncio.timeout(5):
            while store._line._settling:
                await asyncio.wait(set(store._line._settling))


async def test_a_turn_is_given_back_although_the_database_is_away(process, database_url) -> None:
    """A run that ends while the database is away does not wait for it; its session is free soon after it is back."""
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    with psycopg.connect(sibling_database(database_url, "postgres"), autocommit=True) as admin:
        async with process() as store:
            async with asyncio.timeout(10):
                async with store.turn("s", "unlucky"):
                    admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
                    admin.execute(_CUT_OFF, [name])
                admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
                async with store.turn("s", "next") as turn:
                    assert turn.number == 1


_CUT_OFF = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = %s AND application_name = 'gateway-sessions'
"""


async def test_a_run_that_did_not_hear_that_it_was_interrupted_stores_nothing(process, rows) -> None:
    """A run that goes on although a newer request has ended it cannot commit."""
    async with process() as one, process() as two:
        async with one.turn("s", "older") as turn:
            taking = asyncio.create_task(two.turn("s", "newer", policy="interrupt").__aenter__())
            await until(lambda: rows("SELECT interrupted FROM sessions") == [(True,)])
            with pytest.raises(RunCancelled):
                await one.commit(turn, ITEMS)
        assert (await taking).number == 1


def whole(conversation: list[Any]) -> bool:
    """Whether every tool call is followed by its one result, and every result follows its call."""
    kinds = [(item.get("type"), item.get("call_id")) for item in conversation if "call_id" in item]
    calls = [call_id for kind, call_id in kinds if kind == "function_call"]
    outputs = [call_id for kind, call_id in kinds if kind == "function_call_output"]
    in_order = all(
        kinds.index(("function_call", each)) < kinds.index(("function_call_output", each)) for each in outputs
    )
    return sorted(calls) == sorted(outputs) and len(set(calls)) == len(calls) and in_order


@pytest.mark.parametrize("history_turns", [0, 1, 2])
async def test_no_call_is_ever_cut_from_its_result(make_settings, history_turns) -> None:
    """However short the history is, the model sees each call with its result: run here, by the client, or left open."""
    settings = desk(make_settings, history_turns=history_turns)
    client_tool = {"tools": [LOOK_UP]}
    async with serving(settings) as client:

        async def answer_call(call: dict[str, Any]) -> Any:
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
            return await client.post("/v1/responses", json={"input": [output], "conversation": "s", **client_tool})

        await say(client, "note a", "s")
        asked = (await say(client, "please look_up it", "s", **client_tool)).json()
        [call] = asked["output"]
        assert call["name"] == "look_up"
        assert (await answer_call(call)).status_code == 200
        assert whole(clerk().seen[-1])
        [approval] = approvals(await say(client, "refund A-1", "s"))
        assert text(await decided(client, approval)) == "refunded A-1"
        await say(client, "note b", "s")
        await say(client, "refund A-2", "s")  # never decided
        [left] = (await say(client, "please look_up more", "s", **client_tool)).json()["output"]
        for number in range(4):
            await say(client, f"note {number}", "s")
            if number == 1:  # the client comes late with the result
                await answer_call(left)
    views = clerk().seen
    assert [view for view in views if not whole(view)] == []
    longest = max(sum(item.get("role") == "user" for item in view) for view in views)
    assert longest <= history_turns + 2
    assert (max(json.dumps(view).count("not carried out") for view in views) > 0) == (history_turns > 0)


async def test_the_history_is_bounded_in_turns(make_settings) -> None:
    """The model sees as many earlier turns as the setting says, the newest ones."""
    async with serving(desk(make_settings, history_turns=2)) as client:
        answers = [text(await say(client, f"no {number}", "s")) for number in range(5)]
    assert answers == ["1: no 0", "2: no 1", "3: no 2", "3: no 3", "3: no 4"]
    assert [item["content"] for item in clerk().seen[-1] if item.get("role") == "user"] == ["no 2", "no 3", "no 4"]


async def test_a_run_that_does_not_succeed_leaves_the_session_as_it_was(make_settings, rows) -> None:
    """A run that fails, is too late or is blocked changes no session and makes none, and the next turn is served."""
    async with serving(desk(make_settings, run_timeout_s=1.0)) as client:
        await say(client, "note a", "s")
        sessions = "SELECT to_jsonb(sessions) - 'used_at' FROM sessions"
        before = rows(sessions), rows("SELECT * FROM session_turns")
        for words, code in (
            ("conjure", "model_behavior_error"),
            ("dawdle", "tool_timeout"),
            ("wait", "run_timeout"),
            ("forbidden", "run_blocked"),
        ):
            for session in ("s", "new"):
                assert refusal(await say(client, f"note b, {words}", session))[1] == code
            assert (rows(sessions), rows("SELECT * FROM session_turns")) == before
        assert text(await say(client, "more", "s")) == "2: more"


async def test_a_session_belongs_to_its_key(make_settings, rows) -> None:
    """Another key gets 404 for a session by whatever address and form, also while it waits, and nothing is changed."""
    settings = desk(make_settings)
    ann, bob = await headers(settings, "ann", "bob")
    async with serving(settings) as client:
        mine = {"json": {"input": "hello", "conversation": "s"}, "headers": ann}
        assert (await client.post("/v1/responses", **mine)).status_code == 200
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        bodies = [
            ("/v1/responses", {"input": "hi", "conversation": "s"}),
            ("/v1/responses", {"input": "hi", "conversation": "s", "stream": True}),
            ("/v1/responses", {"input": "hi", "session_id": "s", "store": False}),
            ("/v1/chat/completions", chat | {"session_id": "s"}),
            ("/invocations", {"input": "hi", "session_id": "s"}),
            ("/invocations", chat | {"context": {"conversation_id": "s"}, "stream": True}),
        ]
        answers = [await client.post(path, json=body, headers=bob) for path, body in bodies]
        answers += [
            await client.post("/v1/responses", json={"input": "hi"}, headers=bob | {"x-session-id": "s"}),
            await client.get("/v1/sessions/s", headers=bob),
            await client.post("/v1/sessions/s/end", headers=bob),
            await client.delete("/v1/sessions/s", headers=bob),
        ]
        assert [answer.status_code for answer in answers] == [404] * len(answers)
        assert all("SESSION_NOT_FOUND" in answer.text.upper() for answer in answers)
        busy = asyncio.create_task(
            client.post("/v1/responses", json={"input": "wait", "conversation": "s"}, headers=ann)
        )
        await begun()
        assert (await client.post(bodies[0][0], json=bodies[0][1], headers=bob)).status_code == 404
        clerk().gate.set()
        assert (await busy).status_code == 200
    assert rows("SELECT turns, turn_owner FROM sessions") == [(2, None)]
    assert rows("SELECT count(*) FROM runs") == [(2,)]


async def test_a_session_is_known_by_its_user_and_origin_while_its_first_run_is_under_way(make_settings, rows) -> None:
    """A new session and a fork are found by user and by origin before their first turn is stored."""
    async with serving(desk(make_settings)) as client:
        first = (await say(client, "one", user="ann")).json()
        await say(client, "two", previous_response_id=first["id"])
        fork = say(client, "wait", previous_response_id=first["id"], user="ann")
        await begun()
        found = rows("SELECT user_id, forked_from FROM sessions WHERE turns = 0")
        clerk().gate.set()
        await fork
    assert found == [("ann", first["session_id"])]
