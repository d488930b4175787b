"""The clients that people use, as they are, against a web process: OpenAI's SDK, LangChain, MLflow's, plain HTTP."""

import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any, NamedTuple

import httpx
import openai
import psycopg
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from gateway.settings import sibling_database
from gateway.storage.api_keys import create_key
from gateway.storage.database import create_database, migrate
from gateway.testing import HttpError, Slow, ToolCall

from .client_servers import Model, web_process
from .conftest import ROOT, eventually

QUESTION = "What is 15% of 240?"
WEATHER = "What's the weather like in Paris?"
CHAT: Any = [{"role": "user", "content": QUESTION}]
IMAGE = "data:image/png;base64,iVBORw0KGgo="
AGENT = """
from agents import Agent, function_tool

@function_tool
async def stock(item: str) -> str:
    "How many of it there are."
    return f"3 of {item}"

agent = Agent(name="clerk", model="scripted-1", tools=[stock])
"""
PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string", "description": "A city"}},
    "required": ["location"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS, "strict": True}
TOOLS: Any = [{"type": "function", **FUNCTION}]
CHAT_TOOLS: Any = [{"type": "function", "function": FUNCTION}]
RESPONSE_FIELDS = frozenset(
    {"id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"}
    | {"instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"}
    | {"presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "store"}
    | {"max_output_tokens", "max_tool_calls", "background", "service_tier", "metadata", "safety_identifier"}
    | {"prompt_cache_key"}
)
"""What a response must have by the Open Responses specification."""


class Sum(BaseModel):
    """The answer in a form."""

    result: float
    steps: list[str]


@tool
def get_weather(location: str) -> str:
    """The weather in a city."""
    return f"sunny in {location}"


class Served(NamedTuple):
    """A running web process, and keys for it."""

    url: str
    key: str
    small_key: str
    """For the agent `math`, once a minute."""


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The language model behind the agent `clerk`."""
    with Model() as server:
        yield server


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, postgres_url: str, model: Model) -> AsyncIterator[Served]:
    """A web process with the example agents and `clerk`, whose language model the tests direct."""
    home = tmp_path_factory.mktemp("clients")
    shutil.copytree(ROOT / "agents", home / "agents")
    (home / "agents" / "clerk").mkdir()
    (home / "agents" / "clerk" / "agent.py").write_text(AGENT)
    create_database(postgres_url, "clients")
    database = sibling_database(postgres_url, "clients")
    migrate(database)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        key = await create_key(connection, "app", ["invoke"], None, None, None, None)
        small_key = await create_key(connection, "guest", ["invoke"], ["math"], None, 1, None)
    settings = {
        "GATEWAY_DATABASE_URL": database,
        "GATEWAY_AGENTS_DIR": str(home / "agents"),
        "GATEWAY_DEFAULT_AGENT": "math",
        "GATEWAY_STREAM_KEEPALIVE_S": "0.1",
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": model.url,
    }
    with web_process(home, **settings) as url:
        yield Served(url, key, small_key)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    """OpenAI's client, which does not try again."""
    with OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as made:
        yield made


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain client."""
    headers = {"Authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30) as made:
        yield made


@cache
def form(kind: Any) -> TypeAdapter[Any]:
    """Return what holds data against a type of the SDK, which itself takes whatever it gets."""
    return TypeAdapter(kind)


def user(content: Any) -> dict[str, Any]:
    """Return a user's message as an item."""
    return {"type": "message", "role": "user", "content": content}


def events_of(stream: str) -> list[dict[str, Any]]:
    """Return the data of a stream's events, read by hand; each named event must have the name as its type."""
    *blocks, last, rest = stream.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    found = []
    for block in (block for block in blocks if not block.startswith(":")):
        *name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name in ([], [f"event: {found[-1].get('type')}"])
    return found


def checked(events: list[Any]) -> Response:
    """Return the response that a stream ends with; the events before must be in order and tell the same."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    created, in_progress, *told, completed = events
    kinds = ("response.created", "response.in_progress", "response.completed")
    assert (created.type, in_progress.type, completed.type) == kinds
    assert created.response.id == in_progress.response.id == completed.response.id
    output = completed.response.output
    assert len({item.id for item in output}) == len(output)
    begun = [event.output_index for event in told if event.type == "response.output_item.added"]
    assert begun == list(range(len(output)))
    for index, item in enumerate(output):
        added, *texts, done = (event for event in told if event.output_index == index)
        assert (added.type, done.type) == ("response.output_item.added", "response.output_item.done")
        assert {added.item.id, done.item.id, *(event.item_id for event in texts)} == {item.id}
        assert done.item.to_dict() == item.to_dict()
        assert "".join(event.delta for event in texts if event.type.endswith(".delta")) == _text_of(item)
    return completed.response


def _text_of(item: Any) -> str:
    if item.type == "message":
        return "".join(part.text for part in item.content)
    return item.arguments if item.type == "function_call" else ""


def skip_to(lines: Iterator[str], text: str) -> None:
    """Read lines up to the first with that text."""
    next(line for line in lines if text in line)


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ([user("Say hello in exactly 3 words.")], ["message"]),
        ([{"type": "message", "role": "system", "content": "You are a pirate."}, user("Say hello.")], ["message"]),
        ([user([{"type": "input_text", "text": "Look!"}, {"type": "input_image", "image_url": IMAGE}])], ["message"]),
        ([user("I'm Al."), {"type": "message", "role": "assistant", "content": "Hi!"}, user("Who?")], ["message"]),
        ([user(WEATHER)], ["function_call"]),
        (QUESTION, ["function_call", "function_call_output", "message"]),
    ],
    ids=["text", "system", "image", "turns", "tool", "own tools"],
)
def test_responses_have_the_specified_form(http: httpx.Client, asked: Any, kinds: list[str]) -> None:
    """Every response has all fields of the specification, and OpenAI's types take it and its stream's every event."""
    body = {"model": "math", "input": asked, "tools": TOOLS if kinds == ["function_call"] else []}
    answer = http.post("/v1/responses", json=body).json()
    events = events_of(http.post("/v1/responses", json=body | {"stream": True}).text)
    form(Response).validate_python(answer)
    for event in events:
        form(ResponseStreamEvent).validate_python(event)
    for response in (answer, events[-1]["response"]):
        assert response.keys() >= RESPONSE_FIELDS
        assert response["status"] == "completed"
        assert [item["type"] for item in response["output"]] == kinds


@pytest.mark.parametrize("asked", [QUESTION, WEATHER, "(2 + 3) * 4 - 5", "Hello!"])
def test_a_stream_tells_each_item_in_order(client: OpenAI, asked: str) -> None:
    """A stream's events are numbered without a gap, each item begins, grows and ends, and the end has it all."""
    events = list(client.responses.create(model="math", input=asked, tools=TOOLS, stream=True))
    response = checked(events)
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()


def test_calls_at_once(client: OpenAI, model: Model) -> None:
    """Calls made at once are streamed one by one; the agent's own is run, those of the client are handed over."""
    model.answers["Both."] = [
        ToolCall("get_weather", {"location": "Paris"}),
        ToolCall("stock", {"item": "umbrellas"}),
        ToolCall("get_weather", {"location": "Rome"}),
    ]
    with client.responses.stream(model="clerk", input="Both.", tools=TOOLS) as stream:
        events = list(stream)
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather", "stock", "get_weather"]
    assert [item.type for item in events[-1].response.output] == ["function_call"] * 3 + ["function_call_output"]
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": weather}
        for call, weather in zip(calls[::2], ("sunny", "wet"), strict=True)
    ]
    after = client.responses.create(
        model="clerk", input=outputs, tools=TOOLS, previous_response_id=events[-1].response.id
    )
    assert after.output_text == "The tools said 3 of umbrellas and sunny and wet."


