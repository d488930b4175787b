"""Nothing personal or secret is stored, sent or shown: markers of every kind go in by every route and come out nowhere.

The whole product runs as a user starts it. When all is scored, every table of both databases is read as text, and when
it has stopped, every byte below its home: tables, indexes, write-ahead log, server logs, artifacts.
"""

import base64
import gzip
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from textwrap import dedent
from urllib.parse import quote

import psycopg
import pytest

from gateway.settings import sibling_database
from gateway.storage.embedded import running_url

from .conftest import ROOT, Gateway, Judge, eventually

CONTROL = "zebra quartz forty one"
"""Nothing personal: it must be found, or the search is blind."""

PLANTED = {
    "e-mail": "marta.planted77@mail.example.org",
    "phone": "+49 1512 9876 543",
    "card": "4556 7375 8689 9855",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "SSN": "536-22-8145",
    "IPv4": "84.17.52.203",
    "IPv6": "2a02:8109:9f40:1c2d::7a3f",
    "password in a URL": "postgres://bob:plantedUrlPw77@db.planted.internal/shop",
    "OpenAI key": "sk-proj-Pl4ntedOpenAiKey0123456789abcdefXYZ",
    "AWS key": "AKIAPLANTED7QRSTUVWX",
    "GitHub token": "ghp_Pl4ntedGitHubToken0123456789abcdefgh",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJwbGFudGVkIn0.Pl4ntedSignature0123456789abcdefghijkl",
    "private key": "-----BEGIN PRIVATE KEY-----\nMIIPl4ntedPrivateKey0123456789abcdefghijkl\n-----END PRIVATE KEY-----",
    "password": "password=Pl4ntedHunter99x",
    "password in JSON": '{"db_password": "Pl4ntedJsonPw55"}',
    "of the user's own kind": "EMP-774411",
}
TELLER = """
    import logging
    import sys

    import mlflow
    from agents import Agent, function_tool
    from opentelemetry import trace


    @function_tool
    def tell(what: str) -> str:
        '''Tell everyone, by every means.'''
        sys.stdout.write(f"said {what}\\n")
        logging.getLogger("teller").warning("said %s", what, extra={"more": {"said": [what]}})
        mlflow.update_current_trace(tags={"said": what}, metadata={"said": what}, request_preview=what)
        with mlflow.start_span(f"span {what}", attributes={"said": what}) as span:
            span.set_inputs({what: what})
            with trace.get_tracer("teller").start_as_current_span("inner") as inner:
                inner.add_event("said", {"what": what})
                inner.set_attribute("said", what)
        try:
            raise LookupError(what)
        except LookupError:
            logging.getLogger("teller").exception("it went wrong")
        return f"told {what}"


    agent = Agent(name="teller", tools=[tell])
"""
TELLERS_MODEL = """
    from gateway.runs.offline import Call, OfflineModel

    def decide(view):
        results = view.tool_results_this_turn
        return results[0].output if results else [Call("tell", what=view.last_user)]

    model = OfflineModel(decide)
"""
NEEDLES = {
    "e-mail": "marta.planted77",
    "phone": "1512 9876 543",
    "card": "4556 7375 8689 9855",
    "IBAN": "3704 0044 0532",
    "SSN": "536-22-8145",
    "IPv4": "84.17.52.203",
    "IPv6": "2a02:8109:9f40",
    "password in a URL": "plantedUrlPw77",
    "OpenAI key": "Pl4ntedOpenAiKey",
    "AWS key": "AKIAPLANTED7",
    "GitHub token": "Pl4ntedGitHubToken",
    "JWT": "Pl4ntedSignature",
    "private key": "MIIPl4ntedPrivateKey",
    "password": "Pl4ntedHunter99x",
    "password in JSON": "Pl4ntedJsonPw55",
    "of the user's own kind": "EMP-774411",
}
"""What of each must not be found."""


