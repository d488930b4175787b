"""Clients that leave, stall, crowd in or send what nobody asked for, over real sockets to real web processes."""

import asyncio
import copy
import json
import random
import resource
import select
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gateway.testing import ScriptedOpenAI, Slow

from .conftest import eventually
from .web import Web, Wire, ask, double, events, head, request, results, running

LEAVING = [Wire.close, Wire.reset, Wire.half_close]
DATABASE_POOL = 10
LEFT = "The client closed the connection before the answer was complete."


class Model(ScriptedOpenAI):
    """A language model over HTTP that answers what it is asked by what was laid down for it."""

    def __init__(self) -> None:
        super().__init__(lambda body: self.replies[body["input"][-1]["content"]])
        self.replies: dict[str, Any] = {}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The language model behind the agent `talker`."""
    with Model() as server:
        yield server


@pytest.fixture(scope="module")
def webs(postgres_url: str, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Web]]:
    """Two web processes on one database; the second lets a run go on whose client left."""
    shared = {
        "GATEWAY_BODY_TIMEOUT_S": "1",
        "GATEWAY_STREAM_KEEPALIVE_S": "0.2",
        "OPENAI_BASE_URL": model.url,
    }
    second = shared | {"GATEWAY_ON_DISCONNECT": "continue"}
    with running(tmp_path_factory.mktemp("webs"), postgres_url, shared, second) as both:
        yield both


@pytest.fixture
def web(webs: list[Web]) -> Web:
    """A web process that ends the runs of those who leave."""
    return webs[0]


@pytest.fixture
def lasting(webs: list[Web]) -> Web:
    """A web process that does not."""
    return webs[1]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", LEAVING)
def test_a_client_that_leaves_ends_its_run(web: Web, leave: Callable[[Wire], None], stream: bool) -> None:
    """However a client leaves, its tool is cancelled, its session free and its trace whole, and others are served."""
    name = f"left-{leave.__name__}-{stream}"
    with web.post(ask(f"wait {name}", session_id=name, stream=stream)) as client:
        web.await_note(name, "begun")
        if stream:
            client.read_to(b"response.function_call_arguments.done")
        web.ask("2 + 3", "math")
        leave(client)
        web.ask("say 1", session_id=name)
    assert web.noted(name) == ["begun", "cancelled"]
    cancelled, _ = web.traces(name, 2)
    assert cancelled.error is not None
    assert (cancelled.error.type, cancelled.error.message) == ("CANCELLED", LEFT)
    assert [span.kind for span in cancelled.spans] == ["AGENT", "CHAT_MODEL", "TOOL"]
    assert all(span.end_ns >= span.start_ns > 0 for span in cancelled.spans)
    assert web.rows("SELECT turns, turn_owner FROM sessions WHERE session_id = %s", name) == [(1, None)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tool", ["block", "resist"])
def test_a_tool_that_cannot_be_cancelled_holds_nobody_up(web: Web, tool: str, stream: bool) -> None:
    """A run whose tool goes on in a thread, or swallows its cancellation, ends with its client all the same."""
    name = f"{tool}-{stream}"
    with web.post(ask(f"{tool} {name}", session_id=name, stream=stream)):
        web.await_note(name, "begun")
    web.ask("say 1", session_id=name)
    assert [trace.error and trace.error.type for trace in web.traces(name, 2)] == ["CANCELLED", None]
    assert len(web.history(name)) == 1
    web.give(name)


@pytest.mark.parametrize("stream", [True, False])
def test_the_request_to_the_model_ends_with_its_client(web: Web, model: Model, stream: bool) -> None:
    """When a client leaves while the language model thinks, the model's provider sees that at once."""
    name = f"thinking-{stream}"
    model.replies[name] = Slow("One two three.", after=1)
    cancelled = model.cancelled
    with web.post(ask(name, "talker", session_id=name, stream=stream)) as client:
        eventually(lambda: name in json.dumps(model.requests))
        if stream:
            client.read_to(b"One")
    eventually(lambda: model.cancelled == cancelled + 1)
    (trace,) = web.traces(name)
    assert trace.error is not None
    assert [(span.kind, span.error is None) for span in trace.spans] == [("AGENT", False), ("CHAT_MODEL", False)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue_gives_up_its_place(web: Web, stream: bool) -> None:
    """Who leaves while waiting for a session's turn is out of the line, and what they asked is never run."""
    name = f"queue-{stream}"
    queued = "SELECT 1 FROM session_waiters WHERE session_id = %s"
    with web.post(ask(f"wait {name}", session_id=name)) as holder:
        web.await_note(name, "begun")
        with web.post(ask(f"wait {name}-second", session_id=name, stream=stream)):
            web.await_row(queued, name)
        eventually(lambda: not web.rows(queued, name))
        web.give(name)
        assert b"200 OK" in holder.read_to(b"trace_id")
    assert web.noted(f"{name}-second") == []
    assert [trace.error and trace.error.type for trace in web.traces(name, 2)] == [None, "CANCELLED"]
    assert len(web.history(name)) == 1


@pytest.mark.parametrize("leave", LEAVING)
def test_a_client_that_leaves_within_its_body_is_forgotten(web: Web, leave: Callable[[Wire], None]) -> None:
    """A request that ends before its body does begins no run and is no error of the gateway's."""
    before = web.rows("SELECT count(*) FROM runs")
    with web.connect() as client:
        client.send(head(1000) + b'{"agent": "worker", "input": "say 1')
        leave(client)
        if leave is Wire.half_close:
            client.read_all()
    web.await_idle()
    assert web.rows("SELECT count(*) FROM runs") == before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", LEAVING)
def test_a_run_may_go_on_without_its_client(lasting: Web, leave: Callable[[Wire], None], stream: bool) -> None:
    """Where runs outlive their clients, the tool ends by itself, the turn is kept and the trace is good."""
    name = f"lasting-{leave.__name__}-{stream}"
    with lasting.post(ask(f"wait {name}", session_id=name, stream=stream)) as client:
        lasting.await_note(name, "begun")
        leave(client)
        lasting.ask("2 + 3", "math")
        lasting.give(name)
        (trace,) = lasting.traces(name)
    assert lasting.noted(name) == ["begun", "done"]
    assert (trace.error, len(lasting.history(name))) == (None, 1)


@pytest.mark.parametrize(
    ("path", "named"), [("/invocations", "agent"), ("/v1/responses", "model"), ("/v1/chat/completions", "model")]
)
def test_words_leave_as_they_come(web: Web, model: Model, path: str, named: str) -> None:
    """A stream has the model's first words while the model still holds back the others, and the rest after it."""
    gate = threading.Event()
    model.replies["go on"] = Slow("First then last.", gate, after=1)
    asked = {"messages": [{"role": "user", "content": "go on"}]} if "chat" in path else {"input": "go on"}
    with web.post({named: "talker", "stream": True, **asked}, path) as client:
        begin = client.read_to(b"First")
        assert b"last" not in begin
        gate.set()
        assert b"last" in client.read_to(b"data: [DONE]")


def test_silence_is_filled_with_comments(web: Web) -> None:
    """A stream whose run says nothing for a while carries comments, so that no proxy takes it for dead."""
    with web.post(ask("wait silence", stream=True)) as client:
        for _ in range(3):
            client.read_to(b": keep-alive\n\n")
        web.give("silence")
        assert b"response.completed" in client.read_to(b"data: [DONE]")


def test_a_client_that_does_not_read_holds_up_nobody(web: Web) -> None:
    """A run whose client takes nothing off the line ends all the same, and the client can read it all later."""
    letters = 3_000_000
    with web.post(ask(f"shout {letters}", session_id="stalled", stream=True), receive_buffer=4096) as client:
        (trace,) = web.traces("stalled")
        web.await_idle()
        web.ask("2 + 3", "math")
        stream = client.read_to(b"data: [DONE]")
    assert trace.error is None
    assert len(stream) > 4 * letters
    assert events(stream)[-1] == "response.completed"


def test_clients_that_stall_and_leave_take_their_connections_along(web: Web) -> None:
    """What was kept for clients that did not read is let go when they are gone."""
    before = web.usage.num_fds()
    body = ask("shout 1000000", stream=True)
    clients = [web.post(body | {"session_id": f"gone-{n}"}, receive_buffer=4096) for n in range(20)]
    for number, client in enumerate(clients):
        assert web.traces(f"gone-{number}")[0].error is None
        client.reset()
    eventually(lambda: web.usage.num_fds() <= before + DATABASE_POOL)


def drip(client: Wire, data: bytes) -> bytes:
    """Send the same byte again and again, slowly, until the other side has had enough; return its answer."""
    try:
        while not select.select([client.socket], [], [], 0.05)[0]:
            client.send(data)
        return client.read_all()
    except OSError:
        return b""


@pytest.mark.parametrize("begun", [head(1000), head(None) + b"500\r\n"])
def test_a_body_that_never_ends_is_given_up(web: Web, begun: bytes) -> None:
    """A body that arrives byte by byte is answered with 408 when its time is over, and its connection is closed."""
    with web.connect() as client:
        client.send(begun)
        answer = drip(client, b" ")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"REQUEST_TIMEOUT" in answer
    assert b"onnection: close" in answer


def test_a_head_that_never_ends_is_given_up(web: Web) -> None:
    """A connection whose headers arrive byte by byte is closed when their time is over."""
    with web.connect() as client:
        client.send(b"POST /invocations HTTP/1.1\r\nhost: gateway\r\nx-slow: ")
        assert drip(client, b"x") == b""


def test_the_rest_of_a_refused_body_is_not_waited_for(web: Web) -> None:
    """A body that goes on after its request was refused does not keep the connection."""
    with web.connect() as client:
        client.send(head(1000, "/nothing"))
        assert client.answer()[0] == 404
        assert drip(client, b" ") == b""


TWO_WORDS = ask("say 2")
STREAM = ask("say 2", stream=True)
CHUNKED = (
    head(None) + b"10\r\n" + b'{"agent": "worke' + b"\r\n13\r\n" + b'r", "input":"say 2"' + b"\r\n1\r\n}\r\n0\r\n\r\n"
)
UPGRADE = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
WEBSOCKET = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-key": "dGhlIHNhbXBsZQ=="}


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (request(TWO_WORDS) * 3, [b"word-0 word-1"] * 3),
        (CHUNKED, [b"word-0 word-1"]),
        (request(TWO_WORDS, **UPGRADE), [b"word-0 word-1"]),
        (request(TWO_WORDS, **WEBSOCKET), [b"word-0 word-1"]),
        (request(TWO_WORDS, "/invocations", "1.0"), [b"onnection: close", b"word-0 word-1"]),
        (request(STREAM, "/invocations", "1.0"), [b"event: response.completed", b"\n\ndata: [DONE]\n\n"]),
        (request(STREAM) + request(TWO_WORDS), [b"data: [DONE]", b"HTTP/1.1 200", b"word-0 word-1"]),
        (request({"input": [{}] * 1001}), [b"HTTP/1.1 400", b"GATEWAY_MAX_INPUT_ITEMS"]),
        (head(None) + b"zz\r\n", [b"HTTP/1.1 400", b'"error_code"', b'"request_id"']),
        (head(None, "/nothing") + b"zz\r\n", [b"HTTP/1.1 40"]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", [b"HTTP/1.1 400", b'"request_id"']),
        (b"GET /ping HTTP/1.1\r\n\r\n", [b"HTTP/1.1 400"]),
        (b"GET /v1/responses/%00%ff HTTP/1.1\r\nhost: gateway\r\n\r\n", [b"HTTP/1.1 400", b"U+0000"]),
        (b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\n\r\n", [b"HTTP/1.1 404"]),
        (b"CONNECT gateway:80 HTTP/1.1\r\nhost: gateway\r\n\r\n", [b"HTTP/1.1 40"]),
    ],
)
def test_the_protocol_is_kept(web: Web, sent: bytes, answered: list[bytes]) -> None:
    """Pipelining, chunks, upgrades that are not taken and old versions are served; what is no HTTP gets a 400."""
    with web.connect() as client:
        client.send(sent)
        for part in answered:
            client.read_to(part)


LIMIT = 10_000_000


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_body_that_is_too_large_is_refused(web: Web, in_chunks: bool) -> None:
    """A byte beyond the limit is answered with 413, however the body is framed, and the connection stays good."""
    body = json.dumps(TWO_WORDS).encode()
    with web.connect() as client:
        for length in (LIMIT, LIMIT + 1, LIMIT):
            padded = body.rjust(length)
            client.send(head(None if in_chunks else length))
            client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (length, padded) if in_chunks else padded)
            status, answer = client.answer()
            assert (status, b"word-0 word-1" in answer) == ((413, False) if length > LIMIT else (200, True))


