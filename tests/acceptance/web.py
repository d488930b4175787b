"""Web processes by themselves on one database, agents that wait when they are told to, and clients on raw sockets."""

import json
import shutil
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import psycopg

from gateway.crypto import Keys
from gateway.settings import sibling_database
from gateway.storage.database import create_database
from gateway.tracing.spans import Trace, decode

from .conftest import ROOT, eventually, free_port, outside

SECRET = "a secret key for tests only"

WORKER = '''
import asyncio
import os
import time
from pathlib import Path

from agents import Agent, function_tool

DESK = Path(os.environ["DESK"])


def note(name: str, what: str) -> None:
    with (DESK / "notes").open("a") as notes:
        notes.write(f"{name} {what}\\n")


@function_tool
async def wait(name: str) -> str:
    """Wait for the file of that name."""
    note(name, "begun")
    try:
        while not (DESK / name).exists():
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        note(name, "cancelled")
        raise
    note(name, "done")
    return "done"


@function_tool
async def resist(name: str) -> str:
    """Wait for the file, whoever cancels."""
    note(name, "begun")
    while not (DESK / name).exists():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            note(name, "cancelled")
    return "done"


@function_tool
def block(name: str) -> str:
    """Wait for the file in a thread, which nobody can cancel."""
    note(name, "begun")
    while not (DESK / name).exists():
        time.sleep(0.05)
    return "done"


@function_tool
async def count(name: str) -> int:
    """Count the tasks on the event loop."""
    return len(asyncio.all_tasks())


agent = Agent(name="worker", tools=[wait, resist, block, count])
'''
"""Calls the tool that it is told to call: "wait x". It can also "say 20" words, and "shout 20" letters in one word."""

WORKERS_MODEL = """
from gateway.runs.offline import Call, OfflineModel


def decide(view):
    what, _, which = view.last_user.partition(" ")
    if view.tool_results_this_turn:
        return view.tool_results_this_turn[-1].output
    if what == "say":
        return " ".join(f"word-{number}" for number in range(int(which)))
    if what == "shout":
        return "x" * int(which)
    return Call(what, name=which) if what in {"wait", "resist", "block", "count"} else "What?"


model = OfflineModel(decide, pause_s=0.02)
"""

TALKER = """
from agents import Agent

agent = Agent(name="talker", model="scripted-1")
"""


