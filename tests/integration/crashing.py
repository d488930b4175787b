"""An evaluator that is interrupted at one of its commits, of those to Postgres and of those that MLflow makes.

The commits are found, not listed: they are counted while the evaluator works, by psycopg's own methods. One that dies
there is a process of its own, forked from one that has imported everything and opened nothing.
"""

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg
import structlog

from gateway.settings import Settings

from .evaluating import Parts, evaluator

_ROOT = Path(__file__).parents[2]
_WRITES = re.compile(r"\b(INSERT INTO|DELETE FROM|UPDATE)\s+(\w+)\s+(?:AS|SET|WHERE|\()", re.IGNORECASE)
# What an evaluator imports only once it works: a child that does costs half as much again.
_LATE_IMPORTS = (
    "anyio._backends._asyncio",
    "httpcore",
    "mlflow.evaluation",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "procrastinate.builtin_tasks",
    "uvicorn.lifespan.off",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)


class Commit(NamedTuple):
    """One commit that an evaluator came to."""

    name: str
    changes: bool
    """Whether it changed anything: a claim may find nothing."""


def steps(parts: Parts, session: str) -> list[Callable[[], Awaitable[None]]]:
    """Return all that an evaluator does: the outbox, the conversation, what waits for judges."""
    return [parts.intake.drain, partial(parts.conversations.score, session), parts.worker.work_off]


async def work(parts: Parts, session: str) -> None:
    """Take each step once."""
    for step in steps(parts, session):
        await step()


class Commits:
    """Counts the commits of this process within `counted`, and interrupts one."""

    def __init__(self, interrupt: Callable[[int], None], at: int = 0, *, late: bool = False, of: str = ""):
        """Take what to do, and where.

        Args:
            interrupt: gets the id of the server's process that commits; if it returns, the connection is lost.
            at: number of the commit, the first being 1; 0: none is interrupted.
            late: once it is done, instead of before.
            of: what is in the names of those that are meant by the number; empty: all are.
        """
        self.found: list[Commit] = []
        self._interrupt = interrupt
        self._at = at
        self._late = late
        self._of = of
        self._written: dict[int, str] = {}
        """By connection: what its transaction has written last."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count within the block."""
        wrapped = [
            (psycopg.AsyncCursor, "execute", self._async_execute),
            (psycopg.AsyncConnection, "transaction", self._async_transaction),
            (psycopg.Cursor, "execute", self._execute),
            (psycopg.Cursor, "executemany", self._execute),
            (psycopg.Connection, "commit", self._commit),
        ]
        inner = [getattr(owner, name) for owner, name, _ in wrapped]
        for (owner, name, wrap), method in zip(wrapped, inner, strict=True):
            setattr(owner, name, wrap(method))
        try:
            yield
        finally:
            for (owner, name, _), method in zip(wrapped, inner, strict=True):
                setattr(owner, name, method)

    def _begin(self, connection: Any, name: str) -> None:
        self.found.append(Commit(name, changes=True))
        if self._is_there() and not self._late:
            self._interrupt(connection.info.backend_pid)  # where it returns, the commit itself raises

    def _is_lost(self, connection: Any) -> bool:
        if self._is_there() and self._late:
            self._interrupt(connection.info.backend_pid)
            return True
        return False

    def _is_there(self) -> bool:
        """Whether the commit that was found last is the one to be interrupted."""
        return self._of in self.found[-1].name and sum(self._of in name for name, _ in self.found) == self._at

    def _async_execute(self, inner: Any) -> Any:
        """Return the gateway's way to execute: outside of a transaction, a statement is a commit of its own."""

        async def execute(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            name, connection = _written(query), cursor.connection
            alone = connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
            if name is None or not alone:
                self._written[id(connection)] = name or self._written.get(id(connection), "")
                return await inner(cursor, query, *arguments, **options)
            self._begin(connection, name)
            result = await inner(cursor, query, *arguments, **options)
            self.found[-1] = Commit(name, changes=cursor.rowcount > 0)
            if self._is_lost(connection):
                await inner(connection.cursor(), "SELECT 1")  # raises: the answer did not arrive
            return result

        return execute

    def _async_transaction(self, inner: Any) -> Any:
        @asynccontextmanager
        async def transaction(connection: Any, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
            self._written.pop(id(connection), None)
            async with inner(connection, *arguments, **options) as entered:
                yield entered
                if name := self._written.pop(id(connection), ""):
                    self._begin(connection, f"COMMIT of {name}")
            if name and self._is_lost(connection):
                await connection.execute("SELECT 1")

        return transaction

    def _execute(self, inner: Any) -> Any:
        """Return MLflow's way to execute: it is always within a transaction."""

        def execute(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            if name := _written(query):
                self._written[id(cursor.connection)] = name
            return inner(cursor, query, *arguments, **options)

        return execute

    def _commit(self, inner: Any) -> Any:
        def commit(connection: Any) -> None:
            if name := self._written.pop(id(connection), ""):
                self._begin(connection, f"MLflow's COMMIT of {name}")
            inner(connection)
            if name and self._is_lost(connection):
                connection.execute("SELECT 1")

        return commit


def _written(query: Any) -> str | None:
    """Return what a statement writes; ``None``: nothing."""
    found = _WRITES.findall(str(query))
    return " ".join(found[-1]) if found else None


class Order(NamedTuple):
    """What a child is to do: to work, and to die at a commit."""

    settings: Settings
    uri: str
    session: str
    at: int
    """Which commit, the first being 1; 0: it lives."""
    late: bool = False
    of: str = ""
    """See `Commits`."""


class Children:
    """Has orders carried out by processes of their own, one at a time."""

    def __enter__(self) -> Self:
        """Start the process that they are forked from; it imports while others go on."""
        command = [sys.executable, "-c", f"from {__name__} import fork_children; fork_children()"]
        self._parent = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._parent.kill()
        self._parent.communicate()

    def run(self, order: Order) -> tuple[int, list[Commit]]:
        """Wait until a child is gone; return its exit status, a signal's negative, and its commits if it lived."""
        assert self._parent.stdin
        assert self._parent.stdout
        pickle.dump(tuple(order), self._parent.stdin)
        self._parent.stdin.flush()
        status, found = json.loads(self._parent.stdout.readline())
        return status, [Commit(*each) for each in found]


def fork_children() -> None:
    """Fork a child for each order on standard input, until there are no more."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for name in _LATE_IMPORTS:
        import_module(name)
    with suppress(EOFError):
        while True:
            order = Order(*pickle.load(sys.stdin.buffer))
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                _be_a_child(order, writing)
            os.close(writing)
            with os.fdopen(reading) as said:
                found = json.loads(said.read() or "[]")
            _, status = os.waitpid(child, 0)
            print(json.dumps([os.waitstatus_to_exitcode(status), found]), flush=True)  # noqa: T201 - the answer


def _be_a_child(order: Order, writing: int) -> None:
    """Work, and die, or tell of the commits."""
    status = 1
    try:
        commits = Commits(lambda _: os.kill(os.getpid(), signal.SIGKILL), order.at, late=order.late, of=order.of)
        asyncio.run(_evaluate(order, commits))
        os.write(writing, json.dumps(commits.found).encode())
        status = 0
    finally:
        os._exit(status)


async def _evaluate(order: Order, commits: Commits) -> None:
    async with evaluator(order.settings, order.uri, alive=True) as parts:
        with commits.counted():
            await work(parts, order.session)