def test_a_client_may_ask_before_it_sends(web: Web) -> None:
    """A body that is announced with `Expect: 100-continue` is asked for only if it would be taken."""
    body = json.dumps(TWO_WORDS).encode()
    with web.connect() as client:
        client.send(head(len(body), expect="100-continue"))
        client.read_to(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.send(body)
        assert client.answer()[0] == 200
    with web.connect() as client:
        client.send(head(LIMIT + 1, expect="100-continue"))
        assert client.answer()[0] == 413


def test_a_huge_head_is_refused(web: Web) -> None:
    """A head of a megabyte is not taken in, and others are served."""
    with web.connect() as client:
        drip(client, b"POST /invocations HTTP/1.1\r\nx-large: " + b"x" * 1_000_000)
    web.ask("2 + 3", "math")


CROWD, GATES = 300, 10


async def test_a_crowd_of_which_half_leaves(web: Web) -> None:
    """Of 300 streams at once, those whose clients stay are whole; of the others nothing is left but the ledger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * CROWD)), hard))
    files, memory, tasks = web.usage.num_fds(), web.usage.memory_info().rss, web.tasks()
    entrance = asyncio.Semaphore(20)

    async def arrive(number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with entrance:
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            writer.write(request(ask(f"wait crowd-{number // 2 % GATES}", session_id=f"crowd-{number}", stream=True)))
            await reader.readuntil(b"response.function_call_arguments.done")
        return reader, writer

    crowd = await asyncio.gather(*map(arrive, range(CROWD)))
    for _, writer in crowd[1::2]:
        writer.transport.abort()
    for gate in range(GATES):
        web.give(f"crowd-{gate}")
        ends = await asyncio.gather(*(reader.readuntil(b"data: [DONE]") for reader, _ in crowd[::2][gate::GATES]))
        assert all(events(end)[-1] == "response.completed" for end in ends)
    for _, writer in crowd[::2]:
        writer.close()
        await writer.wait_closed()

    counted = "SELECT status, count(*), count(DISTINCT session_id) FROM runs WHERE session_id ~ '^crowd-' GROUP BY 1"
    half = CROWD // 2
    eventually(lambda: set(web.rows(counted)) == {("error", half, half), ("ok", half, half)})
    web.await_idle()
    eventually(lambda: web.usage.num_fds() <= files + DATABASE_POOL)
    eventually(lambda: web.tasks() <= tasks + 5)
    assert web.usage.memory_info().rss < memory + CROWD * 500_000


HI = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
SEEDS: list[dict[str, Any]] = [
    {"input": "hello", "agent": "worker", "session_id": "fuzzed", "user": "ann", "stream": True},
    {"model": "worker", "input": [HI, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
    {"model": "worker", "messages": [HI, {"role": "assistant", "tool_calls": [CALL]}, HI], "temperature": 0.5},
    {"inputs": [{"messages": [HI]}], "params": {"agent": "worker"}},
    {"dataframe_split": {"columns": ["input"], "data": [["hello"]]}, "params": {"agent": "worker"}},
    {"model": "worker", "previous_response_id": "resp_0", "input": [{"type": "mcp_approval_response"}]},
]
JUNK = [None, True, -1, 2**70, 1e308, "", "\0", "x" * 5000, "worker", [], {}, [[]], [None], {"type": []}, "hello"]
ADDRESSES = [
    "/invocations",
    "/responses",
    "/v1/responses",
    "/v1/responses/resp_0/cancel",
    "/v1/chat/completions",
    "/v1/sessions/fuzzed/end",
]
KINDS = ["application/json"] * 9 + ["text/plain"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every container and key below a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield value, key
        yield from places(value[key])


def mutated(rng: random.Random) -> bytes:
    """Return a body of which some things are gone, doubled, wrapped or something else."""
    whole = {"body": copy.deepcopy(rng.choice(SEEDS))}
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(list(places(whole)))
        value, field = container.pop(key), rng.choice(list(SEEDS[0]))
        others = [copy.deepcopy(rng.choice(JUNK)), [value, copy.deepcopy(value)], {field: value}]
        if isinstance(container, list):
            container[key:key] = others[: rng.randint(0, 2)]
        else:
            container[rng.choice([key, key, field])] = rng.choice(others)
    text = bytearray(json.dumps(whole.get("body")).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


async def test_a_flood_of_malformed_bodies(web: Web) -> None:
    """Whatever is posted to whichever address, the gateway does not fail, and refuses in JSON with a request id."""
    rng = random.Random(7)
    statuses = Counter[int]()

    async def send(client: httpx.AsyncClient) -> None:
        path, body, kind = rng.choice(ADDRESSES), mutated(rng), rng.choice(KINDS)
        answer = await client.post(path, content=body, headers={"content-type": kind})
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, f"{path} {body!r} {answer.text}"
        if answer.status_code != 200:
            problem = answer.json()
            request_id = problem["error"]["request_id"] if "error" in problem else problem["request_id"]
            assert request_id == answer.headers["x-request-id"]

    async def connection() -> None:
        async with httpx.AsyncClient(base_url=web.api.base_url, timeout=60) as client:
            for _ in range(200):
                await send(client)

    await asyncio.gather(*(connection() for _ in range(6)))
    assert {200, 400, 404, 415} <= set(statuses)
    web.ask("2 + 3", "math")


async def test_one_session_hammered_over_two_processes(webs: list[Web]) -> None:
    """Of 50 clients at once on one session, over two processes, no turn is lost, doubled or mixed with another."""
    webs[0].ask("1 + 0", "math", session_id="hammered")
    answers = await asyncio.gather(*(double(webs[number % 2], "hammered") for number in range(50)))
    powers = [2**power for power in range(51)]
    assert sorted(answers) == powers[1:]
    assert results(webs[0].history("hammered")) == powers
