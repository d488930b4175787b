"""The second destination: kept traces at a real OTLP receiver, over HTTP."""

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gateway.crypto import load_keys
from gateway.evaluation.otlp import OtlpSender
from gateway.storage.database import open_pool
from gateway.tracing.spans import Span, SpanError, encode

from .evaluating import evaluator, fill, made, url_of

CALLER = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


class Collector:
    """A receiver of OTLP; it can be told to answer with another status, to refuse a text, or to fail on one."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.refused: bytes | None = None
        self.poison: bytes | None = None
        self.while_asked: Callable[[], object] = lambda: None
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(collector.take(body, dict(self.headers)))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def take(self, body: bytes, headers: dict[str, str]) -> int:
        """Take a request and return the status."""
        self.while_asked()
        if self.poison and self.poison in body:
            return 503
        if self.refused and self.refused in body:
            return 400
        if self.status == 200:
            self.headers.append(headers)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(plain(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return self.status


def plain(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span, an event or a resource."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in holder.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A running collector."""
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture
async def sending(make_settings, collector, rows) -> Any:
    """Settings with the collector as second destination, and a function that sends what waits."""
    settings = make_settings(otlp_endpoint=collector.url, otlp_headers={"x-key": "secret"}, mlflow_experiment="otlp")

    async def send() -> bool:
        rows("UPDATE otlp_outbox SET retry_at = now() RETURNING 1")
        headers = {name: value.get_secret_value() for name, value in settings.otlp_headers.items()}
        async with (
            open_pool(url_of(settings), max_size=2, name="otlp") as pool,
            httpx.AsyncClient(headers=headers) as client,
        ):
            return await OtlpSender(settings, load_keys(settings), pool).send_waiting(client)

    return settings, send


def waiting(settings: Any, rows: Any, *traces: Any) -> None:
    """Put traces where the intake leaves them for the second destination."""
    fill(settings, *traces)
    cipher = load_keys(settings).outbox
    for trace in traces:
        payload = cipher.encrypt(encode(trace), trace.trace_id)
        rows("INSERT INTO otlp_outbox (trace_id, payload) VALUES (%s, %s) RETURNING 1", trace.trace_id, payload)


async def test_a_trace_arrives_by_the_conventions_once_mlflow_has_it(sending, mlflow_uri, collector, rows) -> None:
    """Ids, parents, kinds, status and the conventions' attributes; the caller's trace goes on in ours."""
    settings, send = sending
    trace = made("s-1", traceparent=f"00-{CALLER[0]}-{CALLER[1]}-01", tracestate="vendor=1")
    root, call = trace.spans
    tool = Span(
        "c" * 16, root.span_id, "add", "TOOL", root.start_ns, root.end_ns, {"a": 1}, None, {}, SpanError("E", "no")
    )
    trace.spans.append(tool)
    fill(settings, trace)
    async with evaluator(settings, mlflow_uri, scorers=[]) as parts:
        await parts.intake.drain()
    assert await send()
    assert rows("SELECT count(*) FROM otlp_outbox") == [(0,)]
    assert collector.resources[0]["service.name"] == "agent-gateway"
    assert {name.lower(): value for name, value in collector.headers[0].items()}["x-key"] == "secret"
    sent = {span.span_id.hex(): span for span in collector.spans}
    assert {span.trace_id.hex() for span in collector.spans} == {CALLER[0]}
    ours = [sent[each.span_id] for each in (root, call, tool)]
    assert [span.parent_span_id.hex() for span in ours] == [CALLER[1], root.span_id, root.span_id]
    assert [span.name for span in ours] == ["invoke_agent math", "chat gpt-4o-mini", "execute_tool add"]
    assert [(span.kind, span.status.code) for span in ours] == [(2, 0), (3, 0), (1, 2)]
    assert (ours[0].start_time_unix_nano, ours[0].end_time_unix_nano) == (root.start_ns, root.end_ns)
    assert ours[0].trace_state == "vendor=1"
    about, of_call, of_tool = (plain(span) for span in ours)
    assert about["gateway.trace_id"] == trace.trace_id
    assert (about["gen_ai.agent.name"], about["gen_ai.conversation.id"], about["user.id"]) == ("math", "s-1", "u-1")
    assert of_call["gen_ai.request.model"] == "gpt-4o-mini"
    assert (of_call["gen_ai.usage.input_tokens"], of_call["gen_ai.usage.output_tokens"]) == (1000, 100)
    assert of_call["gen_ai.input.messages"] == '[{"role": "user", "parts": [{"type": "text", "content": "12 + 30"}]}]'
    assert "You calculate." in of_call["gen_ai.system_instructions"]
    assert not [key for key in of_call if key.startswith("mlflow.")]
    assert (of_tool["gen_ai.tool.name"], of_tool["gen_ai.tool.call.arguments"]) == ("add", '{"a": 1}')
    assert (of_tool["error.type"], plain(ours[2].events[0])["exception.message"]) == ("E", "no")


