"""What `POST /invocations` accepts, and what it says of a body that it does not."""

import copy
import json
import random

import pytest

from gateway.errors import InvalidRequest
from gateway.http.bodies import decode
from gateway.http.invocations import prepare
from gateway.http.requests import BodyRules
from gateway.runs.requests import RunRequest

HI = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def read(body: object) -> RunRequest:
    """Decode a body as the endpoint does."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return prepare(decode(raw), {}, BodyRules(1000), "anonymous")[0]


@pytest.mark.parametrize(
    ("body", "items"),
    [
        ({"input": "hi"}, [HI]),
        ({"input": [HI]}, [HI]),
        ({"input": [{"type": "message", **HI}]}, [{"type": "message", **HI}]),
        ({"messages": [HI]}, [HI]),
        ({"input": "hi", "messages": None}, [HI]),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
            [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        ),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, HI]},
            [{"role": "system", "content": "Be kind."}, HI],
        ),
        (
            {"messages": [HI, {"role": "assistant", "tool_calls": [CALL]},
                          {"role": "tool", "tool_call_id": "c1", "content": "2"}]},
            [HI, {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c1", "output": "2"}],
        ),
        (
            {"input": [HI, {"type": "reasoning", "id": "rs_1", "summary": []},
                       {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
                       {"type": "function_call", "id": "fc_1", "status": "completed",
                        "call_id": "c1", "name": "add", "arguments": "{}"},
                       {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": "2"}]},
            [HI, {"type": "reasoning", "summary": [], "encrypted_content": "x"},
             {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c1", "output": "2"}],
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]},
            [{"role": "user", "content": [
                {"type": "input_text", "text": "?"},
                {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"}]}],
        ),
    ],
)  # fmt: skip
def test_accepted_forms(body, items):
    """A text, Responses items and chat messages all become this turn's items."""
    request = read(body)
    assert [*(request.transcript or ()), *request.items] == items


def test_ids():
    """Agent, session and user are taken over as they are."""
    request = read({"input": "hi", "agent": "math", "session_id": "s-1", "user": "ann@example.com"})
    assert (request.agent, request.session_id, request.user) == ("math", "s-1", "ann@example.com")


def test_a_transcript_is_parted_from_the_new_turn():
    """Of chat messages with an assistant's among them, those up to the last of it are the history."""
    answer = {"role": "assistant", "content": "hello"}
    request = read({"messages": [HI, answer, {"role": "user", "content": "and?"}]})
    assert (request.transcript, request.items) == ([HI, answer], [{"role": "user", "content": "and?"}])
    assert read({"messages": [HI]}).transcript is None


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"session_id": "s-1"}, {}),
        ({"conversation": "s-1"}, {}),
        ({"conversation": {"id": "s-1"}}, {}),
        ({"context": {"conversation_id": "s-1"}}, {}),
        ({}, {"x-session-id": "s-1"}),
        ({}, {"x-amzn-bedrock-agentcore-runtime-session-id": "s-1"}),
        ({"session_id": "s-1"}, {"x-session-id": "s-1"}),
    ],
)
def test_the_session_may_be_named_in_several_ways(body, headers):
    """The session's id is read from the body, MLflow's context, or a header."""
    request, _ = prepare({"input": "hi", **body}, headers, BodyRules(10), "anonymous")
    assert request.session_id == "s-1"


def test_two_sessions_in_one_request_are_refused():
    """A body and a header that name different sessions are refused, and both are named."""
    with pytest.raises(InvalidRequest, match="session_id and x-session-id"):
        prepare({"input": "hi", "session_id": "a"}, {"x-session-id": "b"}, BodyRules(10), "anonymous")


def test_approvals_come_as_items_or_as_a_field():
    """A decision is read from an item of the input, or from the field that chat clients use."""
    item = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": False, "reason": "no"}
    by_item = read({"input": [dict(item)]})
    by_field = read(
        {"messages": [], "approvals": [{"approval_request_id": "mcpr_1", "approve": False, "reason": "no"}]}
    )
    assert by_item.approvals == by_field.approvals == (("mcpr_1", False, "no"),)
    assert by_item.items == by_field.items == []


def message(**fields) -> dict:
    return {"messages": [HI, fields]}