def test_the_helper_for_streams(client: OpenAI) -> None:
    """The SDK's stream helper gathers the text, and ends with what can be fetched later."""
    with client.responses.stream(model="math", input=QUESTION) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    stored = client.responses.retrieve(final.id)
    assert "".join(texts) == final.output_text == stored.output_text == "36"
    assert [item.id for item in final.output] == [item.id for item in stored.output]
    assert final.usage == stored.usage


async def test_the_asynchronous_client(served: Served) -> None:
    """The asynchronous client answers, streams and parses like the other."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as client:
        assert (await client.responses.create(model="math", input=QUESTION)).output_text == "36"
        stream = await client.responses.create(model="math", input=QUESTION, stream=True)
        assert checked([event async for event in stream]).output_text == "36"
        parsed = await client.responses.parse(model="math", input=QUESTION, text_format=Sum)
        assert parsed.output_parsed == Sum(result=36, steps=["36"])
        chat = await client.chat.completions.create(model="math", messages=CHAT)
        assert chat.choices[0].message.content == "36"
        assert [model.id async for model in client.models.list()] == ["clerk", "math", "support"]


def test_what_was_asked_is_in_the_response(client: OpenAI) -> None:
    """A response repeats the request's fields, and its headers name the request and the session."""
    asked: Any = {
        "instructions": "Be brief.",
        "metadata": {"order": "A-1001"},
        "temperature": 0.5,
        "max_output_tokens": 100,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "get_weather"},
        "tools": TOOLS,
        "user": "ann",
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    raw = client.responses.with_raw_response.create(model="math", input=QUESTION, **asked)
    response = raw.parse()
    assert response.to_dict().items() >= asked.items()
    assert response.model == "math"
    assert response._request_id == raw.headers["x-request-id"]
    assert response.session_id == raw.headers["x-session-id"]


