"""Whether the ledger adds up: the runs served, as the web processes count them, against the rows.

The counters are kept apart from the rows (`gateway.tracing.handover.tally`, table ``run_counts``), so that what a crash
took is seen. Over the whole life of the deployment, and for every process and agent alone::

    served = rows + counted as dropped + not settled yet, if the process lives

A process stores its counters in the transaction that stores rows, so that this holds at every moment.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import psycopg
from psycopg.rows import class_row

from gateway.storage.signals import LIVING


class ProcessCount(msgspec.Struct):
    """The runs of a web process whose counters are not closed, or do not agree with the rows."""

    process_id: int
    host: str | None
    """``None``: it is gone for long."""
    status: Literal["living", "left", "closed"]
    """``left``: it is gone, and nobody has settled its counters yet."""
    served: int
    """Runs that it has begun to serve."""
    unsettled: int
    """Of these, as it last said, those under way or on the way into the ledger."""
    difference: int
    """``served``, less what is in the ledger, less ``unsettled`` if it lives."""


class Check(msgspec.Struct):
    """Whether the states add up to the runs served, over the whole life of the deployment."""

    adds_up: bool
    says: str
    """The result in words."""
    served: int
    """Runs begun, as the web processes counted them."""
    rows: int
    """Runs that have a row in the ledger."""
    dropped: int
    """Runs that have none, and are counted by reason."""
    unsettled: int
    """Runs under way, or on the way into the ledger, of processes that live."""
    difference: int
    """``served - rows - dropped - unsettled``. It may be 0 although it does not add up, where two cancel out."""
    agents: dict[str, int]
    """The differences that are not 0, by agent."""
    processes: list[ProcessCount]
    """Those that live, were left open, or differ."""


class Count(NamedTuple):
    """What is known of the runs of one process and agent."""

    process_id: int
    agent: str
    served: int
    unsettled: int
    rows: int
    dropped: int
    closed: bool
    """Its counters are final."""
    living: bool
    host: str | None

    @property
    def difference(self) -> int:
        """Runs that are missing in the ledger; below 0: runs that nobody counted."""
        return self.served - self.rows - self.dropped - (self.unsettled if self.living else 0)


async def read_check(connection: psycopg.AsyncConnection[Any]) -> Check:
    """Return whether the ledger adds up; it takes a look at every row of the ledger."""
    async with connection.cursor(row_factory=class_row(Count)) as cursor:
        await cursor.execute(_COUNTS)
        return check(await cursor.fetchall())


def check(counts: Sequence[Count]) -> Check:
    """Return whether every process and agent has as many runs in the ledger as it has served, and what it says."""

    def total(of: Callable[[Count], int]) -> int:
        return sum(map(of, counts))

    agents = dict.fromkeys(sorted({each.agent for each in counts}), 0)
    for each in counts:
        agents[each.agent] += each.difference
    found = Check(
        adds_up=not any(each.difference for each in counts),
        says="",
        served=total(lambda each: each.served),
        rows=total(lambda each: each.rows),
        dropped=total(lambda each: each.dropped),
        unsettled=total(lambda each: each.unsettled if each.living else 0),
        difference=total(lambda each: each.difference),
        agents={agent: difference for agent, difference in agents.items() if difference},
        processes=_processes(counts),
    )
    found.says = " ".join([_sum(found), *map(_about, found.processes)]).strip()
    return found


def _processes(counts: Sequence[Count]) -> list[ProcessCount]:
    processes: dict[int, ProcessCount] = {}
    for each in counts:
        status: Literal["living", "left", "closed"] = "living" if each.living else "closed" if each.closed else "left"
        if status != "closed" or each.difference:
            new = ProcessCount(each.process_id, each.host, status, 0, 0, 0)
            process = processes.setdefault(each.process_id, new)
            process.served += each.served
            process.unsettled += each.unsettled
            process.difference += each.difference
    return [processes[process_id] for process_id in sorted(processes)]


def _sum(found: Check) -> str:
    parts = [
        f"{found.served} served",
        f"{found.rows} in the ledger",
        f"{found.dropped} without a row, counted as dropped",
        f"{found.unsettled} under way or on the way into the ledger",
    ]
    shown = "; ".join([*parts[:2], *parts[2:3] * bool(found.dropped), *parts[3:] * bool(found.unsettled)])
    return f"It {'adds up' if found.adds_up else 'does not add up'} over all time: {shown}."


def _about(process: ProcessCount) -> str:
    """Return what there is to say of a process; empty if all is well."""
    name = f"Web process {process.process_id}" + (f" on host {process.host}" if process.host else "")
    if process.difference < 0:
        return (
            f"{name} has {-process.difference} more in the ledger than it counted: were rows, or counts, brought back "
            "from a copy, or deleted?"
        )
    if process.status == "left":
        missing = f"{process.difference} of its runs are missing" if process.difference else "no run is known to miss"
        return (
            f"{name} is gone and was not settled: {missing}. The next web process that starts there with the same "
            "GATEWAY_HOME does that; what cannot be found is dropped (crash) then."
        )
    return f"{name} has served {process.difference} that are nowhere in the ledger." if process.difference else ""


# Process 0: what was served before there were counters. In one statement, so that all is of one moment.
_COUNTS = f"""
    WITH entries AS (
        SELECT process_id, agent, sum(rows) AS rows, sum(dropped) AS dropped FROM (
            SELECT coalesce(process_id, 0) AS process_id, agent, count(*) AS rows, 0 AS dropped
            FROM runs GROUP BY 1, 2
            UNION ALL
            SELECT coalesce(process_id, 0), agent, 0, sum(count) FROM run_drops GROUP BY 1, 2) AS found
        GROUP BY 1, 2)
    SELECT process_id, agent, coalesce(served, 0) AS served, coalesce(unsettled, 0) AS unsettled,
           coalesce(rows, 0)::bigint AS rows, coalesce(dropped, 0)::bigint AS dropped,
           run_counts.process_id IS NULL OR closed_at IS NOT NULL AS closed,
           process_id IN ({LIVING}) AS living, host
    FROM run_counts FULL JOIN entries USING (process_id, agent) LEFT JOIN web_processes USING (process_id)
    ORDER BY process_id, agent
"""
