"""Requests made up from our own OpenAPI document, valid and not, sent to a server over HTTP."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import requests
import schemathesis
import uvicorn
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.app import ROUTES, create_app
from gateway.http.openapi import describe
from gateway.settings import Settings, sibling_database
from gateway.storage.api_keys import create_key

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = json.loads(describe(ROUTES))
SESSION = requests.Session()  # a connection for each of the requests would take most of the time
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
PARTS = [
    # Every value of every field in turn; `/invocations` decodes the bodies of the others.
    {"include-path": "/invocations", "phases": {"coverage": {"enabled": False}}},
]


def operations(*, max_examples: int, coverage: bool) -> schemathesis.BaseSchema:
    """Return what the document describes, to be tried in the same way each time."""
    settings = {
        "seed": 1,
        "generation": {"max-examples": max_examples, "deterministic": True},
        "phases": {"coverage": {"enabled": coverage, "generation": {"mode": "positive"}}},
        "operations": PARTS,
    }
    config = schemathesis.Config.from_dict(settings)
    return schemathesis.openapi.from_dict(DOCUMENT, config=config).exclude(operation_id_regex="_alias$")


@contextmanager
def served(postgres_url: str, home: Path, name: str) -> Iterator[tuple[str, str]]:
    """Serve an app in a thread, on a database of its own; return its address and the database's."""
    url = sibling_database(postgres_url, name)
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE gateway")
    settings = Settings(
        home=home, database_url=url, agents_dir=ROOT / "agents", secret_key="a secret key for tests only"
    )
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", url
    server.should_exit = True
    thread.join()
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def open_gateway(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a gateway for which no API key was ever made."""
    with served(postgres_url, tmp_path_factory.mktemp("home"), "schemathesis_open") as (address, _):
        yield address


@pytest.fixture(scope="module")
def closed_gateway(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a gateway that needs an API key, and a key for runs alone."""

    async def make_key(url: str) -> str:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            return await create_key(connection, "app", ["invoke"], ["math"], None, 1000, 1)

    with served(postgres_url, tmp_path_factory.mktemp("home"), "schemathesis_closed") as (address, url):
        yield address, asyncio.run(make_key(url))


def make_way(case: Case) -> None:
    """Take away what would end nearly every run early: another session's id, an idempotency key used before."""
    case.headers.pop("X-Amzn-Bedrock-AgentCore-Runtime-Session-Id", None)
    case.headers.pop("Idempotency-Key", None)


@operations(max_examples=30, coverage=True).parametrize()
def test_answers_are_as_documented(case: Case, open_gateway: str) -> None:
    """Whatever is sent, the status is a documented one, and the headers, the type and the body are as documented."""
    make_way(case)
    case.call_and_validate(base_url=open_gateway, session=SESSION, checks=CHECKS)


@operations(max_examples=3, coverage=False).parametrize()
def test_refusals_are_as_documented(case: Case, closed_gateway: tuple[str, str]) -> None:
    """Without an API key, and with one that lacks a scope, an agent or a free place, answers are as documented too."""
    address, key = closed_gateway
    case.call_and_validate(base_url=address, session=SESSION, checks=CHECKS)
    case.call_and_validate(base_url=address, session=SESSION, checks=CHECKS, headers={"X-API-Key": key})
