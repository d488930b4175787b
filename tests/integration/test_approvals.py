"""Tools that need a person's approval: the run waits in the database, and goes on once, wherever the answer comes."""

import asyncio
from typing import Any

from .runs import (
    Web,
    approvals,
    begun,
    clerk,
    decided,
    desk,
    events,
    headers,
    refusal,
    say,
    serving,
    text,
    traces,
)


async def asked(client: Web, words: str = "refund A-1", session: str | None = "s", **fields: object) -> list[str]:
    """Send a turn that pauses and return the ids of the approvals that it waits for."""
    found = approvals(await say(client, words, session, **fields))
    assert found
    return found


async def test_an_approved_call_is_carried_out_in_another_process_after_a_restart(make_settings, rows) -> None:
    """The answer asks for the approval and nothing is done; approved elsewhere and later, the call is carried out."""
    settings = desk(make_settings)
    async with serving(settings) as client:
        answer = await say(client, "note first, refund A-1", "s")
        request = answer.json()["output"][-1]
        assert request["type"] == "mcp_approval_request"
        assert (request["name"], request["arguments"]) == ("refund", '{"what": "A-1"}')
        assert answer.json()["approval_requests"][0]["id"] == request["id"]
        assert clerk().done == ["first"]
    async with serving(settings) as client:
        resumed = await decided(client, request["id"])
        assert resumed.json()["session_id"] == "s"
        kept = [item["type"] for item in resumed.json()["output"]]
        assert (kept, text(resumed)) == (["function_call_output", "message"], "noted first and refunded A-1")
        assert text(await say(client, "and now?", "s")) == "2: and now?"
    assert clerk().done == ["first", "refund A-1"]
    assert rows("SELECT count(*) FROM paused_runs") == [(0,)]
    assert rows("SELECT turn, continues FROM session_turns ORDER BY turn") == [(1, False), (2, True), (3, False)]


async def test_a_call_that_is_not_approved_is_not_carried_out(make_settings) -> None:
    """The model reads that the call was not approved, and why, and the run goes on."""
    async with serving(desk(make_settings)) as client:
        for reason, told in (("too expensive", "too expensive"), (None, "not approved")):
            [approval] = await asked(client)
            answer = {"approval_request_id": approval, "approve": False, "reason": reason}
            body = {"input": [{"type": "mcp_approval_response", **answer}]}
            assert told in text(await client.post("/v1/responses", json=body))
        assert clerk().done == []


async def test_all_approvals_of_a_run_are_answered_together(make_settings) -> None:
    """One of two answers is refused and uses nothing up; together, each decision counts for its own call."""
    async with serving(desk(make_settings)) as client:
        first, second = await asked(client, "refund A-1, cancel A-2")
        [other] = await asked(client, "refund A-3", "t")
        assert refusal(await decided(client, first)) == (400, "invalid_parameter_value")
        assert refusal(await decided(client, first, second, other)) == (404, "approval_not_found")
        body = [
            {"approval_request_id": first, "approve": False, "reason": "no"},
            {"approval_request_id": second, "approve": True},
        ]
        resumed = await client.post("/v1/responses", json={"approvals": body})
        assert text(resumed) == "no and cancelled A-2"
    assert clerk().done == ["cancel A-2"]


async def test_an_approval_used_twice_at_once_counts_once(make_settings) -> None:
    """Of twenty same answers at once over two processes exactly one runs the tool; the others get 409."""
    settings = desk(make_settings)
    async with serving(settings) as one, serving(settings) as two:
        paused = await say(one, "refund A-1", "s")
        [approval] = approvals(paused)
        ways: list[dict[str, Any]] = [{}, {"previous_response_id": paused.json()["id"]}, {"conversation": "s"}]
        same = (decided((one, two)[number % 2], approval, **ways[number % 3]) for number in range(20))
        answers = await asyncio.gather(*same)
        assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19
        assert {refusal(each) for each in answers if each.status_code != 200} == {(409, "approval_already_used")}
        assert refusal(await decided(two, approval)) == (409, "approval_already_used")
    assert clerk().done == ["refund A-1"]


