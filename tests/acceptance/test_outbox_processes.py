"""What becomes of finished runs when web processes and their Postgres are killed, stopped and started again."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from gateway.storage.embedded import EmbeddedPostgres
from gateway.tracing.balance import Check, read_check

from .conftest import eventually
from .web import Web, ask, running

AT_ONCE = 8
"""Clients that ask at the same time."""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A Postgres that may be killed."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"))
    server.start()
    yield server
    server.stop()


@contextmanager
def web_on(folder: Path, url: str, **settings: str) -> Iterator[Web]:
    """Start one more web process on the folder and the database of those before."""
    web = Web(folder, url, **settings)
    try:
        eventually(web.status, within_s=120)
        yield web
    finally:
        web.end()


def settled(url: str) -> Check:
    """Wait until no dead process is left unsettled and no run is under way; return the ledger, which adds up."""

    async def look() -> Check:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            return await read_check(connection)

    def adds_up() -> Check | None:
        found = asyncio.run(look())
        is_left = any(process.status == "left" for process in found.processes)
        return found if found.adds_up and not found.unsettled and not is_left else None

    found = eventually(adds_up)
    assert found is not None
    return found


async def load(web: Web, answered: list[str], *, at_once: int = AT_ONCE) -> None:
    """Ask until the process is gone or stops; note the ids of the traces of what was answered."""

    async def ask_on(client: httpx.AsyncClient) -> None:
        while True:
            try:
                answer = await client.post("/invocations", json=ask("say 1"))
            except httpx.TransportError:
                return
            if answer.status_code != 200:
                assert answer.status_code == 503, answer.text
                return
            answered.append(answer.json()["trace_id"])

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port}", timeout=60) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(at_once)))


async def after(answered: list[str], count: int) -> None:
    """Wait until that many runs were answered."""
    async with asyncio.timeout(60):
        while len(answered) < count:  # noqa: ASYNC110 - what another process does can only be looked for
            await asyncio.sleep(0.005)


STORED = "SELECT trace_id FROM runs JOIN outbox USING (trace_id)"


async def test_a_kill_and_a_stop_under_load(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    """A kill -9 takes the last runs alone, which the next process counts as lost; a SIGTERM takes nothing."""
    with running(tmp_path, postgres.url, {"GATEWAY_TRACE_FLUSH_S": "0.05"}) as (victim,):
        url = victim._database_url
        answered: list[str] = []
        loading = asyncio.create_task(load(victim, answered))
        await after(answered, 100)
        await asyncio.sleep(0.5)  # whatever was answered before this is to be stored
        victim.process.kill()
        await loading
        with web_on(tmp_path, url) as web:
            ledger = await asyncio.to_thread(settled, url)
            stored = {row[0] for row in web.rows(STORED)}
            assert set(answered[:100]) <= stored
            missing = len(set(answered) - stored)
            assert missing <= ledger.dropped <= missing + AT_ONCE  # those under way were answered to nobody
            assert ledger.served == len(stored) + ledger.dropped
            assert web.rows("SELECT coalesce(sum(count), 0)::int FROM run_drops WHERE reason = 'crash'") == [
                (ledger.dropped,)
            ]

            answered.clear()
            loading = asyncio.create_task(load(web, answered))
            await after(answered, 50)
            web.process.terminate()
            await loading
            assert await asyncio.to_thread(web.process.wait, 30) == 0
            assert set(answered) <= {row[0] for row in web.rows(STORED)}
            assert (await asyncio.to_thread(settled, url)).dropped == ledger.dropped
            assert web.rows("SELECT count(*) FROM run_counts WHERE closed_at IS NULL") == [(0,)]
    assert [path.name for path in (tmp_path / "home" / "web").iterdir()] == ["recovery.lock"]


def test_a_stop_while_postgres_is_dead(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    """Postgres is killed with runs under way, and the web process stopped: the next one stores every run that ended."""
    settings = {"GATEWAY_SHUTDOWN_GRACE_S": "2"}
    names = [f"cut-off-{number}" for number in range(5)]
    with running(tmp_path, postgres.url, settings) as (web,):
        url = web._database_url
        wires = [web.post(ask(f"wait {each}", session_id=each)) for each in names]
        for each in names:
            web.await_note(each, "begun")
        assert postgres._process is not None
        postgres._process.kill()
        postgres._process.wait()
        for each in names:
            web.give(each)
            web.await_note(each, "done")
        web.process.terminate()
        assert web.process.wait(40) == 0
        for wire in wires:
            with wire:
                assert wire.read_all().startswith(b"HTTP/1.1 503")
        web.log.write_text("")  # it complained about the database, as it should
        postgres.start()
        with web_on(tmp_path, url, **settings) as following:
            ledger = settled(url)
            stored = following.rows(f"SELECT session_id FROM runs JOIN ({STORED}) AS kept USING (trace_id)")
            assert sorted(row[0] for row in stored) == names
            assert (ledger.served, ledger.rows, ledger.dropped) == (5, 5, 0)