def forms(needle: str) -> set[bytes]:
    """Return the ways in which a text may be written down."""
    plain = needle.encode()
    digits = "".join(each for each in needle if each.isdigit())
    alone = {digits.encode()} if len(digits) > 8 else set()
    escaped = "".join(f"\\u{ord(each):04x}" if not each.isalnum() else each for each in needle)
    utf16 = needle.encode("utf-16-le")
    return {plain, plain.hex().encode(), quote(needle, safe="").encode(), escaped.encode(), utf16} | alone


def found_in(data: bytes) -> set[str]:
    """Return the kinds of which anything is in the data."""
    lower = data.lower()
    return {kind for kind, needle in NEEDLES.items() if any(form.lower() in lower for form in forms(needle))}


def tables(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the whole content of each table, as text."""
    with psycopg.connect(url) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (name,) in names:
            with connection.cursor().copy(
                psycopg.sql.SQL("COPY {} TO STDOUT").format(psycopg.sql.Identifier(name))
            ) as copy:
                yield name, b"".join(bytes(block) for block in copy)


def files(home: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file below the home."""
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder) / name
            if path.is_file() and name != "secret.key":
                yield str(path.relative_to(home)), path.read_bytes()


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Serve a second destination; yield its address and the bodies that it gets."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        server.shutdown()


def agents_in(folder: Path) -> Path:
    """Make a folder of agents: the tests' clerk, and one that uses every means there is to say something."""
    shutil.copytree(ROOT / "tests" / "integration" / "desk", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "teller").mkdir()
    (folder / "teller" / "agent.py").write_text(dedent(TELLER))
    (folder / "teller" / "offline.py").write_text(dedent(TELLERS_MODEL))
    return folder


def converse(gateway: Gateway) -> None:
    """Send every marker by every route."""
    api = gateway.api
    for number, (kind, marker) in enumerate(PLANTED.items()):
        told = f"{CONTROL}: {marker}"
        email = number == 0
        session = marker if email else f"planted-{number}"
        who = {"session_id": session, "user": marker if email else "planted-user"}

        def ask(text: str, path: str = "/v1/responses", session: str = session, **fields: object) -> dict[str, object]:
            body = {"input": text, "conversation": session, **fields}
            answer = api.post(path, json=body, headers={"Idempotency-Key": f"{text} {fields}"[:200].replace("\n", " ")})
            return {"status": answer.status_code, "body": answer.text}

        # Answered at once, as a stream, in each form, in the background, as a batch.
        api.post(
            "/invocations", json={"input": told, **who, "metadata": {"said": marker}, "custom_inputs": {"x": told}}
        )
        api.post("/invocations", json={"messages": [{"role": "user", "content": f"note {told}"}], **who})
        api.post("/invocations", json={"dataframe_split": {"columns": ["input"], "data": [[told], [f"note {told}"]]}})
        for stream in (False, True):
            ask(f"note {told}", stream=stream)
            ask(json.dumps({"said": json.dumps({"again": told})}), stream=stream)
            chat = {"messages": [{"role": "user", "content": told}], "stream": stream, "user": session}
            api.post("/v1/chat/completions", json={"model": "clerk", **chat})
        ask(f"note {told}", background=True)
        ask(told, model="teller", session=f"{session}-told")
        # A tool that fails, a run that fails, a guardrail, a tool that is not there, a call that is approved, or not.
        for failing in ("crash", "give_up", "forbidden", "conjure", "dawdle"):
            ask(f"{failing} {told}", stream=failing == "crash")
        for approve in (True, False):
            paused = json.loads(str(ask(f"refund {told}")["body"]))
            waiting = [item["id"] for item in paused["output"] if item["type"] == "mcp_approval_request"]
            answers = [
                {"type": "mcp_approval_response", "approval_request_id": each, "approve": approve, "reason": told}
                for each in waiting
            ]
            assert answers, kind
            api.post("/v1/responses", json={"input": answers})
        # What is refused: bodies, paths, names.
        api.post("/invocations", json={"input": [{"role": marker, "content": told}]})
        api.post("/invocations", content=f'{{"input": "{marker}'.encode(), headers={"content-type": "application/json"})
        api.post("/v1/responses", json={"model": marker, "input": told})
        api.get(f"/v1/sessions/{quote(marker, safe='')}")
        api.get(f"/v1/responses/{quote(marker, safe='')}")
        api.get("/v1/ledger", params={"since": marker})
        api.post(f"/v1/sessions/{quote(session, safe='')}/end")


