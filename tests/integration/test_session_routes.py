"""Sessions over HTTP: looking at one, ending it, forgetting it; the evaluator runs as it does in its own process."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from gateway.crypto import load_keys
from gateway.evaluation.catalog import ScorerCatalog
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.evaluation.worker import Evaluator
from gateway.reloading import LiveSettings
from gateway.settings import Settings
from gateway.storage.api_keys import create_key
from gateway.storage.database import open_pool
from gateway.testing import ScriptedOpenAI, Slow

Evaluating = Callable[[], AbstractAsyncContextManager[MlflowStore]]


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """Settings by which nobody would wait for the quiet period to be over."""
    return make_settings(quiet_period_s=3600.0, mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def session() -> str:
    """An id that no other test has: they share an MLflow."""
    return f"s-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def evaluating(settings: Settings, mlflow_uri: str) -> Evaluating:
    """Run an evaluator with all its jobs, and give the store that it writes to."""
    configure_mlflow(settings, mlflow_uri)
    store = await asyncio.to_thread(MlflowStore, mlflow_uri, settings.mlflow_experiment)
    live = LiveSettings(settings)
    catalog = await asyncio.to_thread(ScorerCatalog, live)

    @asynccontextmanager
    async def running() -> AsyncIterator[MlflowStore]:
        async with open_pool(settings.database_url.get_secret_value(), max_size=10, name="evaluator") as pool:
            evaluator = asyncio.create_task(Evaluator(live, load_keys(settings), pool, store, catalog).run())
            try:
                yield store
            finally:
                evaluator.cancel()
                with suppress(asyncio.CancelledError):
                    await evaluator

    return running


async def say(client: Any, session: str, text: str, **fields: object) -> dict[str, Any]:
    """Send one turn and return the answer."""
    body = {"agent": "math", "input": text, "session_id": session, **fields}
    return (await client.post("/invocations", json=body)).json()


async def answer_of(request: Coroutine[Any, Any, Any]) -> Any:
    """Return the JSON of an answer."""
    return (await request).json()


async def until(client: Any, path: str, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask again until the answer is as wished."""
    async with asyncio.timeout(30):
        while not met(answer := (await client.get(path)).json()):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
        return answer


async def keys(settings: Settings, *scopes: str) -> list[dict[str, str]]:
    """Make an API key for each scope and return the headers that send them."""
    url = settings.database_url.get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        made = [await create_key(connection, scope, [scope], None, None, None, None) for scope in scopes]
    return [{"Authorization": f"Bearer {key}"} for key in made]


async def test_a_session_shows_its_turns_with_states_and_scores(serve, settings, evaluating) -> None:
    """Each turn has its items, trace, state and latest scores; the id is shown as it was asked for."""
    name = f"{uuid.uuid4().hex}@example.com"  # stored as a hash
    async with evaluating(), serve(settings) as client:
        first = await say(client, name, "12 + 30")
        await say(client, name, "add 1")
        found = await until(
            client, f"/v1/sessions/{name}", lambda answer: {turn["state"] for turn in answer["turns"]} == {"scored"}
        )
    assert (found["id"], found["object"], found["ended_at"], found["scores"]) == (name, "session", None, [])
    turn = found["turns"][0]
    assert (turn["turn"], turn["trace_id"]) == (1, first["trace_id"])
    assert turn["items"][0] == {"role": "user", "content": "12 + 30"}
    assert {score["name"]: score["passed"] for score in turn["scores"]}["no_tool_errors"] is True
    assert set(turn["scores"][0]) == {"name", "value", "passed", "rationale", "scorer"}


async def test_an_ended_session_is_scored_at_once(serve, settings, evaluating, rows, session) -> None:
    """Ending a conversation has it scored without the quiet period, once; a later turn opens it again."""
    async with evaluating(), serve(settings) as client:
        await say(client, session, "What is 10 divided by 0?")
        ended = (await client.post(f"/v1/sessions/{session}/end")).json()
        found = await until(client, f"/v1/sessions/{session}", lambda answer: bool(answer["scores"]))
        async with asyncio.timeout(30):
            while rows("SELECT due_at FROM conversations") != [(None,)]:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)
        again = (await client.post(f"/v1/sessions/{session}/end")).json()
        await say(client, session, "Sorry, I meant 10 divided by 4.")
        reopened = (await client.get(f"/v1/sessions/{session}")).json()
        await client.post(f"/v1/sessions/{session}/end")
        corrected = await until(
            client,
            f"/v1/sessions/{session}",
            lambda answer: any(score["name"] == "errors_resolved" and score["passed"] for score in answer["scores"]),
        )
    assert (ended["id"], ended["status"]) == (session, "scoring")
    assert found["ended_at"] == ended["ended_at"]
    assert again == {"id": session, "ended_at": ended["ended_at"], "status": "nothing_to_score"}
    assert reopened["ended_at"] is None
    assert corrected["ended_at"] > ended["ended_at"]
    names = [score["name"] for score in corrected["scores"]]
    assert names == sorted(set(names))


async def test_a_session_that_was_ended_before_an_evaluator_looked_is_scored(
    serve, settings, evaluating, session
) -> None:
    """An end that comes before the turn's trace has reached the evaluator counts when it does."""
    async with serve(settings) as client:
        await say(client, session, "What is 10 divided by 0?")
        assert (await client.post(f"/v1/sessions/{session}/end")).json()["status"] == "scoring"
        async with evaluating():
            await until(client, f"/v1/sessions/{session}", lambda answer: bool(answer["scores"]))


