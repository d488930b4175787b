"""Between Responses items and chat messages: both ways, and nothing that matters is lost on the way."""

import pytest
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseOutputText,
)

from gateway.tracing.messages import answer, from_items, text_of, to_items


def call_item(call_id: str, name: str = "add", arguments: str = '{"a": 1}') -> dict:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def call(call_id: str, name: str = "add", arguments: str = '{"a": 1}') -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_text():
    """A text is one user message, below the instructions if there are any."""
    assert from_items("hi") == [{"role": "user", "content": "hi"}]
    assert from_items("hi", "Be kind.") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
    ]


CONVERSATION_ITEMS = [
    {"role": "developer", "content": "Use tools."},
    {"role": "user", "content": "1 + 1 and 2 + 2?"},
    {"role": "assistant", "content": "Let me see."},
    call_item("c1"),
    call_item("c2", arguments='{"a": 2}'),
    {"type": "function_call_output", "call_id": "c1", "output": "2"},
    {"type": "function_call_output", "call_id": "c2", "output": "4"},
    {"role": "assistant", "content": "2 and 4"},
]
CONVERSATION_CHAT = [
    {"role": "developer", "content": "Use tools."},
    {"role": "user", "content": "1 + 1 and 2 + 2?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [call("c1"), call("c2", arguments='{"a": 2}')]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
    {"role": "tool", "tool_call_id": "c2", "content": "4"},
    {"role": "assistant", "content": "2 and 4"},
]


def test_conversation_both_ways():
    """A conversation with parallel tool calls reads the same in both forms, and survives the way there and back."""
    assert from_items(CONVERSATION_ITEMS) == CONVERSATION_CHAT
    assert to_items(CONVERSATION_CHAT) == CONVERSATION_ITEMS


def test_call_without_text():
    """Parallel calls with no text before them make one assistant message without content."""
    chat = from_items([{"role": "user", "content": "go"}, call_item("c1"), call_item("c2")])
    assert chat[1:] == [{"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2")]}]
    assert to_items(chat)[1:] == [call_item("c1"), call_item("c2")]


def test_calls_of_two_steps_stay_apart():
    """Calls with a result in between belong to two messages."""
    items = [call_item("c1"), {"type": "function_call_output", "call_id": "c1", "output": "2"}, call_item("c2")]
    assert [message["role"] for message in from_items(items)] == ["assistant", "tool", "assistant"]
    assert to_items(from_items(items)) == items


def test_input_is_left_alone():
    """Converting changes neither form it was given."""
    before = repr(CONVERSATION_ITEMS), repr(CONVERSATION_CHAT)
    from_items(CONVERSATION_ITEMS)
    to_items(CONVERSATION_CHAT)
    assert (repr(CONVERSATION_ITEMS), repr(CONVERSATION_CHAT)) == before


def test_sdk_objects():
    """What the SDK hands over as objects reads like the dicts."""
    message = ResponseOutputMessage(
        id="m", role="assistant", status="completed", type="message",
        content=[ResponseOutputText(text="Let me see.", type="output_text", annotations=[])],
    )  # fmt: skip
    tool = ResponseFunctionToolCall(call_id="c1", name="add", arguments='{"a": 1}', type="function_call")
    expected = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("c1")]}
    assert from_items([message, tool]) == [expected]
    assert answer([message, tool]) == expected


def test_refusal():
    """A refusal is the answer's text."""
    refused = ResponseOutputMessage(
        id="m", role="assistant", status="completed", type="message",
        content=[ResponseOutputRefusal(refusal="I cannot.", type="refusal")],
    )  # fmt: skip
    assert answer([refused]) == {"role": "assistant", "content": "I cannot."}


def test_answer_of_nothing():
    """No output, or thoughts alone, is an answer without content."""
    assert answer([]) == {"role": "assistant", "content": None}
    assert answer([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}])["content"] is None


def test_reasoning_is_no_message():
    """A model's thoughts are no part of the conversation, and do not split its calls."""
    chat = from_items([call_item("c1"), {"type": "reasoning", "summary": []}, call_item("c2")])
    assert chat == [{"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2")]}]


def test_unknown_item():
    """An item of a type that chat has no form for is kept as its JSON, so that it shows in the trace."""
    (message,) = from_items([{"type": "web_search_call", "id": "w1", "status": "completed"}])
    assert message["role"] == "assistant"
    assert '"web_search_call"' in message["content"]


def test_content_parts_to_items():
    """Chat's content parts become those of Responses: text by who said it, images with their address or data."""
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": "data:image/png;base64,AAAA"},
        {"type": "input_text", "text": "already one"},
    ]
    (item,) = to_items([{"role": "user", "content": parts}])
    assert item["content"] == [
        {"type": "input_text", "text": "what is this?"},
        {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
        {"type": "input_text", "text": "already one"},
    ]
    (said,) = to_items([{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}])
    assert said["content"] == [{"type": "output_text", "text": "a cat"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("text", "text"),
        ([], ""),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "x"}], "see\n[input_image]"),
        ([{"type": "input_text", "text": ""}, {"type": "input_text", "text": None}], ""),
        (["plain", 3], "plain\n3"),
        ({"sum": 3}, '{"sum": 3}'),
    ],
)
def test_text_of(content, expected):
    """The text of a content is its text parts, with a mark in place of what is none."""
    assert text_of(content) == expected


def test_tool_output_parts():
    """A tool's output in parts reads as its text, in both directions."""
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert from_items([{"type": "function_call_output", "call_id": "c", "output": parts}])[0]["content"] == "a\nb"
    (item,) = to_items([{"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}]}])
    assert item == {"type": "function_call_output", "call_id": "c", "output": "a"}


def test_empty_tool_output():
    """A tool that returned nothing is still answered: each call needs its output."""
    (item,) = to_items([{"role": "tool", "tool_call_id": "c", "content": ""}])
    assert item["output"] == ""
