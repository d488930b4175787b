"""``GET /v1/ledger``: what became of the runs, and whether that adds up to the runs served."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg
from litestar import Request, get
from litestar.datastructures import State as AppState
from psycopg.rows import dict_row

from gateway.errors import InvalidRequest
from gateway.quality.reading import reading
from gateway.quality.since import SINCE_FORMS, parse_since
from gateway.tracing.balance import Check, read_check
from gateway.tracing.ledger import (
    AgentFunnel,
    Ledger,
    Swept,
    Waiting,
    read_ledger,
    read_swept,
    read_waiting,
)

DEFAULT_SINCE = "24h"


class LedgerReport(msgspec.Struct):
    """The ledger of a stretch of time up to now, and the check of the whole."""

    generated_at: datetime
    since: datetime
    ledger: Ledger
    """Runs that started since."""
    agents: list[AgentFunnel]
    """The same by agent, by name."""
    waiting: Waiting
    swept: list[Swept]
    """What sweepers did with the runs that started since, the last first."""
    check: Check


async def read_report(connection: psycopg.AsyncConnection[Any], since: datetime, now: datetime) -> LedgerReport:
    """Return the ledger since ``since``.

    Args:
        connection: in a transaction that began with `gateway.tracing.ledger.SNAPSHOT`.
        since: begin of the window.
        now: its end, as it will be shown.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        ledger, agents = await read_ledger(cursor, since)
        waiting = await read_waiting(cursor)
        swept = await read_swept(cursor, since)
    return LedgerReport(now, since, ledger, agents, waiting, swept, await read_check(connection))


@get(
    "/v1/ledger",
    opt={"scope": "ops"},
    tags=["Operations"],
    summary="What became of the runs",
    description=(
        "Every run served is in exactly one state. With the check that the states add up to the runs served, which "
        "are counted apart from them."
    ),
)
async def ledger(request: Request[Any, Any, AppState], since: str = DEFAULT_SINCE) -> LedgerReport:
    """Answer with the ledger; raise `InvalidRequest` or `ServiceUnavailable`."""
    now = datetime.now(UTC)
    begin = parse_since(since, now)
    if begin is None:
        raise InvalidRequest(f"`since` is neither a time nor a duration; give {SINCE_FORMS}.", "since")
    async with reading(request.app.state.pool) as connection:
        return await read_report(connection, begin, now)
