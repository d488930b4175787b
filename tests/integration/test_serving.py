"""Answers, sessions and the ledger: the app on a real Postgres, with the example agents' offline models."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from gateway.errors import ConfigurationError
from gateway.testing import HttpError, ScriptedOpenAI, ToolCall

MATH_PLUGIN = """
from agents import Agent, function_tool

@function_tool
def add(a: float, b: float) -> float:
    "Add two numbers."
    return a + b

agent = Agent(name="adder", instructions="Add.", tools=[add])
"""


def ask(text: str, **fields: object) -> dict[str, object]:
    return {"input": text, **fields}


async def test_input_is_answered_in_responses_form(serve, make_settings) -> None:
    """A text as input is answered with a Responses object, tool calls included, and the gateway's own fields."""
    async with serve(make_settings()) as client:
        answer = await client.post("/invocations", json=ask("What is 15% of 240?"))
    body = answer.json()
    assert answer.status_code == 200
    assert [item["type"] for item in body["output"]] == ["function_call", "function_call_output", "message"]
    assert body["output"][-1]["content"][0]["text"] == "36"
    assert body["object"] == "response"
    assert body["sampled"] is True
    assert body["offline"] is True
    assert re.fullmatch(r"tr-[0-9a-f]{32}", body["trace_id"])
    assert re.fullmatch(r"[0-9a-f]{12}", body["agent_version"])
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"] > 0


async def test_messages_are_answered_in_chat_form(serve, make_settings) -> None:
    """Chat messages are answered with a chat completion."""
    question = "I bought 2 shares at $100 each. It's now worth $150. How much profit?"
    async with serve(make_settings()) as client:
        answer = await client.post("/invocations", json={"messages": [{"role": "user", "content": question}]})
    body = answer.json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "100", "refusal": None}
    assert body["object"] == "chat.completion"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] > 0


async def test_a_session_remembers_over_a_restart_and_in_another_process(serve, make_settings) -> None:
    """A second request with the same session sees the first one's turns, also from an app started later."""
    settings = make_settings()
    async with serve(settings) as first:
        await first.post("/invocations", json=ask("What is 15% of 240?", session_id="s1"))
    async with serve(settings) as second, serve(settings) as third:
        again = await second.post("/invocations", json=ask("And times 3?", session_id="s1"))
        more = await third.post("/invocations", json=ask("Add 10 to that", session_id="s1"))
    assert again.json()["output"][-1]["content"][0]["text"] == "108"
    assert more.json()["output"][-1]["content"][0]["text"] == "118"


async def test_two_apps_and_one_session_lose_no_turn(serve, make_settings, rows) -> None:
    """Requests at once on one session, over two processes, run one after the other and none is lost or doubled."""
    settings = make_settings()
    async with serve(settings) as one, serve(settings) as two:
        await one.post("/invocations", json=ask("What is 1 plus 0?", session_id="hammered"))
        requests = [
            (one, two)[number % 2].post("/invocations", json=ask("double that", session_id="hammered"))
            for number in range(12)
        ]
        answers = await asyncio.gather(*requests)
    results = sorted(int(answer.json()["output"][-1]["content"][0]["text"]) for answer in answers)
    assert results == [2**power for power in range(1, 13)]
    assert rows("SELECT turns, turn_owner FROM sessions WHERE session_id = 'hammered'") == [(13, None)]
    assert rows("SELECT count(*), min(turn), max(turn) FROM session_turns") == [(13, 1, 13)]


@pytest.mark.parametrize(
    ("body", "status", "code", "hint"),
    [
        (b'{"input": "x", "agent": "nobody"}', 404, "AGENT_NOT_FOUND", "math, support"),
        (b'{"input": ', 400, "INVALID_PARAMETER_VALUE", "not valid JSON"),
        (b'{"input": 5}', 400, "INVALID_PARAMETER_VALUE", "$.input"),
        (b'{"input": ""}', 400, "INVALID_PARAMETER_VALUE", "empty"),
        (b'{"input": []}', 400, "INVALID_PARAMETER_VALUE", "empty"),
        (b'{"messages": []}', 400, "INVALID_PARAMETER_VALUE", "empty"),
        (b"{}", 400, "INVALID_PARAMETER_VALUE", "input"),
        (b'{"input": "x", "messages": []}', 400, "INVALID_PARAMETER_VALUE", "either"),
        (b'{"input": "x", "inputs": "y"}', 400, "INVALID_PARAMETER_VALUE", "inputs"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "INVALID_PARAMETER_VALUE", "messages[0]"),
        (b'{"input": "x", "session_id": "with space"}', 400, "INVALID_PARAMETER_VALUE", "session_id"),
        (b"\xff\xfe", 400, "INVALID_PARAMETER_VALUE", "not valid JSON"),
    ],
)
async def test_bad_input_is_refused_and_leaves_nothing(serve, make_settings, rows, body, status, code, hint) -> None:
    """A body that cannot be run is answered with what is wrong with it, and no table has a row of it."""
    async with serve(make_settings()) as client:
        answer = await client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error_code"] == code
    assert hint in answer.json()["message"]
    for table in ("sessions", "session_turns", "runs", "outbox"):
        assert rows(f"SELECT count(*) FROM {table}") == [(0,)]


