"""What the tests of runs share: the agents of `desk/`, what clients send and get, what is in the database."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psycopg
from blockbuster import blockbuster_ctx
from litestar import Litestar

from gateway.app import create_app
from gateway.crypto import load_keys
from gateway.settings import Settings
from gateway.storage.api_keys import create_key
from gateway.tracing.spans import Trace, decode

_PLUGINS = "agent_plugins"


class Web(httpx.AsyncClient):
    """A client of an app in the same event loop: unlike with Litestar's own, requests are really under way at once."""

    def __init__(self, app: Litestar):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        super().__init__(transport=transport, base_url="http://gateway", timeout=30)
        self.app = app


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Web]:
    """Serve an app; on leaving the context everything is handed over to the database."""
    app = await asyncio.to_thread(create_app, settings)
    async with app.lifespan(), Web(app) as client:
        with blockbuster_ctx(["gateway"]):
            yield client


def desk(make_settings: Callable[..., Settings], **overrides: object) -> Settings:
    """Return settings that serve a clerk who has done nothing yet; keyword arguments override."""
    for name in [name for name in sys.modules if name.startswith(f"{_PLUGINS}.")]:
        del sys.modules[name]
    folder = Path(__file__).parent / "desk"
    return make_settings(**{"agents_dir": folder, "default_agent": "clerk"} | overrides)


def clerk() -> ModuleType:
    """Return the clerk's module, which all apps of this process share."""
    return sys.modules[f"{_PLUGINS}.clerk.agent"]


async def begun() -> None:
    """Wait until the clerk waits for the gate; the next call waits for the next time."""
    assert await asyncio.to_thread(clerk().began.wait, 10)
    clerk().began.clear()


def say(client: Web, text: str, session: str | None = None, **fields: object) -> asyncio.Task[httpx.Response]:
    """Send one turn to the Responses API."""
    body = {"input": text, **({"conversation": session} if session else {}), **fields}
    return asyncio.create_task(client.post("/v1/responses", json=body))


def decided(client: Web, *approvals: str, approve: bool = True, **fields: object) -> asyncio.Task[httpx.Response]:
    """Send the same decision on approval requests, to the Responses API."""
    answers = [{"type": "mcp_approval_response", "approval_request_id": each, "approve": approve} for each in approvals]
    return asyncio.create_task(client.post("/v1/responses", json={"input": answers, **fields}))


def text(answer: httpx.Response) -> str:
    """Return what the agent said at last."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["output"][-1]["content"][0]["text"])


def approvals(answer: httpx.Response) -> list[str]:
    """Return the ids of the approvals that an answer asks for."""
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["output"] if item["type"] == "mcp_approval_request"]


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error in OpenAI's form."""
    return answer.status_code, answer.json()["error"]["code"]


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a Responses stream, or the chunks of a chat stream."""
    assert answer.status_code == 200, answer.text
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


async def until(look: Callable[[], object]) -> None:
    """Look again until it is so: what a database, or another process, does can only be looked for."""
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(look):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)


async def ended(client: Web, path: str) -> dict[str, Any]:
    """Return a stored response when its run is under way no more."""
    async with asyncio.timeout(10):
        while (found := (await client.get(path)).json())["status"] == "in_progress":  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
        return dict(found)


async def headers(settings: Settings, *names: str, scopes: Sequence[str] = ("invoke",)) -> list[dict[str, str]]:
    """Make API keys and return the headers that send them."""
    assert settings.database_url
    url = settings.database_url.get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        made = [await create_key(connection, name, list(scopes), None, None, None, None) for name in names]
    return [{"Authorization": f"Bearer {key}"} for key in made]


def traces(settings: Settings) -> dict[str, Trace]:
    """Return the traces that wait in the outbox, by id, in the order of their begin."""
    assert settings.database_url
    cipher = load_keys(settings).outbox
    with psycopg.connect(settings.database_url.get_secret_value()) as connection:
        rows = connection.execute("SELECT trace_id, payload FROM outbox").fetchall()
    found = [decode(cipher.decrypt(payload, trace_id)) for trace_id, payload in rows]
    return {trace.trace_id: trace for trace in sorted(found, key=lambda trace: trace.started_ns)}


def kinds(trace: Trace) -> list[str]:
    """Return the names of a trace's spans, the root first."""
    return [span.name for span in trace.spans]
