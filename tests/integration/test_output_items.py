"""The items of a response: referred to by their ids, and the agent's own tool calls shown or hidden."""

import json
from typing import Any

import pytest


def events(stream: str) -> list[dict[str, Any]]:
    """Return the JSON of a stream's events."""
    lines = (line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


async def test_an_item_of_a_stored_response_can_be_sent_by_its_id(serve, make_settings) -> None:
    """A reference stands for the item, so a client that sends references goes on with the conversation."""
    async with serve(make_settings()) as client:
        first = (await client.post("/v1/responses", json={"model": "math", "input": "What is 15% of 240?"})).json()
        references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
        question = {"role": "user", "content": "And times 3?"}
        again = await client.post("/v1/responses", json={"model": "math", "input": [*references, question]})
        unknown = {"type": "item_reference", "id": first["output"][0]["id"][:-1] + "7"}
        refused = await client.post("/v1/responses", json={"model": "math", "input": [unknown, question]})
    assert again.json()["output"][-1]["content"][0]["text"] == "108"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[0].id")


@pytest.mark.parametrize("by_setting", [True, False])
async def test_the_agents_own_tool_calls_can_be_hidden(serve, make_settings, by_setting) -> None:
    """Hidden by the setting or by the request, a response and its stream have the message alone, with places from 0."""
    settings = make_settings(show_tool_calls=not by_setting)
    body = {"model": "math", "input": "What is 15% of 240?"} | ({} if by_setting else {"show_tool_calls": False})
    async with serve(settings) as client:
        whole = (await client.post("/v1/responses", json=body)).json()
        streamed = events((await client.post("/v1/responses", json={**body, "stream": True})).text)
    assert [item["type"] for item in whole["output"]] == ["message"]
    assert {event["output_index"] for event in streamed if "output_index" in event} == {0}
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    assert [item["type"] for item in streamed[-1]["response"]["output"]] == ["message"]


async def test_the_clients_own_calls_are_shown_all_the_same(serve, make_settings) -> None:
    """A call that the client is to make is in the answer although the agent's own are hidden."""
    weather = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "math", "input": "What is the weather?", "tools": [weather], "show_tool_calls": False}
    async with serve(make_settings()) as client:
        answer = (await client.post("/v1/responses", json=body)).json()
    assert [(item["type"], item["name"]) for item in answer["output"]] == [("function_call", "get_weather")]