def test_what_was_not_asked_has_its_default(http: httpx.Client) -> None:
    """Fields that are null are as good as absent, also those that are refused otherwise."""
    unset = ("max_tool_calls", "prompt", "store", "conversation", "reasoning", "tool_choice")
    wanted = {"format": {"type": "json_schema", "name": "any", "schema": {"type": "object"}, "strict": None}}
    asked = {"model": "math", "input": QUESTION, "tools": [FUNCTION | {"type": "function", "strict": None}]}
    answer = http.post("/v1/responses", json=asked | {"text": wanted, **dict.fromkeys(unset)}).json()
    assert (answer["store"], answer["tool_choice"], answer["max_tool_calls"]) == (True, "auto", None)
    assert answer["text"]["format"]["strict"] is answer["tools"][0]["strict"] is False
    chat = {"model": "math", "messages": [user(QUESTION)], "stop": None, "functions": [], "logit_bias": {}}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200


@pytest.mark.parametrize("by_id", [True, False])
def test_a_tool_of_the_client(client: OpenAI, by_id: bool) -> None:
    """The client runs its tool and sends the output: after the response's id, or with the whole transcript."""
    first = client.responses.create(model="math", input=WEATHER, tools=TOOLS)
    [call] = first.output
    assert isinstance(call, ResponseFunctionToolCall)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    if by_id:
        second = client.responses.create(model="math", input=[output], previous_response_id=first.id)
    else:
        second = client.responses.create(model="math", input=[user(WEATHER), call, output], tools=TOOLS)
    assert second.output_text == "get_weather says: rain."


