"""Why a conversation was kept, told to MLflow again when a later turn has changed it.

A turn that meets a tail rule promotes its whole conversation, and so changes what the ledger says of the turns before
it. Those that are in MLflow by then get their tags written anew, once the ledger is committed; while MLflow is away, it
is done later.

Two things may be under way meanwhile. More rules: then it is not done, and begun again. A trace that was claimed
before the promotion and is written after it: who takes it out of the outbox compares what was written with the ledger,
and asks for another round (`gateway.evaluation.intake`). If that happens while a round is under way, the trace was not
among those that the round had looked at, which the round notices at its end, with the conversation's row locked.
"""

import asyncio
from collections import defaultdict
from typing import Any

from gateway.evaluation.export import kept_tags
from gateway.evaluation.store import MlflowStore, is_away
from gateway.storage.database import Pool
from gateway.storage.schema import KEPT

_AT_ONCE = 100  # conversations of one round; the next round takes the rest
_LOCK = 0x6167_7468  # one evaluator at a time: a second one would only repeat the first


class TagProjection:
    """Writes the tags of promoted conversations."""

    def __init__(self, pool: Pool, store: MlflowStore):
        self._pool = pool
        self._store = store

    async def project(self) -> int:
        """Write the tags of promoted conversations anew; return how many conversations are done."""
        async with self._pool.connection() as connection, connection.transaction():
            lock = await connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_LOCK])
            if (await lock.fetchone()) != (True,):
                return 0
            cursor = await connection.execute(_PROMOTED, [_AT_ONCE])
            promoted: dict[str, str] = dict(await cursor.fetchall())  # type: ignore[arg-type]
            if not promoted:
                return 0
            cursor = await connection.execute(f"SELECT session_id, {_KEPT}", [list(promoted)])
            tags: defaultdict[str, dict[str, dict[str, str]]] = defaultdict(dict)
            for session_id, trace_id, probability, reasons in await cursor.fetchall():
                tags[str(session_id)][str(trace_id)] = kept_tags(probability, reasons)  # type: ignore[arg-type]
            every = {trace_id: each for of_session in tags.values() for trace_id, each in of_session.items()}
            try:
                await asyncio.to_thread(self._store.tag_traces, every)
            except Exception as error:
                if is_away(error):  # which the intake says in the log, once
                    return 0
                raise
            return sum([await self._done(session, rules, tags[session]) for session, rules in promoted.items()])

    async def _done(self, session_id: str, rules: str, tags: dict[str, Any]) -> bool:
        """Note that MLflow says what the ledger says, if it is still so; else the next round looks again."""
        async with self._pool.connection() as connection, connection.transaction():
            # On its own: what comes after it is to see what those did who had the row before.
            await connection.execute("SELECT FROM sampled_sessions WHERE session_id = %s FOR UPDATE", [session_id])
            cursor = await connection.execute(_DONE, {"session": session_id, "rules": rules, "done": list(tags)})
            return cursor.rowcount == 1


_PROMOTED = """
    SELECT session_id, rules::text FROM sampled_sessions WHERE promoted_at IS NOT NULL AND projected_at IS NULL
    ORDER BY promoted_at LIMIT %s
"""
# What is in the outbox is written with what the ledger says when it is claimed, or compared with it afterwards.
_IN_MLFLOW = f"{KEPT} AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.trace_id = runs.trace_id)"
_KEPT = f"trace_id, inclusion_probability, kept_because FROM runs WHERE session_id = ANY(%s) AND {_IN_MLFLOW}"
_DONE = f"""
    UPDATE sampled_sessions SET projected_at = now()
    WHERE session_id = %(session)s AND rules::text = %(rules)s
      AND NOT EXISTS (SELECT 1 FROM runs WHERE session_id = %(session)s AND trace_id <> ALL(%(done)s::text[])
                        AND {_IN_MLFLOW})
"""