async def test_an_outage_of_the_collector_delays_nothing_but_the_sending(sending, mlflow_uri, collector, rows) -> None:
    """MLflow gets the traces meanwhile; when the collector is back, it gets each of them once."""
    settings, send = sending
    collector.status = 503
    ids = fill(settings, made("a"), made("b"))
    async with evaluator(settings, mlflow_uri, scorers=[]) as parts:
        await parts.intake.drain()
        assert len(parts.store.read_traces(ids)) == 2
    for status in (503, 401, 429):
        collector.status = status
        assert not await send()
    assert rows("SELECT attempts, retry_at <= now() FROM otlp_outbox") == [(3, True)] * 2
    collector.status = 200
    assert await send()
    roots = [plain(span) for span in collector.spans if plain(span)["gateway.kind"] == "AGENT"]
    assert sorted(root["gateway.trace_id"] for root in roots) == sorted(ids)
    assert rows("SELECT count(*) FROM otlp_outbox") == [(0,)]


async def test_a_trace_that_is_refused_holds_up_no_other(sending, collector, rows) -> None:
    """Of a batch that the collector refuses, all get through but the one that is to blame."""
    settings, send = sending
    waiting(settings, rows, made("a"), made("b", "indigestible"), made("c"))
    collector.refused = b"indigestible"
    assert await send()
    assert {plain(span)["gen_ai.conversation.id"] for span in collector.spans} == {"a", "c"}
    assert rows("SELECT count(*) FROM otlp_outbox") == [(0,)]


async def test_a_trace_that_the_collector_fails_on_holds_up_no_other_for_long(sending, collector, rows) -> None:
    """After some attempts the others get through without it, and it makes way for those that come later."""
    settings, send = sending
    waiting(settings, rows, made("a"), poison := made("b", "poisonous"), made("c"))
    collector.poison = b"poisonous"
    rows("UPDATE otlp_outbox SET attempts = 4 RETURNING 1")
    assert not await send()
    assert collector.spans == []
    assert await send()
    assert {plain(span)["gen_ai.conversation.id"] for span in collector.spans} == {"a", "c"}
    assert rows("SELECT trace_id, retry_at > now() FROM otlp_outbox") == [(poison.trace_id, True)]


async def test_what_is_forgotten_after_it_was_claimed_is_not_sent(sending, collector, rows) -> None:
    """A trace that goes while another of its batch is refused is left out when the batch is sent one by one."""
    settings, send = sending
    waiting(settings, rows, made("a", "indigestible"), gone := made("b"), made("c"))
    collector.refused = b"indigestible"
    collector.while_asked = lambda: rows("DELETE FROM otlp_outbox WHERE trace_id = %s RETURNING 1", gone.trace_id)
    assert await send()
    assert {plain(span)["gen_ai.conversation.id"] for span in collector.spans} == {"c"}


async def test_what_waited_for_a_day_is_given_up(sending, collector, rows) -> None:
    """After 24 hours without the collector a trace is dropped, and a younger one is not."""
    settings, send = sending
    collector.status = 503
    old, young = made("old"), made("young")
    waiting(settings, rows, old, young)
    rows("UPDATE otlp_outbox SET created_at = now() - interval '25 h' WHERE trace_id = %s RETURNING 1", old.trace_id)
    assert not await send()
    assert rows("SELECT trace_id FROM otlp_outbox") == [(young.trace_id,)]