async def test_a_message_instead_of_an_answer_leaves_the_call_undone(make_settings, rows) -> None:
    """When the conversation goes on, the model reads that the call was not carried out; a late answer gets 409."""
    async with serving(desk(make_settings)) as client:
        [approval] = await asked(client)
        assert text(await say(client, "never mind", "s")) == "2: never mind"
        assert "not carried out" in str(clerk().seen[-1])
        assert refusal(await decided(client, approval)) == (409, "approval_already_used")
        assert text(await say(client, "still here", "s")) == "3: still here"
    assert clerk().done == []
    assert rows("SELECT count(*) FROM paused_runs") == [(0,)]
    assert rows("SELECT count(*) FROM runs") == [(3,)]


async def test_an_answer_waits_for_the_turn_of_its_session(make_settings) -> None:
    """An answer that names the paused response while its session is busy waits, and is then refused as too late."""
    async with serving(desk(make_settings)) as client:
        paused = await say(client, "refund A-1", "s")
        busy = say(client, "wait", "s")
        await begun()
        answer = decided(client, *approvals(paused), previous_response_id=paused.json()["id"])
        clerk().gate.set()
        assert (await busy).status_code == 200
        assert refusal(await answer) == (409, "approval_already_used")


async def test_a_run_may_pause_again_and_again(make_settings) -> None:
    """A resumed run that wants another approval pauses anew, and its earlier approval stays used."""
    async with serving(desk(make_settings, default_agent="bystander")) as client:
        [first] = await asked(client, "loop, refund A-1", model="clerk")
        again = await decided(client, first)
        [second] = approvals(again)
        assert again.json()["agent"] == "clerk"
        third = await decided(client, second)
        assert approvals(third)
        assert refusal(await decided(client, first)) == refusal(await decided(client, second))
        assert refusal(await decided(client, second)) == (409, "approval_already_used")
    assert clerk().done.count("refund A-1") == 2


async def test_a_paused_run_stays_its_agents(make_settings) -> None:
    """An answer that names no agent goes to the one that paused, in its trace too; one that names another gets 400."""
    settings = desk(make_settings, default_agent="bystander")
    async with serving(settings) as client:
        [approval] = await asked(client, model="clerk")
        assert refusal(await decided(client, approval, model="bystander")) == (400, "invalid_parameter_value")
        resumed = await client.post("/invocations", json={"approvals": [answer(approval)]})
        assert (text(resumed), resumed.json()["agent"]) == ("refunded A-1", "clerk")
    assert [trace.agent for trace in traces(settings).values()] == ["clerk", "clerk"]


def answer(approval: str) -> dict[str, Any]:
    """Return the approval as the gateway's own field has it."""
    return {"approval_request_id": approval, "approve": True}


async def test_the_chat_form_asks_and_is_answered_by_fields_of_its_own(make_settings) -> None:
    """In chat form the approval stands beside the completion, and the answer in the field `approvals`; streamed too."""
    async with serving(desk(make_settings)) as client:
        chat = {"messages": [{"role": "user", "content": "refund A-1"}]}
        paused = (await client.post("/v1/chat/completions", json=chat)).json()
        [request] = paused["approval_requests"]
        assert (request["tool"], paused["choices"][0]["finish_reason"]) == ("refund", "stop")
        resumed = await client.post("/v1/chat/completions", json={"messages": [], "approvals": [answer(request["id"])]})
        assert resumed.json()["choices"][0]["message"]["content"] == "refunded A-1"
        chunks = events(await client.post("/v1/chat/completions", json=chat | {"stream": True}))
        [request] = next(chunk["approval_requests"] for chunk in chunks if "approval_requests" in chunk)
        body = {"messages": [], "approvals": [answer(request["id"])], "stream": True}
        chunks = events(await client.post("/v1/chat/completions", json=body))
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert said == "refunded A-1"
    assert clerk().done == ["refund A-1"] * 2


