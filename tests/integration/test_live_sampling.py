"""Sampling as clients and operators see it: what is kept, on whose word, and from when on."""

import asyncio

import pytest

from .runs import desk, say, text, traces

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LEDGER = "SELECT session_id, state, inclusion_probability, kept_because FROM runs ORDER BY started_at"
QUIET = {"sample_rate": 0.0, "trace_flush_s": 0.01}


@pytest.mark.parametrize(
    ("said", "stream", "rules"),
    [
        ("crash two", False, ["error", "tool_error"]),
        ("crash two", True, ["error", "tool_error"]),
        ("forbidden two", False, ["error", "guardrail"]),
        ("conjure two", False, ["error", "tool_error"]),
    ],
)
async def test_a_turn_that_goes_wrong_keeps_those_around_it(serve, make_settings, rows, said, stream, rules) -> None:
    """In a session that is not sampled, a turn that meets tail rules brings the earlier and the later turns along."""
    async with serve(desk(make_settings, **QUIET)) as client:
        await say(client, "note one", "s")
        await say(client, said, "s", stream=stream)
        await say(client, "note three", "s")
        await say(client, "note other", "t")
    found = rows(LEDGER)
    assert [(row[1], row[2], sorted(row[3])) for row in found if row[0] == "s"] == [("pending", 1.0, rules)] * 3
    assert [row[1:] for row in found if row[0] == "t"] == [("pending", 0.0, [])]
    assert rows("SELECT count(*) FROM outbox WHERE held") == [(1,)]


async def test_a_slow_turn_keeps_its_conversation(serve, make_settings, rows) -> None:
    """What is slow says the agent's own rule."""
    async with serve(desk(make_settings, agents={"clerk": {"slow_s": 1e-6}}, **QUIET)) as client:
        await say(client, "hello", "s")
        await say(client, "hello", "t", model="bystander")
    assert {row[0]: row[3] for row in rows(LEDGER)} == {"s": ["slow"], "t": []}


async def test_a_client_asks_to_keep_a_conversation(serve, make_settings, rows) -> None:
    """The header keeps the conversation, for single runs and for the rows of a batch; without it nothing is kept."""
    async with serve(desk(make_settings, **QUIET)) as client:
        await say(client, "hello", "s")
        keep = {"x-gateway-keep-trace": "true"}
        answer = await client.post("/v1/responses", json={"input": "and", "conversation": "s"}, headers=keep)
        assert answer.json()["sampled"] is False
        batch = {"inputs": [{"input": "one", "session_id": "b"}]}
        assert (await client.post("/invocations", json=batch, headers=keep)).status_code == 200
        keep["x-gateway-keep-trace"] = "false"
        await client.post("/v1/responses", json={"input": "no", "conversation": "n"}, headers=keep)
    kept = {row[0]: row[3] for row in rows(LEDGER)}
    assert kept == {"s": ["asked"], "b": ["asked"], "n": []}


async def test_a_rate_that_changes_while_it_runs(serve, make_settings, rows, tmp_path, monkeypatch) -> None:
    """A rate that is written into the settings file counts for new sessions in a moment, and not for old ones."""
    file = tmp_path / "gateway.toml"
    file.write_text("[agents.clerk]\nsample_rate = 1.0\n")
    monkeypatch.setenv("GATEWAY_CONFIG", str(file))
    async with serve(desk(make_settings, agents={"clerk": {"sample_rate": 1.0}})) as client:
        assert (await say(client, "hello", "old")).json()["sampled"] is True
        await asyncio.to_thread(file.write_text, "[agents.clerk]\nsample_rate = 0.0\n")
        async with asyncio.timeout(10):
            number = 0
            while (await say(client, "hello", f"new-{number}")).json()["sampled"]:
                number += 1
        assert (await say(client, "again", "old")).json()["sampled"] is True
    assert rows("SELECT DISTINCT kept, rate FROM sampled_sessions WHERE session_id = 'old'") == [(True, 1.0)]
    assert rows("SELECT kept, rate FROM sampled_sessions WHERE session_id = %s", f"new-{number}") == [(False, 0.0)]


async def test_the_callers_trace_is_recorded(serve, make_settings) -> None:
    """A valid `traceparent` is on the trace, whose id stays our own; an invalid one is passed over."""
    settings = desk(make_settings)
    async with serve(settings) as client:
        for header in (TRACEPARENT, "00-nonsense"):
            answer = await client.post("/v1/responses", json={"input": "hello"}, headers={"traceparent": header})
            assert text(answer)
    assert [trace.traceparent for trace in traces(settings).values()] == [TRACEPARENT, None]
    assert all(TRACEPARENT[3:35] not in trace_id for trace_id in traces(settings))


async def test_with_tracing_off_runs_are_counted_alone(serve, make_settings, rows) -> None:
    """With tracing off a run is answered and in the ledger, and nothing of what it did is stored, though it failed."""
    async with serve(desk(make_settings, tracing=False)) as client:
        assert (await say(client, "hello")).json()["sampled"] is False
        await say(client, "crash now")
    assert [(row[1], row[3]) for row in rows(LEDGER)] == [("sampled_out", [])] * 2
    assert rows("SELECT count(*) FROM outbox") == [(0,)]