REFUSED = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"input": "\xff"}', "JSON"),
    (b'{"input": "\\ud800"}', "not valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"input": [{"a": ' + b"[" * 100_000, "JSON"),
    ([], "object"),
    ("hi", "object"),
    ({}, '"input"'),
    ({"input": "hi", "messages": [HI]}, '"input"'),
    ({"input": 5}, "$.input"),
    ({"input": ["hi"]}, "$.input"),
    ({"messages": "hi"}, "$.messages"),
    ({"messages": [["hi"]]}, "$.messages"),
    ({"input": "hi", "agent": 5}, "$.agent"),
    ({"input": "hi", "session_id": ""}, "$.session_id"),
    ({"input": "hi", "session_id": "a b"}, "$.session_id"),
    ({"input": "hi", "session_id": "x" * 201}, "$.session_id"),
    ({"input": "hi", "user": "a\nb"}, "$.user"),
    ({"input": "hi", "sesion_id": "s"}, "sesion_id"),
    ({"input": "hi", "max_tool_calls": 3}, "GATEWAY_MAX_TURNS"),
    ({"input": "hi", "agent": "a", "model": "b"}, '"agent" and "model"'),
    ({"input": "hi", "temperature": 3}, "$.temperature"),
    ({"input": "hi", "tools": [{"type": "web_search"}]}, "$.tools[0].type"),
    ({"input": "hi", "tools": [{"type": "function", "name": "a"}] * 2}, "same name"),
    ({"input": "hi", "background": True, "store": False}, '"store"'),
    ({"input": "hi", "previous_response_id": "r", "conversation": "c"}, '"previous_response_id"'),
    ({"input": [HI] * 1001}, "GATEWAY_MAX_INPUT_ITEMS"),
    ({"input": [HI, {"type": "mcp_approval_response", "approval_request_id": "a", "approve": True}]}, "by themselves"),
    ({"input": [{"type": "mcp_approval_response", "approval_request_id": "a"}]}, "approve"),
    ({"messages": [HI], "n": 2}, "$.n"),
    ({"messages": [HI], "stop": "x"}, "'stop'"),
    ({"input": ""}, "input is empty"),
    ({"input": " \n"}, "input is empty"),
    ({"input": []}, "input is empty"),
    ({"messages": []}, "input is empty"),
    ({"messages": [{"role": "user", "content": ""}]}, "input is empty"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input is empty"),
    ({"input": [HI, {"role": "bot", "content": "x"}]}, "input[1]"),
    ({"input": [HI, {"role": ["user"], "content": "x"}]}, "input[1]"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0]"),
    ({"input": [{"role": "user"}]}, "'content'"),
    ({"input": [{"role": "user", "content": 5}]}, "'content'"),
    ({"input": [{"role": "user", "content": ["hi"]}]}, "'content'"),
    ({"input": [{"role": "user", "content": [{"text": "hi"}]}]}, "'content'"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0]"),
    ({"input": [HI, {"type": "web_search"}]}, "input[1] has type"),
    ({"input": [HI, {"type": ["message"]}]}, "input[1] has type"),
    ({"input": [HI, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "'call_id'"),
    ({"input": [HI, {"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "'name'"),
    ({"input": [HI, {"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]}, "'arguments'"),
    ({"input": [HI, {"type": "function_call", "call_id": ["c"], "name": "f", "arguments": "{}"}]}, "'call_id'"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "'output'"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": {"a": 1}}]}, "'output'"),
    (message(role="bot", content="x"), "messages[1]"),
    (message(role={"a": 1}, content="x"), "messages[1]"),
    (message(content="x"), "messages[1]"),
    (message(role="user"), "'content'"),
    (message(role="assistant"), "'content'"),
    (message(role="tool", content="2"), "'tool_call_id'"),
    (message(role="tool", tool_call_id=5, content="2"), "'call_id'"),
    (message(role="assistant", tool_calls=5), "tool call"),
    (message(role="assistant", tool_calls=[5]), "tool call"),
    (message(role="assistant", tool_calls=[{"id": "c"}]), "'function'"),
    (message(role="assistant", tool_calls=[{"id": "c", "function": {"name": "f"}}]), "'arguments'"),
    (message(role="assistant", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": {}}}]), "'arguments'"),
    (message(role="assistant", tool_calls=[{"id": "c", "function": {"name": 5, "arguments": ""}}]), "'name'"),
    (message(role="user", content=[{"type": "image_url"}]), "'image_url'"),
    (message(role="user", content=[{"type": "image_url", "image_url": {"url": 5}}]), "'image_url'"),
    (message(role="user", content=[{"type": "text", "text": 5}]), "messages[1]"),
    (message(role="user", content=[{"type": "text"}]), "text"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "named"), REFUSED, ids=range(len(REFUSED)))
def test_refused(body, named):
    """A malformed body is refused with one line that names the field."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


SEEDS = [
    {"input": "hi", "agent": "math", "session_id": "s-1", "user": "u"},
    {
        "input": [
            HI,
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "2"}]},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": "x"}],
            },
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "x"}}],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]
    },
]
JUNK = [
    None,
    True,
    0,
    -1.5,
    2**70,
    1e308,
    "",
    " ",
    "message",
    "user",
    "tool",
    "🙂",
    [],
    {},
    [[]],
    [None],
    {"type": []},
    {"type": "text"},
    {"role": []},
    {"url": {}},
    {"function": None},
    [{"type": "image_url", "image_url": []}],
]


def places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) below a value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(rng: random.Random) -> bytes:
    """One of the seeds with some of its values replaced, removed, doubled or swapped, or its text damaged."""
    body = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 4)):
        if not (found := places(body)):
            break
        container, key = rng.choice(found)
        match rng.randint(0, 4):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]] * rng.randint(0, 3)
            case 2 if isinstance(container, dict):
                container[rng.choice(["type", "role", "content", "input", "x"])] = container.pop(key)
            case 3:
                other, its_key = rng.choice(found)
                container[key] = copy.deepcopy(other[its_key]) if its_key in places_keys(other) else None
            case _:
                container[key] = copy.deepcopy(rng.choice(JUNK))
    text = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def places_keys(container: object) -> object:
    return container if isinstance(container, dict) else range(len(container))


def test_fuzz():
    """Any mutation of a body is either run or refused, and what is run holds texts where a model needs texts."""
    rng = random.Random(7)
    accepted = refused = 0
    for _ in range(3_000):
        raw = mutated(rng)
        try:
            request = read(raw)
        except InvalidRequest as error:
            refused += len(str(error)) > 20
            continue
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} for {raw!r}")
        accepted += 1
        for item in request.items:
            assert isinstance(item, dict)
            keys = ("call_id", "name", "arguments") if item.get("type", "message") != "message" else ("role",)
            texts = [item[key] for key in keys if key in item and item.get("type") != "reasoning"]
            assert all(isinstance(text, str) for text in texts), raw
            content = item.get("output" if item.get("type") == "function_call_output" else "content") or ""
            assert item.get("type") == "reasoning" or isinstance(content, str | list), raw
            assert item.get("type") == "reasoning" or all(
                isinstance(part.get("type"), str) for part in content if not isinstance(content, str)
            ), raw
    assert min(accepted, refused) > 300
