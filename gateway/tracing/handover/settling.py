"""How many runs each web process served, into the database: while it lives, and for good when it is gone.

``run_counts`` says how many runs a process has begun, whatever became of them, and how many of those are not in the
ledger yet (``unsettled``). With the rows in ``runs`` and the counts in ``run_drops`` this adds up at every commit::

    served = rows + drops + unsettled

When a process is gone, whatever is still missing is lost, and becomes ``dropped(crash)``. Statements give what is so,
never what has changed: written again, after a commit that was not heard of, they change nothing.

Each home settles the processes that ran in it. The counts of a host that never starts again stay as last reported,
with what was under way as ``unsettled``: nothing is invented.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from gateway.storage.database import Pool
from gateway.tracing.handover.tally import DROP_REASONS, Counts

Connection = psycopg.AsyncConnection[Any]

CRASH = "crash"
"""Reason of drops that nobody counted when they happened."""

_CLOCK_MARGIN = timedelta(days=1)  # clocks are set back; it only spares a look at all the runs there ever were


async def database_identity(pool: Pool) -> str:
    """Return what tells this database from every other: Postgres' own number of the server, and the database's."""
    async with pool.connection() as connection:
        cursor = await connection.execute(_IDENTITY)
        row = await cursor.fetchone()
    return str(row[0]) if row else ""


async def store_counts(
    connection: Connection, process_id: int, counts: Mapping[str, Counts], rows: Mapping[str, int]
) -> None:
    """Store the counts of a living process, within the caller's transaction.

    Args:
        connection: in a transaction.
        process_id: whose they are.
        counts: by agent, those that changed at least.
        rows: runs by agent that have a row, those of this transaction included.
    """
    await _store_drops(connection, process_id, counts)
    unsettled = {agent: max(0, each.begun - each.dropped - rows.get(agent, 0)) for agent, each in counts.items()}
    await connection.execute(
        _COUNT,
        {
            "process": process_id,
            "agents": list(counts),
            "served": [each.begun for each in counts.values()],
            "unsettled": [unsettled[agent] for agent in counts],
        },
    )


async def settle(
    connection: Connection, process_id: int, counts: Mapping[str, Counts], *, started_ns: int | None
) -> dict[str, int]:
    """Settle the counts of a process that is gone, within the caller's transaction; what it left is stored by now.

    Args:
        connection: in a transaction.
        process_id: whose they are.
        counts: by agent, as its tally has them; what a power failure took of them is made good by what was stored.
        started_ns: when it began to count, nanoseconds since the epoch; ``None`` if that is not known.

    Returns:
        Runs that are lost by agent, those only that were not known to be.
    """
    await _store_drops(connection, process_id, counts)
    since = datetime.fromtimestamp((started_ns or 0) / 1e9, UTC) - (_CLOCK_MARGIN if started_ns else timedelta())
    cursor = await connection.execute(_KNOWN, {"process": process_id, "since": since})
    accounted: dict[str, int] = {}
    served = Counter({agent: each.begun for agent, each in counts.items()})
    for agent, reported, with_fate in await cursor.fetchall():
        accounted[agent] = with_fate
        served[agent] = max(served[agent], reported, with_fate)
    lost = {agent: missing for agent in served if (missing := served[agent] - accounted.get(agent, 0)) > 0}
    for agent, missing in lost.items():
        await connection.execute(_DROP, [agent, CRASH, missing, process_id])
    await connection.execute(_CLOSE, {"process": process_id, "agents": list(served), "served": list(served.values())})
    return lost


async def _store_drops(connection: Connection, process_id: int, counts: Mapping[str, Counts]) -> None:
    for agent, each in counts.items():
        for reason in DROP_REASONS:
            if total := getattr(each, reason):
                values = {"agent": agent, "reason": reason, "total": total, "process": process_id}
                await connection.execute(_DROP_UP_TO, values)


_IDENTITY = """
    SELECT system_identifier || '-' || oid FROM pg_control_system(), pg_database WHERE datname = current_database()
"""
_COUNT = """
    INSERT INTO run_counts AS known (process_id, agent, served, unsettled)
    SELECT %(process)s, * FROM unnest(%(agents)s::text[], %(served)s::bigint[], %(unsettled)s::bigint[])
    ON CONFLICT (process_id, agent) DO UPDATE SET
        served = excluded.served, unsettled = excluded.unsettled, counted_at = now()
"""
_CLOSE = """
    INSERT INTO run_counts AS known (process_id, agent, served, unsettled, closed_at)
    SELECT %(process)s, agent, served, 0, now()
    FROM unnest(%(agents)s::text[], %(served)s::bigint[]) AS final (agent, served)
    ON CONFLICT (process_id, agent) DO UPDATE SET
        served = excluded.served, unsettled = 0, counted_at = now(), closed_at = coalesce(known.closed_at, now())
"""
_DROP = "INSERT INTO run_drops (agent, reason, count, process_id) VALUES (%s, %s, %s, %s)"
_DROP_UP_TO = """
    INSERT INTO run_drops (agent, reason, count, process_id)
    SELECT %(agent)s, %(reason)s, missing, %(process)s
    FROM (SELECT %(total)s - coalesce(sum(count), 0) AS missing FROM run_drops
          WHERE process_id = %(process)s AND agent = %(agent)s AND reason = %(reason)s) AS stored
    WHERE missing > 0
"""
# By agent: what was reported as served, and of how many the fate is known.
_KNOWN = """
    WITH fates AS (
        SELECT agent, count(*) AS known FROM runs
        WHERE process_id = %(process)s AND started_at >= %(since)s GROUP BY agent
        UNION ALL
        SELECT agent, sum(count) FROM run_drops WHERE process_id = %(process)s GROUP BY agent
    ), reports AS (SELECT agent, served FROM run_counts WHERE process_id = %(process)s)
    SELECT agent, coalesce(max(served), 0)::bigint, coalesce(sum(known), 0)::bigint
    FROM fates FULL JOIN reports USING (agent) GROUP BY agent
"""
