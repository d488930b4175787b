"""The client of the models: what it sends is what OpenAI's own would send."""

import json
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from gateway.runs.clients import PlainClient

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "grüß Gott"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
]
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "output": [], "status": "completed",
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
}  # fmt: skip
COMPLETION = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}],
}  # fmt: skip


class _Place(BaseModel):
    city: str


async def sent(client_class: type[AsyncOpenAI], *, api: str, **fields: Any) -> tuple[dict[str, Any], Any]:
    """Return the body that a client sends, and what it makes of the answer."""
    bodies = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return httpx2.Response(200, json=RESPONSE if api == "responses" else COMPLETION)

    transport = httpx2.MockTransport(answer)
    async with client_class(
        api_key="k", base_url="http://model/v1", http_client=httpx2.AsyncClient(transport=transport)
    ) as client:
        create = client.responses.create if api == "responses" else client.chat.completions.create
        result = await create(model="m", **fields)
    return bodies[0], result


@pytest.mark.parametrize(
    ("api", "fields"),
    [
        ("responses", {"input": ITEMS, "tools": [TOOL], "temperature": 0.5, "metadata": {"a": "b"}}),
        ("responses", {"input": "a text", "instructions": "be short"}),
        ("responses", {"input": ITEMS, "extra_body": {"seed": 1}}),
        ("responses", {"input": [{"role": "user", "content": "x", "place": _Place(city="Rome")}]}),
        ("chat", {"messages": MESSAGES, "tools": [CHAT_TOOL], "max_tokens": 5}),
        ("chat", {"messages": MESSAGES, "extra_body": {"top_k": 3}}),
    ],
)
async def test_the_same_request_as_the_original(api: str, fields: dict[str, Any]) -> None:
    """Conversation, tools, settings and extras arrive as OpenAI's own client sends them, and the answer is typed."""
    original, expected = await sent(AsyncOpenAI, api=api, **fields)
    plain, result = await sent(PlainClient, api=api, **fields)
    assert plain == original
    assert type(result) is type(expected)
    assert result == expected