async def test_another_content_type_is_refused(serve, make_settings) -> None:
    """A body that does not claim to be JSON is answered with 415."""
    async with serve(make_settings()) as client:
        answer = await client.post("/invocations", content=b"a=b", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error_code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_nothing_anyone_wrote_is_readable_in_the_database(serve, make_settings, database_url, rows) -> None:
    """History and traces are encrypted, ids that are personal are hashed: no table's bytes hold what was written."""
    secrets = ("ann.lee@example.com", "+1-202-555-0173", "4111 1111 1111 1111", "sk-abcdefghijklmnop1234", "kettle")
    text = f"My kettle: {', '.join(secrets[:4])}. What is 12 plus 30?"
    async with serve(make_settings()) as client:
        answer = await client.post(
            "/invocations", json=ask(text, session_id="s-ann.lee@example.com", user="ann.lee@example.com")
        )
        assert answer.json()["session_id"] == "s-ann.lee@example.com"
    tables = ("sessions", "session_turns", "runs", "outbox", "procrastinate_jobs")
    stored = "".join(str(rows(f"SELECT encode(t::text::bytea, 'escape') FROM {table} t")) for table in tables)
    stored += str(rows("SELECT items FROM session_turns")) + str(rows("SELECT payload FROM outbox"))
    assert "session-" in stored  # the positive control: the hashed id of the session is found
    assert not [secret for secret in secrets if secret in stored]


async def test_an_unsampled_session_is_counted_and_not_kept(serve, make_settings, rows) -> None:
    """With a sample rate of 0 and no tail rule the run is answered and in the ledger, and no trace is in the outbox."""
    async with serve(make_settings(sample_rate=0.0, tail_rules=())) as client:
        answer = await client.post("/invocations", json=ask("12 + 30"))
    assert answer.json()["sampled"] is False
    assert rows("SELECT state, status FROM runs") == [("sampled_out", "ok")]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_every_run_has_one_row_in_the_ledger(serve, make_settings, rows) -> None:
    """Runs that were answered are pending in the ledger once the app has stopped, none missing."""
    async with serve(make_settings()) as client:
        answers = await asyncio.gather(*(client.post("/invocations", json=ask(f"{n} + 1")) for n in range(40)))
    served = {answer.json()["trace_id"] for answer in answers}
    assert {row[0] for row in rows("SELECT trace_id FROM runs WHERE state = 'pending'")} == served
    assert {row[0] for row in rows("SELECT trace_id FROM outbox")} == served


@pytest.fixture
def agents_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write an agents folder with one agent, and return it."""

    def write(name: str, agent: str, offline: str | None = None) -> Path:
        folder = tmp_path / "agents" / name
        folder.mkdir(parents=True)
        (folder / "agent.py").write_text(dedent(agent))
        if offline:
            (folder / "offline.py").write_text(dedent(offline))
        return folder.parent

    return write


@pytest.fixture
def adder(agents_folder: Callable[..., Path]) -> Path:
    """An agents folder with one agent that has no offline model."""
    return agents_folder("adder", MATH_PLUGIN)


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
async def test_a_configured_model_answers_over_either_api(serve, make_settings, adder, api) -> None:
    """With a key and a model set, the model behind the OpenAI API answers, and the agent's tools are offered to it."""

    def script(body: dict[str, Any]) -> Any:
        asked_before = json.dumps(body).count("add") > json.dumps(body["tools"]).count("add")
        return "It is 42." if asked_before else [ToolCall("add", {"a": 12, "b": 30})]

    with ScriptedOpenAI(script) as model:
        overrides = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": model.url}
        settings = make_settings(agents_dir=adder, model="scripted-1", model_api=api, **overrides)
        async with serve(settings) as client:
            answer = (
                await client.post("/invocations", json={"messages": [{"role": "user", "content": "12+30"}]})
            ).json()
            version = (await client.get("/version")).json()
    assert answer["choices"][0]["message"]["content"] == "It is 42."
    assert answer["usage"]["total_tokens"] == 30
    assert answer["offline"] is False
    assert version["agents"]["adder"]["model"] == "scripted-1"
    assert len(model.requests) == 2


async def test_a_failed_run_leaves_the_session_as_it_was(serve, make_settings, adder, rows) -> None:
    """When the model fails, the client gets 502, the session keeps its earlier turns only, and the trace is kept."""
    replies: list[Any] = ["Fine.", HttpError(400, "the prompt said: hunter22"), "Fine again."]
    with ScriptedOpenAI(lambda _body: replies.pop(0)) as model:
        overrides = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": model.url}
        settings = make_settings(agents_dir=adder, model="scripted-1", **overrides)
        async with serve(settings) as client:
            await client.post("/invocations", json=ask("one", session_id="s"))
            failed = await client.post("/invocations", json=ask("two", session_id="s"))
            await client.post("/invocations", json=ask("three", session_id="s"))
        asked = json.dumps(model.requests[-1]["input"])
    assert (failed.status_code, failed.json()["error_code"]) == (502, "MODEL_ERROR")
    assert "hunter22" not in failed.text
    assert "one" in asked
    assert "three" in asked
    assert "two" not in asked
    assert rows("SELECT turns FROM sessions") == [(2,)]
    assert rows("SELECT status FROM runs ORDER BY started_at") == [("ok",), ("error",), ("ok",)]


async def test_a_first_run_that_fails_leaves_no_session(serve, make_settings, adder, rows) -> None:
    """A new session whose first run fails is not there afterwards."""
    with ScriptedOpenAI(lambda _body: HttpError(400)) as model:
        overrides = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": model.url}
        async with serve(make_settings(agents_dir=adder, model="scripted-1", **overrides)) as client:
            await client.post("/invocations", json=ask("one", session_id="s"))
    assert rows("SELECT count(*) FROM sessions") == [(0,)]


async def test_a_handoff_that_rewrites_the_history_keeps_the_turn(serve, make_settings, agents_folder) -> None:
    """Where a handoff filters what the next agent sees, the answer is whole and the next turn sees this one."""
    agents = agents_folder(
        "desk",
        """
        from agents import Agent, handoff
        from agents.extensions import handoff_filters

        closer = Agent(name="closer")
        agent = Agent(name="desk", handoffs=[handoff(closer, input_filter=handoff_filters.remove_all_tools)])
        """,
        """
        import itertools

        from gateway.runs.offline import Call, OfflineModel

        calls = itertools.count()

        def decide(view):
            return Call("transfer_to_closer") if next(calls) % 2 == 0 else " ".join(view.user_texts)

        model = OfflineModel(decide)
        """,
    )
    async with serve(make_settings(agents_dir=agents)) as client:
        first = (await client.post("/invocations", json=ask("one", session_id="s"))).json()
        second = (await client.post("/invocations", json=ask("two", session_id="s"))).json()
    assert first["output"][-1]["content"][0]["text"] == "one"
    assert second["output"][-1]["content"][0]["text"] == "one two"


async def test_a_run_that_takes_too_long_is_ended(serve, make_settings, agents_folder, rows) -> None:
    """A run beyond its time is answered with 504, and its session is free and unchanged."""
    agents = agents_folder(
        "sleeper",
        """
        import asyncio
        from agents import Agent, function_tool

        @function_tool
        async def wait() -> str:
            "Wait."
            await asyncio.Event().wait()
            return ""

        agent = Agent(name="sleeper", tools=[wait])
        """,
        """
        from gateway.runs.offline import Call, OfflineModel

        model = OfflineModel(lambda view: Call("wait"))
        """,
    )
    settings = make_settings(agents_dir=agents, run_timeout_s=0.3)
    async with serve(settings) as client:
        answer = await client.post("/invocations", json=ask("go", session_id="s"))
    assert (answer.status_code, answer.json()["error_code"]) == (504, "RUN_TIMEOUT")
    assert rows("SELECT count(*) FROM sessions") == [(0,)]
    assert rows("SELECT status, state FROM runs") == [("error", "pending")]


async def test_probes_tell_what_is_running_and_how_it_is(serve, make_settings) -> None:
    """`/ping` answers at once, `/version` names versions and models, `/health` names the parts that are away."""
    async with serve(make_settings(mlflow_port=1)) as client:
        ping = await client.get("/ping")
        version = (await client.get("/version")).json()
        health = await client.get("/health")
    assert ping.json()["status"] == "Healthy"
    assert version["agents"]["math"]["offline"] is True
    assert version["mlflow"].startswith("3.")
    assert health.status_code == 200
    assert health.json()["status"] == "degraded"
    assert health.json()["degraded"] == ["mlflow", "evaluator"]
    assert "gateway worker" in health.json()["parts"]["evaluator"]["detail"]


async def test_unknown_addresses_and_methods_are_answered_as_json(serve, make_settings) -> None:
    """A wrong address or method gets a JSON error that says where the API is described."""
    async with serve(make_settings()) as client:
        missing = await client.get("/nothing/here")
        wrong = await client.get("/invocations")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "ENDPOINT_NOT_FOUND")
    assert (wrong.status_code, wrong.json()["error_code"]) == (405, "METHOD_NOT_ALLOWED")


def test_an_agent_without_any_model_is_refused_at_start(make_settings: Callable[..., Any], adder: Path) -> None:
    """An agent with neither a model nor an offline model fails the start with what to set."""
    from gateway.app import create_app  # noqa: PLC0415 - only here

    with pytest.raises(ConfigurationError, match="GATEWAY_MODEL and OPENAI_API_KEY"):
        create_app(make_settings(agents_dir=adder))
