"""The second destination: kept traces to any collector, by OTLP over HTTP with protobuf.

Contract: the OpenTelemetry Protocol (https://opentelemetry.io/docs/specs/otlp/#otlphttp), its statuses and its retries
included. A trace gets here once MLflow has it; an outage of the collector delays nothing but this. A trace is sent at
least once. After a day it is given up, and counted in the log.

Rows are claimed by a lease, not by a lock: whoever forgets a trace must not wait for a collector.
"""

import asyncio
import gzip
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import httpx
import structlog
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from psycopg.rows import class_row

from gateway.crypto import Keys, WrongKey
from gateway.evaluation.conventions import to_opentelemetry
from gateway.settings import Settings
from gateway.storage.database import Pool
from gateway.tracing.spans import decode

log = structlog.get_logger(__name__)

_BATCH = 50
_LOOK_S = 0.5  # how soon a trace is seen; the batches make up for looking often
_TIMEOUT_S = 10.0  # what OpenTelemetry's exporters give a collector
_LEASE_S = 60.0  # longer than a batch takes, also one by one; after it, its evaluator is taken for dead
_LONGEST_PAUSE_S = 60.0
_ATTEMPTS = 5  # of a trace, after which it may itself be what the collector fails on
_FAILURES = 3  # of single traces of a batch: with the batch's own, time-outs that fit into the lease
_GZIP_LEVEL = 1  # most of the gain for a third of the time
_REFUSED = frozenset({400, 413, 422})  # of this very content: sending it again would change nothing


class _Waiting(NamedTuple):
    trace_id: str
    payload: bytes
    attempts: int
    """How often it was claimed, this time included."""
    probability: float
    """Inclusion probability of the trace, as the ledger has it now."""
    reasons: list[str]
    """Why it is kept."""


class _Answer(Enum):
    """What became of a request."""

    TAKEN = auto()
    REFUSED = auto()
    AWAY = auto()