@pytest.mark.parametrize("choice", ["none", "required", {"type": "function", "name": "get_weather"}])
def test_the_choice_of_a_tool_reaches_the_model(client: OpenAI, model: Model, choice: Any) -> None:
    """The model is offered the client's tools beside the agent's, with the choice that the client made."""
    client.responses.create(model="clerk", input="Hi!", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    seen = model.requests[-1]
    assert [each["name"] for each in seen["tools"]] == ["stock", "get_weather"]
    assert (seen["tool_choice"], seen["parallel_tool_calls"]) == (choice, False)


def test_a_form_of_the_answer(client: OpenAI) -> None:
    """An answer that is wanted in a form is parsed into it: at once, streamed, and in chat."""
    wanted = Sum(result=36, steps=["36"])
    assert client.responses.parse(model="math", input=QUESTION, text_format=Sum).output_parsed == wanted
    with client.responses.stream(model="math", input=QUESTION, text_format=Sum) as stream:
        assert stream.get_final_response().output_parsed == wanted
    chat = client.chat.completions.parse(model="math", messages=[user(QUESTION)], response_format=Sum)
    assert chat.choices[0].message.parsed == wanted


def test_a_stored_response(client: OpenAI) -> None:
    """A response can be fetched with its input, and cancelled in vain; deleted, it is gone for all purposes."""
    made = client.responses.create(model="math", input=[user("Hello!"), user(QUESTION)])
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    assert client.responses.cancel(made.id).status == "completed"
    newest, oldest = client.responses.input_items.list(made.id, limit=1)
    assert (newest.content[0].text, oldest.content[0].text) == (QUESTION, "Hello!")
    client.responses.delete(made.id)
    for use in (client.responses.retrieve, client.responses.delete, client.responses.cancel, _follow(client)):
        with pytest.raises(openai.NotFoundError, match=made.id):
            use(made.id)


def _follow(client: OpenAI) -> Any:
    return lambda response_id: client.responses.create(model="math", input="And?", previous_response_id=response_id)


def test_what_is_not_stored_cannot_be_used(client: OpenAI) -> None:
    """Without `store` a response is answered, and can neither be fetched nor followed."""
    made = client.responses.create(model="math", input=QUESTION, store=False)
    assert (made.output_text, made.store) == ("36", False)
    for use in (client.responses.retrieve, _follow(client)):
        with pytest.raises(openai.NotFoundError) as raised:
            use(made.id)
        assert raised.value.code == "response_not_found"


def test_two_branches_of_a_conversation(client: OpenAI) -> None:
    """Two responses that follow the same one, and those that follow them, see their own past only."""
    root = client.responses.create(model="clerk", input="root")

    def follow(text: str, before: Response) -> Response:
        return client.responses.create(model="clerk", input=text, previous_response_id=before.id)

    left, right = follow("left", root), follow("right", root)
    assert follow("leaf", left).output_text == "root / left / leaf"
    assert follow("leaf", right).output_text == "root / right / leaf"
    assert follow("late", root).output_text == "root / late"
    assert follow("again", left).previous_response_id == left.id


def test_a_conversation_by_its_id(client: OpenAI) -> None:
    """A conversation of any id goes on by that id."""
    client.responses.create(model="math", input=QUESTION, conversation="conv_by_id")
    second = client.responses.create(model="math", input="And times 3?", conversation={"id": "conv_by_id"})
    assert second.output_text == "108"
    assert second.conversation is not None
    assert second.conversation.id == "conv_by_id"


def test_a_response_in_the_background(client: OpenAI, model: Model) -> None:
    """A background response is answered at once, and fetched until it is done."""
    model.answers["Slowly."] = Slow("Done.", gate := threading.Event())
    made = client.responses.create(model="clerk", input="Slowly.", background=True)
    assert made.status == client.responses.retrieve(made.id).status == "in_progress"
    gate.set()
    done = eventually(lambda: _if_done(client.responses.retrieve(made.id)))
    assert (done.status, done.output_text, done.background) == ("completed", "Done.", True)


def _if_done(response: Response) -> Response | None:
    return None if response.status == "in_progress" else response


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_response(client: OpenAI, model: Model, stream: bool) -> None:
    """A background response that is cancelled is so at once, for who streams it as for who fetches it."""
    model.answers["Hang."] = Slow("one two", after=1)
    made: Any = client.responses.create(model="clerk", input="Hang.", background=True, stream=stream)
    response_id = next(made).response.id if stream else made.id
    assert client.responses.cancel(response_id).status == "cancelled"
    assert client.responses.retrieve(response_id).status == "cancelled"
    if stream:
        assert [*made][-1].response.status == "cancelled"


@pytest.mark.parametrize(
    ("asked", "error", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
        ({"input": ""}, openai.BadRequestError, "invalid_parameter_value", "input"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_parameter_value", "temperature"),
        ({"max_tool_calls": 1}, openai.BadRequestError, "invalid_parameter_value", "max_tool_calls"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "invalid_parameter_value", "tools[0].type"),
        ({"input": [{"role": "robot"}]}, openai.BadRequestError, "invalid_parameter_value", "input[0].role"),
        ({"previous_response_id": "resp_0"}, openai.NotFoundError, "response_not_found", "previous_response_id"),
    ],
)
def test_errors_are_the_clients_own(client: OpenAI, asked: Any, error: Any, code: str, param: str | None) -> None:
    """What is refused raises the SDK's own error, which names the code, the field and the request."""
    with pytest.raises(error) as raised:
        client.responses.create(**({"model": "math", "input": QUESTION} | asked))
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.request_id == raised.value.body["request_id"]


def test_an_approval_by_the_client(client: OpenAI) -> None:
    """A call that waits for approval is an MCP approval to the SDK; it is answered once, then there is a conflict."""
    paused = client.responses.create(model="support", input="Please cancel order A-1003.")
    asked = paused.output[-1]
    assert asked.type == "mcp_approval_request"
    answer: Any = {"type": "mcp_approval_response", "approval_request_id": asked.id, "approve": True}
    done = client.responses.create(model="support", input=[answer], previous_response_id=paused.id)
    assert "A-1003" in done.output_text
    with pytest.raises(openai.ConflictError) as raised:
        client.responses.create(model="support", input=[answer], previous_response_id=paused.id)
    assert raised.value.code == "approval_already_used"


def test_keys_and_limits(served: Served) -> None:
    """A wrong key, a key that may not and a key that is used up raise errors of their own."""

    def client(api_key: str) -> OpenAI:
        return OpenAI(base_url=f"{served.url}/v1", api_key=api_key, max_retries=0)

    guest = client(served.small_key)
    with pytest.raises(openai.AuthenticationError) as wrong:
        client("wrong").models.list()
    assert wrong.value.code == "unauthenticated"
    assert [each.id for each in guest.models.list()] == ["math"]
    with pytest.raises(openai.PermissionDeniedError):
        guest.responses.create(model="support", input="Hello!")
    assert guest.responses.create(model="math", input=QUESTION).output_text == "36"
    with pytest.raises(openai.RateLimitError) as limited:
        guest.responses.create(model="math", input=QUESTION)
    assert limited.value.code == "rate_limited"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def test_the_client_tries_again(client: OpenAI, model: Model) -> None:
    """After a failure of the model the SDK's own retry is answered, as if nothing had been."""
    model.answers["Fragile."] = HttpError(400)
    patient = client.with_options(max_retries=1)
    answer = patient.responses.create(model="clerk", input="Fragile.", conversation="conv_retry")
    after = patient.responses.create(model="clerk", input="Next.", conversation="conv_retry")
    assert (answer.output_text, after.output_text) == ("Fragile.", "Fragile. / Next.")


def test_a_failure_in_a_stream(client: OpenAI, model: Model) -> None:
    """A run that fails while it streams ends a Responses stream with `response.failed`, and raises in a chat."""
    model.answers["Fail."] = HttpError(400)
    *_, last = client.responses.create(model="clerk", input="Fail.", stream=True)
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "model_error")
    model.answers["Fail."] = HttpError(400)
    with pytest.raises(openai.APIError) as raised:
        list(client.chat.completions.create(model="clerk", messages=[user("Fail.")], stream=True))
    assert raised.value.code == "model_error"


def test_models_are_agents(client: OpenAI) -> None:
    """The models that are listed, and can be fetched, are the agents."""
    assert [each.id for each in client.models.list()] == ["clerk", "math", "support"]
    assert client.models.retrieve("math").id == "math"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_chat_with_tools(client: OpenAI) -> None:
    """A chat's client runs its tool and sends the whole transcript."""
    chat: list[Any] = [{"role": "system", "content": "Be brief."}, user(WEATHER)]
    asked = client.chat.completions.create(model="math", messages=chat, tools=CHAT_TOOLS)
    form(ChatCompletion).validate_python(asked.to_dict())
    choice = asked.choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    chat += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    done = client.chat.completions.create(model="math", messages=chat, tools=CHAT_TOOLS)
    assert done.choices[0].message.content == "get_weather says: rain."
    assert done.choices[0].finish_reason == "stop"
    chat += [done.choices[0].message, user(QUESTION)]
    assert client.chat.completions.create(model="math", messages=chat).choices[0].message.content == "36"


@pytest.mark.parametrize("asked", [QUESTION, WEATHER])
def test_a_streamed_chat(client: OpenAI, asked: str) -> None:
    """A chat's chunks are of one completion, end with a reason and then the usage, and add up to the message."""
    body: Any = {"model": "math", "messages": [user(asked)], "tools": CHAT_TOOLS}
    whole = client.chat.completions.create(**body).choices[0]
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        form(ChatCompletionChunk).validate_python(chunk.to_dict())
    *told, ended, usage = chunks
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert (usage.choices, usage.usage.total_tokens > 0) == ([], True)
    assert ended.choices[0].finish_reason == whole.finish_reason
    assert told[0].choices[0].delta.role == "assistant"
    assert {chunk.choices[0].finish_reason for chunk in told} == {None}
    with client.chat.completions.stream(**body) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.content or None) == whole.message.content
    assert [call.function.arguments for call in message.tool_calls or ()] == [
        call.function.arguments for call in whole.message.tool_calls or ()
    ]