async def test_forgetting_waits_for_mlflow_and_says_what_was_removed(
    serve, settings, evaluating, rows, session
) -> None:
    """With an evaluator there the answer comes when MLflow's part is done too; asked again it is the same."""
    async with evaluating() as store, serve(settings) as client:
        answer = await say(client, session, "12 + 30")
        await until(client, f"/v1/sessions/{session}", lambda answer: answer["turns"][0]["state"] == "scored")
        [(scores,)] = rows("SELECT count(*) FROM scores")
        forgotten = await answer_of(client.delete(f"/v1/sessions/{session}"))
        again = await answer_of(client.delete(f"/v1/sessions/{session}"))
        gone = await client.get(f"/v1/sessions/{session}")
        assert await asyncio.to_thread(store.read_traces, [answer["trace_id"]]) == []
    assert forgotten["status"] == "done"
    assert forgotten["removed"] == {
        "sessions": 1,
        "turns": 1,
        "responses": 0,
        "waiting_traces": 0,
        "scores": scores,
        "mlflow_traces": 1,
        "dataset_rows": 0,
    }
    assert again == forgotten
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "session_not_found")
    assert rows("SELECT state, session_id FROM runs") == [("erased", "")]


async def test_forgetting_without_an_evaluator_is_pending_until_there_is_one(
    serve, settings, evaluating, rows, session
) -> None:
    """The answer says that MLflow's part is to come, and the same request tells later that it is done."""
    async with serve(settings) as client:
        async with evaluating():
            await say(client, session, "12 + 30", user="ann")
            await until(client, f"/v1/sessions/{session}", lambda answer: answer["turns"][0]["state"] == "scored")
        rows("DELETE FROM evaluators RETURNING 1")  # as if it had ended some time ago
        pending = (await client.delete("/v1/users/ann")).json()
        still = (await client.delete("/v1/users/ann")).json()
        async with evaluating():
            done = await answer_of(client.delete("/v1/users/ann"))
    assert (pending["status"], pending["removed"]["sessions"]) == ("pending", 1)
    assert still["status"] == "pending"
    assert done["status"] == "done"
    assert "evaluator" in pending["message"]


async def test_a_run_under_way_is_ended_and_stores_nothing(serve, make_settings, rows, session) -> None:
    """A run on a session that is being forgotten is cancelled, its turn is not kept, and the ledger counts it."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    slow = False

    def script(_body: dict[str, Any]) -> Any:
        if slow:
            loop.call_soon_threadsafe(asked.set)
        return Slow("Never.") if slow else "Fine."

    with ScriptedOpenAI(script) as model:
        overrides = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": model.url}
        async with serve(make_settings(model="scripted-1", **overrides)) as client:
            await say(client, session, "Hello")
            slow = True
            body = {"agent": "math", "input": "Hello again", "session_id": session}
            running = asyncio.create_task(answer_of(client.post("/invocations", json=body)))
            await asked.wait()
            forgotten = await answer_of(client.delete(f"/v1/sessions/{session}"))
            ended = await running
    assert forgotten["removed"]["turns"] == 1
    assert ended["error_code"] == "RUN_CANCELLED"
    assert rows("SELECT count(*) FROM sessions") == [(0,)]
    assert rows("SELECT state, session_id FROM runs") == [("erased", "")] * 2
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_sessions_belong_to_their_key(serve, settings, rows, session) -> None:
    """Another key finds, ends and forgets nothing; its user of the same name is its own; an admin may do all."""
    mine, other, admin = await keys(settings, "invoke", "invoke", "admin")
    async with serve(settings) as client:
        body = {"agent": "math", "input": "12 + 30", "session_id": session, "user": "ann"}
        await client.post("/invocations", json=body, headers=mine)
        for method, path in (
            ("GET", f"/v1/sessions/{session}"),
            ("POST", f"/v1/sessions/{session}/end"),
            ("DELETE", f"/v1/sessions/{session}"),
        ):
            refused = await client.request(method, path, headers=other)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "session_not_found")
        assert (await client.delete("/v1/users/ann", headers=other)).json()["removed"]["sessions"] == 0
        assert (await client.get(f"/v1/sessions/{session}", headers=admin)).status_code == 200
        assert (await client.delete("/v1/users/ann", headers=admin)).json()["removed"]["sessions"] == 1
        assert (await client.get(f"/v1/sessions/{session}", headers=mine)).status_code == 404
    assert rows("SELECT count(*) FROM sessions") == [(0,)]


@pytest.mark.parametrize("user", ["ann", "https://orcid.org/0000-0001", "ann@example.com"])
async def test_a_user_is_forgotten_whatever_their_id_looks_like(serve, settings, rows, user) -> None:
    """Ids with slashes and personal ones find their sessions; who is not known is answered with zeros."""
    async with serve(settings) as client:
        for session in ("s-1", "s-2"):
            await say(client, session, "12 + 30", user=user)
        await say(client, "s-3", "12 + 30", user="bob")
        forgotten = await client.delete(f"/v1/users/{quote(user, safe='')}")
        unknown = await client.delete("/v1/users/nobody")
    assert forgotten.json()["removed"]["sessions"] == 2
    assert (unknown.status_code, unknown.json()["status"]) == (200, "done")
    assert set(unknown.json()["removed"].values()) == {0}
    assert rows("SELECT session_id FROM sessions") == [("s-3",)]
    assert rows("SELECT user_id FROM runs WHERE user_id IS NOT NULL") == [("bob",)]