class OtlpSender:
    """Sends what waits in ``otlp_outbox``. Any number of evaluators may do so at once."""

    def __init__(self, settings: Settings, keys: Keys, pool: Pool):
        self._endpoint = settings.otlp_endpoint
        self._headers = {name: value.get_secret_value() for name, value in settings.otlp_headers.items()}
        self._cipher = keys.outbox
        self._pool = pool

    async def run(self) -> None:
        """Send until cancelled; without an endpoint, only give up what was left by an earlier setting."""
        pause_s = _LOOK_S
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, headers=self._headers) as client:
            while True:
                try:
                    is_well = await self.send_waiting(client)
                except Exception:
                    log.exception("traces could not be sent by OTLP; trying again")
                    is_well = False
                pause_s = _LOOK_S if is_well else min(2 * pause_s, _LONGEST_PAUSE_S)
                await asyncio.sleep(pause_s if self._endpoint else _LONGEST_PAUSE_S)

    async def send_waiting(self, client: httpx.AsyncClient) -> bool:
        """Send batch after batch until nothing waits; return ``False`` if the collector is away."""
        await self._give_up()
        if self._endpoint is None:
            return True
        while batch := await self._claim():
            if not await self._send(client, self._endpoint, batch):
                return False
        return True

    async def _give_up(self) -> None:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_OVERDUE)
        if cursor.rowcount:
            log.error("traces were not sent by OTLP: the collector was away for a day", dropped=cursor.rowcount)

    async def _claim(self) -> list[_Waiting]:
        parameters = {"count": _BATCH, "lease_s": _LEASE_S}
        async with self._pool.connection() as connection, connection.cursor(row_factory=class_row(_Waiting)) as cursor:
            await cursor.execute(_CLAIM, parameters)
            return await cursor.fetchall()

    async def _send(self, client: httpx.AsyncClient, endpoint: str, batch: Sequence[_Waiting]) -> bool:
        """Send a batch, one by one if one of it may be to blame; return ``False`` if the collector is away."""
        batch = await self._not_forgotten(batch)
        if not batch:
            return True
        answer = await self._post(client, endpoint, batch)
        is_suspect = any(each.attempts > _ATTEMPTS for each in batch)
        if len(batch) > 1 and (answer is _Answer.REFUSED or (answer is _Answer.AWAY and is_suspect)):
            return await self._send_singly(client, endpoint, batch)
        if answer is _Answer.AWAY:
            # Alone, one that was tried so often makes way for the others.
            await self._release(batch, _LONGEST_PAUSE_S if is_suspect and len(batch) == 1 else 0.0)
            return False
        if answer is _Answer.REFUSED:
            log.error("a trace was not sent by OTLP: the collector refuses it", trace_id=batch[0].trace_id)
        await self._done(batch)
        return True

    async def _send_singly(self, client: httpx.AsyncClient, endpoint: str, batch: Sequence[_Waiting]) -> bool:
        """Send a batch one by one, past those on which the collector fails; return ``False`` if it took none."""
        taken = failures = 0
        for position, each in enumerate(batch, start=1):
            if await self._send(client, endpoint, [each]):
                taken += 1
            else:
                failures += 1
            if failures == _FAILURES:
                await self._release(batch[position:])
                break
        return taken > 0

    async def _not_forgotten(self, batch: Sequence[_Waiting]) -> list[_Waiting]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_THERE, [[each.trace_id for each in batch]])
            there = {row[0] for row in await cursor.fetchall()}
        return [each for each in batch if each.trace_id in there]

    async def _post(self, client: httpx.AsyncClient, endpoint: str, batch: Sequence[_Waiting]) -> _Answer:
        body = await asyncio.to_thread(self._encode, batch)
        if body is None:
            return _Answer.TAKEN
        headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
        try:
            response = await client.post(endpoint, content=body, headers=headers)
        except httpx.HTTPError as error:
            log.warning("the OTLP collector is away; traces wait", error=repr(error))
            return _Answer.AWAY
        if response.is_success:
            _note_rejected(response.content)
            return _Answer.TAKEN
        if response.status_code in _REFUSED:
            return _Answer.REFUSED
        # A wrong key or address can be mended within the day, an overload passes.
        log.warning("the OTLP collector takes nothing; traces wait", status=response.status_code)
        return _Answer.AWAY

    def _encode(self, batch: Sequence[_Waiting]) -> bytes | None:
        """Return the request's body; ``None`` if nothing of the batch can be read."""
        spans = []
        for each in batch:
            try:
                trace = decode(self._cipher.decrypt(each.payload, each.trace_id))
                spans += to_opentelemetry(trace, probability=each.probability, reasons=each.reasons)
            except WrongKey:
                raise  # the evaluator is set up wrongly, the trace is not to blame: it waits
            except Exception:
                log.exception("a trace cannot be read, and is not sent by OTLP", trace_id=each.trace_id)
        return gzip.compress(encode_spans(spans).SerializeToString(), _GZIP_LEVEL) if spans else None

    async def _done(self, batch: Sequence[_Waiting]) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(_SENT, [[each.trace_id for each in batch]])

    async def _release(self, batch: Sequence[_Waiting], pause_s: float = 0.0) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(_RELEASE, [pause_s, [each.trace_id for each in batch]])


def _note_rejected(content: bytes) -> None:
    """Log what the collector took the request without; the protocol says not to send it again."""
    try:
        partial = ExportTraceServiceResponse.FromString(content).partial_success
    except Exception:  # noqa: BLE001 - an answer that is none of the protocol's: the status says enough
        return
    if partial.rejected_spans:
        log.error("the OTLP collector rejected spans", spans=partial.rejected_spans, reason=partial.error_message)


_CLAIM = """
    WITH mine AS (
        SELECT trace_id FROM otlp_outbox WHERE retry_at <= now() ORDER BY retry_at LIMIT %(count)s
        FOR UPDATE SKIP LOCKED)
    UPDATE otlp_outbox SET attempts = attempts + 1, retry_at = now() + make_interval(secs => %(lease_s)s)
    FROM mine JOIN runs USING (trace_id) WHERE otlp_outbox.trace_id = mine.trace_id
    RETURNING otlp_outbox.trace_id, payload, attempts, inclusion_probability AS probability, kept_because AS reasons
"""
_THERE = "SELECT trace_id FROM otlp_outbox WHERE trace_id = ANY(%s)"
_RELEASE = "UPDATE otlp_outbox SET retry_at = now() + make_interval(secs => %s) WHERE trace_id = ANY(%s)"
_SENT = "DELETE FROM otlp_outbox WHERE trace_id = ANY(%s)"
_OVERDUE = "DELETE FROM otlp_outbox WHERE created_at < now() - interval '1 day'"
