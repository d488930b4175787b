"""What becomes of runs, traces and sessions when web processes are told to stop under load, and when one is killed."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .conftest import eventually
from .web import Web, Wire, ask, double, events, results, running

STOPPING = b"The gateway is stopping. Send the request again."


@pytest.fixture(scope="module")
def webs(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Web]]:
    """Three web processes on one database."""
    settings = {"GATEWAY_SHUTDOWN_GRACE_S": "3", "GATEWAY_STREAM_KEEPALIVE_S": "0.2"}
    with running(tmp_path_factory.mktemp("webs"), postgres_url, *[settings] * 3) as three:
        yield three


async def test_sessions_go_on_when_a_process_is_killed(webs: list[Web]) -> None:
    """After a kill -9 another process goes on with each session, no turn is lost or doubled, and responses fail."""
    victim, other, _ = webs
    other.ask("1 + 0", "math", session_id="shared")
    background = victim.api.post("/v1/responses", json={"model": "worker", "input": "wait cut", "background": True})
    with victim.post(ask("wait held", session_id="held")) as holder:
        victim.await_note("held", "begun")
        victim.await_note("cut", "begun")
        asked = [(web, asyncio.create_task(double(web, "shared"))) for _ in range(25) for web in (victim, other)]
        await asyncio.to_thread(other.await_row, "SELECT 1 FROM sessions WHERE session_id = 'shared' AND turns > 5")
        victim.process.kill()
        assert holder.read_all() == b""

    other.ask("say 1", session_id="held")
    assert len(other.history("held")) == 1
    assert other.api.get(f"/v1/responses/{background.json()['id']}").json()["status"] == "failed"

    answers = [(web, await task) for web, task in asked]
    assert (victim, None) in answers
    assert (other, None) not in answers
    answered = {answer for _, answer in answers if answer}
    assert len(answered) == len([answer for _, answer in answers if answer])
    turns = results(other.history("shared"))
    assert turns == [2**power for power in range(len(turns))]
    assert answered <= set(turns[1:])


def requests(port: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return addresses and bodies of everything that a process may be at, by the name of its tool and its session."""

    def body(name: str, tool: str = "wait", **fields: object) -> dict[str, Any]:
        return {"model": "worker", "input": f"{tool} {port}-{name}", "session_id": f"{port}-{name}", **fields}

    chat = body("chat", stream=True)
    chat["messages"] = [{"role": "user", "content": chat.pop("input")}]
    return {
        "short": ("/invocations", body("short")),
        "short-stream": ("/invocations", body("short-stream", stream=True)),
        "long": ("/invocations", body("long")),
        "resist": ("/invocations", body("resist", "resist")),
        "block": ("/invocations", body("block", "block")),
        "stream": ("/invocations", body("stream", stream=True)),
        "response": ("/v1/responses", body("response", stream=True)),
        "chat": ("/v1/chat/completions", chat),
        "background": ("/v1/responses", body("background", background=True)),
    }


def begin(web: Web, stack: ExitStack) -> dict[str, Wire]:
    """Have all of it under way in a process, a request that waits in line and an idle connection as well."""
    wires = {name: web.post(body, path) for name, (path, body) in requests(web.port).items()}
    for name in wires:
        web.await_note(f"{web.port}-{name}", "begun")
    wires["queued"] = web.post(requests(web.port)["long"][1])
    web.await_row("SELECT 1 FROM session_waiters WHERE session_id = %s", f"{web.port}-long")
    wires["idle"] = web.connect()
    for wire in wires.values():
        stack.enter_context(wire)
    return wires


def refuses(web: Web) -> bool:
    """Whether a process takes no more connections."""
    try:
        web.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_stop_under_load_leaves_nobody_without_an_answer(webs: list[Web]) -> None:
    """Told to stop, processes let short runs finish, end the others with an error, and keep every run and its trace."""
    stopping = webs[1:]
    with ExitStack() as stack:
        loads = [(web, begin(web, stack)) for web in stopping]
        for web in stopping:
            web.process.terminate()
        for web in stopping:
            eventually(lambda web=web: refuses(web))
            web.give(f"{web.port}-short")
            web.give(f"{web.port}-short-stream")
        answers = [(web, {name: wire.read_all() for name, wire in wires.items()}) for web, wires in loads]
    assert [web.process.wait(30) for web in stopping] == [0, 0]

    for web, answer in answers:
        assert b" 200 OK" in answer["short"]
        assert b'"status":"completed"' in answer["short"]
        assert events(answer["short-stream"])[-1] == "response.completed"
        for name in ("long", "resist", "block", "queued"):
            assert answer[name].startswith(b"HTTP/1.1 503"), answer[name]
            assert STOPPING in answer[name]
        for name in ("stream", "response", "chat"):
            assert STOPPING in answer[name]
            assert b"data: [DONE]" in answer[name]
        assert [events(answer[name])[-1] for name in ("stream", "response")] == ["response.failed"] * 2
        assert b'"in_progress"' in answer["background"]
        assert answer["idle"] == b""
        assert web.noted(f"{web.port}-long") == ["begun", "cancelled"]

        mine = f"^{web.port}-"
        runs = web.rows("SELECT session_id, status FROM runs JOIN outbox USING (trace_id) WHERE session_id ~ %s", mine)
        short = [f"{web.port}-short", f"{web.port}-short-stream"]
        cut = [f"{web.port}-{name}" for name in (*requests(web.port), "long") if "short" not in name]
        assert sorted(runs) == sorted([*((name, "ok") for name in short), *((name, "error") for name in cut)])
        kept = web.rows("SELECT session_id, turns, turn_owner FROM sessions WHERE session_id ~ %s", mine)
        assert sorted(kept) == [(name, 1, None) for name in short]
        stored = web.rows("SELECT status FROM responses WHERE session_id ~ %s", mine)
        assert stored == [("failed",), ("failed",)]