class Web:
    """A running `gateway web`."""

    def __init__(self, folder: Path, database_url: str, **settings: str):
        """Start it; the folder has the agents, and the tools' notes."""
        self.desk = folder / "desk"
        self.port = free_port()
        self.log = folder / f"web-{self.port}.log"
        self._database_url = database_url
        environment = {
            **outside(),
            "DESK": str(self.desk),
            "GATEWAY_AGENTS_DIR": str(folder / "agents"),
            "GATEWAY_DATABASE_URL": database_url,
            "GATEWAY_HOME": str(folder / "home"),
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_SECRET_KEY": SECRET,
            "GATEWAY_TRACE_FLUSH_S": "0.01",
            "OPENAI_API_KEY": "sk-scripted",
            **settings,
        }
        command = [sys.executable, "-m", "gateway", "web"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def status(self) -> str | None:
        """Return what `/ping` says; ``None`` if it does not answer."""
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with suppress(httpx.HTTPError):
            return str(self.api.get("/ping").json()["status"])
        return None

    def await_idle(self) -> None:
        """Wait until no run is under way."""
        eventually(lambda: self.status() == "Healthy")

    def end(self) -> None:
        """End it if it runs, and see that it met nothing that it did not expect."""
        self.api.close()
        self.process.kill()
        self.process.wait()
        assert '"level": "error"' not in self.log.read_text(), self.log.read_text()[-3000:]

    @property
    def usage(self) -> psutil.Process:
        """What the system knows of the process."""
        return psutil.Process(self.process.pid)

    def give(self, name: str) -> None:
        """Give the tools of that name what they wait for."""
        (self.desk / name).touch()

    def noted(self, name: str) -> list[str]:
        """Return what became of the tool of that name, in order."""
        lines = (self.desk / "notes").read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def await_note(self, name: str, what: str) -> None:
        """Wait until a tool of that name has left such a note."""
        eventually(lambda: what in self.noted(name))

    def rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement on the database and return its rows."""
        with psycopg.connect(self._database_url) as connection:
            return connection.execute(statement, parameters).fetchall()  # type: ignore[arg-type]

    def await_row(self, statement: str, *parameters: object) -> None:
        """Wait until a statement gives a row."""
        eventually(lambda: self.rows(statement, *parameters))

    def traces(self, session_id: str, count: int = 1) -> list[Trace]:
        """Wait for the traces of a session's runs and return them, in order."""
        query = (
            "SELECT payload, trace_id FROM outbox JOIN runs USING (trace_id) WHERE session_id = %s ORDER BY started_at"
        )
        found = eventually(lambda: rows if len(rows := self.rows(query, session_id)) >= count else None)
        return [decode(Keys(SECRET.encode()).outbox.decrypt(payload, trace_id)) for payload, trace_id in found]

    def history(self, session_id: str) -> list[list[dict[str, Any]]]:
        """Return the items of a session's turns, in order."""
        query = "SELECT turn, items FROM session_turns WHERE session_id = %s ORDER BY turn"
        cipher = Keys(SECRET.encode()).history
        return [json.loads(cipher.decrypt(items, f"{session_id}/{n}")) for n, items in self.rows(query, session_id)]

    def ask(self, text: str, agent: str = "worker", **fields: object) -> dict[str, Any]:
        """Send one request as any client would and return the answer, which must be good."""
        answer = self.api.post("/invocations", json=ask(text, agent, **fields))
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def tasks(self) -> int:
        """Return how many tasks there are on the process's event loop."""
        return int(self.ask("count x")["output"][-1]["content"][0]["text"])

    def connect(self, *, receive_buffer: int = 0) -> "Wire":
        """Return a new connection."""
        return Wire(self.port, receive_buffer)

    def post(self, body: dict[str, Any], path: str = "/invocations", *, receive_buffer: int = 0) -> "Wire":
        """Return a new connection with a request sent on it."""
        wire = self.connect(receive_buffer=receive_buffer)
        wire.send(request(body, path))
        return wire


class Wire:
    """A client's connection that does what it is told, byte by byte."""

    def __init__(self, port: int, receive_buffer: int):
        self.socket = socket.socket()
        self.socket.settimeout(60)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self._read = bytearray()

    def __enter__(self) -> Self:
        """Stay until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send it all."""
        self.socket.sendall(data)

    def read_to(self, end: bytes) -> bytes:
        """Read up to ``end``, which must come."""
        seen = 0
        while (found := self._read.find(end, max(0, seen - len(end)))) < 0:
            seen = len(self._read)
            self._read_more()
        return self._taken(found + len(end))

    def answer(self) -> tuple[int, bytes]:
        """Read one answer that says how long it is; return its status and body."""
        head = self.read_to(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(self._read) < length:
            self._read_more()
        return int(head.split()[1]), self._taken(length)

    def read_all(self) -> bytes:
        """Read until the other side ends the connection."""
        with suppress(ConnectionResetError):
            while more := self.socket.recv(65_536):
                self._read += more
        return self._taken(len(self._read))

    def _read_more(self) -> None:
        more = self.socket.recv(65_536)
        assert more, bytes(self._read[-500:])
        self._read += more

    def _taken(self, length: int) -> bytes:
        taken, self._read = bytes(self._read[:length]), self._read[length:]
        return taken

    def close(self) -> None:
        """Leave in order, by FIN."""
        self.socket.close()

    def reset(self) -> None:
        """Leave at once, by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def half_close(self) -> None:
        """Send no more, and go on to read."""
        self.socket.shutdown(socket.SHUT_WR)


def ask(text: str, agent: str = "worker", **fields: object) -> dict[str, Any]:
    """Return the body of a request."""
    return {"agent": agent, "input": text, **fields}


def head(length: int | None, path: str = "/invocations", version: str = "1.1", **headers: str) -> bytes:
    """Return the head of a request with a JSON body of ``length`` bytes; ``None``: in chunks."""
    framing = {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
    fields = {"host": "gateway", "content-type": "application/json", **framing, **headers}
    lines = [f"POST {path} HTTP/{version}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def request(body: dict[str, Any], path: str = "/invocations", version: str = "1.1", **headers: str) -> bytes:
    """Return a whole request."""
    encoded = json.dumps(body).encode()
    return head(len(encoded), path, version, **headers) + encoded


def events(stream: bytes) -> list[str]:
    """Return the types of a stream's events, in order, whatever it came in."""
    return [
        line.removeprefix(b"event: ").strip().decode() for line in stream.splitlines() if line.startswith(b"event: ")
    ]


async def double(web: Web, session_id: str) -> int | None:
    """Double the last result of a session of the math agent and return it; ``None`` if the process is gone."""
    async with httpx.AsyncClient(timeout=60) as client:
        try:
            url = f"http://127.0.0.1:{web.port}/invocations"
            answer = await client.post(url, json=ask("double that", "math", session_id=session_id))
        except httpx.TransportError:
            return None
    assert answer.status_code == 200, answer.text
    return int(answer.json()["output"][-1]["content"][0]["text"])


def results(history: list[list[dict[str, Any]]]) -> list[int]:
    """Return what each turn of a session of the math agent came to; each has a question, one call and its answer."""
    for turn in history:
        assert [item.get("type", item.get("role")) for item in turn] == [
            "user",
            "function_call",
            "function_call_output",
            "message",
        ], turn
    return [int(turn[-1]["content"][0]["text"]) for turn in history]


@contextmanager
def running(folder: Path, postgres_url: str, *settings: dict[str, str]) -> Iterator[list[Web]]:
    """Start a web process for each of the settings, all on one new database."""
    name = f"web_{uuid.uuid4().hex[:12]}"
    create_database(postgres_url, name)
    _write_agents(folder)
    with ExitStack() as stack:
        webs = [Web(folder, sibling_database(postgres_url, name), **each) for each in settings]
        for web in webs:
            stack.callback(web.end)
        for web in webs:
            eventually(web.status, within_s=120)
        yield webs


def _write_agents(folder: Path) -> None:
    files = {"worker/agent.py": WORKER, "worker/offline.py": WORKERS_MODEL, "talker/agent.py": TALKER}
    for name, text in files.items():
        path = folder / "agents" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copytree(ROOT / "agents" / "math", folder / "agents" / "math")
    (folder / "desk").mkdir()
    (folder / "desk" / "notes").touch()