async def test_pause_and_resume_are_streamed(make_settings) -> None:
    """A stream that pauses ends with the approval as an item; the resumed one has the tool's output and the answer."""
    async with serving(desk(make_settings)) as client:
        paused = events(await say(client, "refund A-1", "s", stream=True))
        whole = paused[-1]["response"]
        assert (paused[-1]["type"], whole["status"]) == ("response.completed", "completed")
        added = [event["item"] for event in paused if event["type"] == "response.output_item.done"]
        assert added == whole["output"]
        assert [item["type"] for item in added] == ["function_call", "mcp_approval_request"]
        resumed = events(await decided(client, added[-1]["id"], stream=True))
        shown = [item["type"] for item in resumed[-1]["response"]["output"]]
        assert shown == ["function_call_output", "message"]
        deltas = [event["delta"] for event in resumed if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == "refunded A-1"


async def test_a_resumed_run_that_fails_uses_its_approval_up(make_settings, rows) -> None:
    """Nobody knows how far it came, so it cannot be tried again; the session goes on as if nobody had answered."""
    async with serving(desk(make_settings)) as client:
        for number, stream in enumerate((True, False)):
            [approval] = await asked(client, "refund boom")
            failed = await decided(client, approval, stream=stream)
            assert (events(failed)[-1]["type"] == "response.failed") if stream else failed.status_code == 500
            assert refusal(await decided(client, approval)) == (409, "approval_already_used")
            assert rows("SELECT turns, turn_owner FROM sessions") == [(2 * number + 1, None)]
            assert text(await say(client, "hello", "s")).endswith(": hello")
    assert clerk().done == ["refund boom"] * 2


async def test_pause_and_resume_are_two_whole_traces_of_one_session(make_settings) -> None:
    """Each request has a trace of its own: the first ends with the open call, the second has the tool's output."""
    settings = desk(make_settings)
    async with serving(settings) as client:
        paused = await say(client, "refund A-1", "s")
        resumed = await decided(client, *approvals(paused))
    first, second = traces(settings).values()
    assert [first.trace_id, second.trace_id] == [paused.json()["trace_id"], resumed.json()["trace_id"]]
    assert (first.session_id, second.session_id) == ("s", "s")
    assert not [span for span in first.spans if span.kind == "TOOL" and span.outputs]
    assert first.spans[0].outputs["messages"][0]["tool_calls"][0]["function"]["name"] == "refund"
    assert [(span.name, span.outputs) for span in second.spans if span.kind == "TOOL"] == [("refund", "refunded A-1")]
    assert second.spans[0].outputs == {"messages": [{"role": "assistant", "content": "refunded A-1"}]}
    assert not [span for span in (*first.spans, *second.spans) if span.error]
    before, after = paused.json()["usage"], resumed.json()["usage"]
    assert before["total_tokens"] > 0 < after["total_tokens"]


async def test_a_paused_run_is_encrypted(make_settings, rows) -> None:
    """Neither what was said nor what the tool is to do can be read in any table while a run waits."""
    async with serving(desk(make_settings)) as client:
        await asked(client, "refund kettle-4711")
    tables = [row[0] for row in rows("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")]
    stored = "".join(
        str(rows(f"SELECT encode(convert_to(t::text, 'UTF8'), 'escape') FROM {name} t")) for name in tables
    )
    stored += str(rows("SELECT snapshot FROM paused_runs")) + str(rows("SELECT items FROM session_turns"))
    assert "clerk" in stored  # the positive control: the agent's name is found
    assert "kettle" not in stored
    assert b"kettle".hex() not in stored


async def test_an_approval_belongs_to_the_key_of_its_session(make_settings) -> None:
    """For another key, and in another session, there is no such approval; its owner can use it afterwards."""
    settings = desk(make_settings)
    ann, bob = await headers(settings, "ann", "bob")
    async with serving(settings) as client:
        body = {"input": "refund A-1", "conversation": "s"}
        [approval] = approvals(await client.post("/v1/responses", json=body, headers=ann))
        use = {"approvals": [answer(approval)]}
        foreign = [
            await client.post("/v1/responses", json=use, headers=bob),
            await client.post("/v1/responses", json=use | {"conversation": "s"}, headers=bob),
            await client.post("/v1/chat/completions", json=use | {"messages": []}, headers=bob),
            await client.post("/v1/responses", json=use | {"conversation": "t"}, headers=ann),
        ]
        assert [refusal(each) for each in foreign] == [(404, "approval_not_found")] * 4
        assert clerk().done == []
        assert text(await client.post("/v1/responses", json=use, headers=ann)) == "refunded A-1"