def langchain_model(served: Served, **options: Any) -> ChatOpenAI:
    """Return LangChain's model for the agent `math`."""
    return ChatOpenAI(model="math", base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, **options)


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def langchain(request: pytest.FixtureRequest, served: Served) -> ChatOpenAI:
    """LangChain's model, over either API."""
    return langchain_model(served, use_responses_api=request.param)


async def test_langchain_asks_in_every_way(langchain: ChatOpenAI) -> None:
    """LangChain gets the same answer at once, streamed, and in a batch, and counts its tokens."""
    answer = langchain.invoke(QUESTION)
    assert answer.text == "36"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.text for chunk in langchain.stream(QUESTION)) == "36"
    assert "".join([chunk.text async for chunk in langchain.astream(QUESTION)]) == "36"
    assert [each.text for each in langchain.batch(["1 + 1", "2 + 2", "3 + 3"])] == ["2", "4", "6"]


def test_langchain_keeps_the_conversation_itself(langchain: ChatOpenAI) -> None:
    """A list of messages, of which the answers are LangChain's own, goes on with the conversation."""
    chat: list[Any] = [HumanMessage(QUESTION)]
    for asked, expected in (("And times 3?", "108"), ("Add 2 to that", "110")):
        chat += [langchain.invoke(chat), HumanMessage(asked)]
        assert langchain.invoke(chat).text == expected