def all_settled(gateway: Gateway) -> bool:
    """Whether every run is in its final state, and every conversation scored."""
    with psycopg.connect(running_url(gateway.home) or "") as connection:
        [sending] = connection.execute("SELECT count(*) FROM otlp_outbox").fetchone() or [1]
        [pending] = connection.execute("SELECT count(*) FROM runs WHERE state = 'pending'").fetchone() or [1]
        [due] = connection.execute("SELECT count(*) FROM conversations WHERE due_at IS NOT NULL").fetchone() or [1]
    return not pending and not due and not sending


@pytest.mark.timeout(300)
def test_planted_secrets_are_found_nowhere(tmp_path: Path, judge: Judge) -> None:
    """Of markers of every kind, sent by every route, nothing is in any table, log, artifact or prompt; others are."""
    config = tmp_path / "gateway.toml"
    config.touch()
    prompts_before = len(judge.requests)
    leaks: dict[str, set[str]] = {}
    controls: set[str] = set()

    def search(place: str, content: bytes) -> None:
        if kinds := found_in(content):
            leaks[place] = kinds
        if CONTROL.encode() in content:
            controls.add(place)

    with collector() as (endpoint, sent):
        gateway = Gateway(
            tmp_path / "home",
            GATEWAY_AGENTS_DIR=str(agents_in(tmp_path / "agents")),
            GATEWAY_DEFAULT_AGENT="clerk",
            GATEWAY_CONFIG=str(config),
            GATEWAY_REDACT_PATTERNS=json.dumps({"EMPLOYEE": r"\bEMP-\d{6}\b"}),
            GATEWAY_JUDGE_MODEL="openai:/judge-1",
            GATEWAY_JUDGE_BASE_URL=judge.url,
            GATEWAY_JUDGE_API_KEY="sk-judge",
            GATEWAY_OTLP_ENDPOINT=endpoint,
            GATEWAY_LOG_LEVEL="debug",
        ).start()
        try:
            converse(gateway)
            eventually(lambda: all_settled(gateway), within_s=150)
            url = running_url(gateway.home)
            assert url is not None
            for database in ("gateway", "mlflow"):
                for name, content in tables(sibling_database(url, database)):
                    search(f"{database}.{name}", content)
            for path in ("/ops", "/v1/quality", "/v1/ledger", "/health"):
                search(path, gateway.api.get(path).content)
            states = gateway.states()
        finally:
            gateway.stop()
    for name, content in files(gateway.home):
        search("wal" if name.startswith("postgres/pg_wal") else name.split("/")[0], content)
    search("prompts", json.dumps(judge.requests[prompts_before:]).encode())
    search("collector", b"".join(sent))
    assert leaks == {}
    # What is nobody's secret is in every one of these places, so the search is not blind there.
    assert {"mlflow.spans", "mlflow.trace_tags", "postgres", "wal", "serve.log", "prompts", "collector"} <= controls
    assert "redaction_blocked" not in states


def test_the_search_sees_every_form() -> None:
    """The search itself finds each marker: as it is, escaped, encoded."""
    for kind, marker in PLANTED.items():
        assert kind in found_in(f"row {marker} end".encode())
        assert kind in found_in(json.dumps(json.dumps({"a": marker})).encode())
        assert kind in found_in(quote(marker, safe="").encode())
        assert kind in found_in(marker.encode().hex().encode())
    assert found_in(base64.b64encode(CONTROL.encode())) == set()