@pytest.mark.parametrize("streamed", [True, False])
def test_langchain_runs_its_tools(langchain: ChatOpenAI, streamed: bool) -> None:
    """LangChain is handed the calls of its tools, and answered once their outputs are in the messages."""
    bound = langchain.bind_tools([get_weather])

    def answer(chat: list[Any]) -> AIMessage:
        if not streamed:
            return bound.invoke(chat)
        chunks: list[AIMessageChunk] = list(bound.stream(chat))  # type: ignore[arg-type]
        return sum(chunks[1:], chunks[0])

    chat: list[Any] = [HumanMessage(WEATHER)]
    called = answer(chat)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("get_weather", {"location": "Paris"})]
    chat += [called, *(get_weather.invoke(call) for call in called.tool_calls)]
    assert answer(chat).text == "get_weather says: sunny in Paris."


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_wants_a_form(langchain: ChatOpenAI, method: Any) -> None:
    """A structured answer is of the class that LangChain asked for."""
    answer = langchain.with_structured_output(Sum, method=method).invoke("What is the sum of 20 and 16?")
    assert isinstance(answer, Sum)
    assert method == "function_calling" or answer == Sum(result=36, steps=["36"])


def test_langchain_follows_a_response(served: Served) -> None:
    """LangChain can leave the history to the gateway and send the new message alone."""
    model = langchain_model(served, use_previous_response_id=True)
    first = model.invoke([HumanMessage(QUESTION)])
    assert model.invoke([HumanMessage(QUESTION), first, HumanMessage("And times 3?")]).text == "108"


@pytest.mark.parametrize(
    ("body", "predictions"),
    [
        (
            {"dataframe_split": {"columns": ["input", "user"], "data": [[QUESTION, "ann"], ["1 + 1", None]]}},
            ["36", "2"],
        ),
        ({"dataframe_records": [{"question": QUESTION}, {"question": "1 + 1"}]}, ["36", "2"]),
        ({"instances": [QUESTION, {"input": "1 + 1"}]}, ["36", "2"]),
        ({"inputs": {"question": [QUESTION, "1 + 1"]}}, ["36", "2"]),
        ({"inputs": [QUESTION], "params": {"agent": "math"}}, ["36"]),
        ({"inputs": QUESTION}, ["36"]),
    ],
)
def test_a_batch(http: httpx.Client, body: dict[str, Any], predictions: list[str]) -> None:
    """Every form of MLflow's scoring server is answered with a prediction a row."""
    assert http.post("/invocations", json=body).json() == {"predictions": predictions}


def test_a_batch_of_conversations(http: httpx.Client) -> None:
    """A row that is a conversation is answered with an object in its own form."""
    rows = [{"messages": CHAT}, {"input": [user(QUESTION)]}]
    completion, response = http.post("/invocations", json={"dataframe_records": rows}).json()["predictions"]
    assert form(ChatCompletion).validate_python(completion).choices[0].message.content == "36"
    assert form(Response).validate_python(response).output_text == "36"


def test_the_types_of_mlflow(http: httpx.Client) -> None:
    """MLflow's own types make requests that are taken, and take what is answered and streamed."""
    from mlflow.types.responses import (  # noqa: PLC0415 - it takes seconds
        ResponsesAgentRequest,
        ResponsesAgentResponse,
        ResponsesAgentStreamEvent,
    )

    context = {"conversation_id": "mlflow-1", "user_id": "ann"}
    asked = ResponsesAgentRequest(input=[user(QUESTION)], context=context, custom_inputs={"tone": "dry"}).model_dump()
    answer = http.post("/invocations", json=asked).json()
    assert ResponsesAgentResponse(**answer).output[-1].content[0]["text"] == "36"
    assert answer["session_id"] == "mlflow-1"
    events = events_of(http.post("/invocations", json=asked | {"stream": True}).text)
    assert [ResponsesAgentStreamEvent(**event).type for event in events][-1] == "response.completed"


@pytest.mark.parametrize("body", [{"input": QUESTION}, {"messages": CHAT}], ids=["input", "messages"])
def test_the_trace_is_told_on_request(http: httpx.Client, body: dict[str, Any]) -> None:
    """With MLflow's header the trace's id is in the answer's metadata, and in an event before a stream's end."""
    headers = {"x-mlflow-return-trace-id": "true"}
    answer = http.post("/invocations", json=body, headers=headers).json()
    assert answer["metadata"]["trace_id"] == answer["trace_id"]
    *_, last = events_of(http.post("/invocations", json=body | {"stream": True}, headers=headers).text)
    assert last.keys() == {"trace_id"}
    assert "trace_id" not in (http.post("/invocations", json=body).json().get("metadata") or {})


def test_every_name_of_a_session(http: httpx.Client) -> None:
    """A session goes on by its id, in whichever field or header that is sent."""
    ways: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"session_id": "one"}, {}),
        ({"conversation": "one"}, {}),
        ({"context": {"conversation_id": "one"}}, {}),
        ({}, {"X-Session-Id": "one"}),
        ({}, {"X-Amzn-Bedrock-AgentCore-Runtime-Session-Id": "one"}),
    ]
    http.post("/invocations", json={"input": "1 + 0", "session_id": "one"})
    for turn, (fields, headers) in enumerate(ways, 1):
        answer = http.post("/invocations", json={"input": "double that", **fields}, headers=headers)
        assert answer.json()["output"][-1]["content"][0]["text"] == str(2**turn)
        assert answer.json()["session_id"] == answer.headers["x-session-id"] == "one"


@pytest.mark.parametrize("path", ["/invocations", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_sent_twice(http: httpx.Client, path: str, stream: bool) -> None:
    """The same idempotency key gets the same bytes under the same headers, and the turn is there once."""
    session = f"twice{path.replace('/', '-')}-{stream}"
    http.post("/invocations", json={"input": "1 + 0", "session_id": session})
    body = {"input": "double that", "session_id": session, "stream": stream}
    first, second = (http.post(path, json=body, headers={"Idempotency-Key": session}) for _ in range(2))
    assert first.content == second.content
    assert second.headers["idempotent-replayed"] == "true"
    for name in ("content-type", "cache-control", "x-session-id"):
        assert first.headers.get(name) == second.headers.get(name)
    last = http.post("/invocations", json=body | {"stream": False}).json()
    assert last["output"][-1]["content"][0]["text"] == "4"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_a_silent_stream_is_kept_alive(http: httpx.Client, model: Model, path: str) -> None:
    """While the model is silent the stream brings comments; what comes after it is whole, and not gathered up."""
    model.answers["Wait."] = Slow("one two three", gate := threading.Event(), after=1)
    body = {"model": "clerk", "stream": True, "input" if path == "/v1/responses" else "messages": [user("Wait.")]}
    with http.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()
        skip_to(lines, '"one "')
        skip_to(lines, ": keep-alive")
        gate.set()
        skip_to(lines, '"two "')
        assert [*lines][-2:] == ["data: [DONE]", ""]


def test_who_leaves_a_stream_ends_the_run(http: httpx.Client, model: Model) -> None:
    """A client that closes its stream cancels the model's call, and the session is as it was."""
    model.answers["Leave."] = Slow("one two", after=1)
    body = {"agent": "clerk", "input": "Leave.", "session_id": "left"}
    cancelled = model.cancelled
    with http.stream("POST", "/invocations", json=body | {"stream": True}) as answer:
        skip_to(answer.iter_lines(), '"one "')
    assert eventually(lambda: model.cancelled > cancelled)
    again = http.post("/invocations", json=body | {"input": "Back."})
    assert again.json()["output"][-1]["content"][0]["text"] == "Back."
