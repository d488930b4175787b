"""A batch: several runs in one request, in the forms of MLflow's scoring server.

Every row is a run like any other, with a trace and a session of its own unless it names one. All rows are looked at
before the first one runs. Some run at once; rows of one session run one after the other, in order.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from litestar import Request, Response

from gateway.errors import GatewayError, InvalidRequest, RunCancelled, ServiceUnavailable
from gateway.http.access import caller_of
from gateway.http.dataframes import Row, rows_of
from gateway.http.requests import BodyRules
from gateway.http.serving import CLIENT_LEFT, Form, Service, reply, traced
from gateway.http.streaming import watch
from gateway.runs.active import STOPPING, ActiveRun
from gateway.runs.requests import RunRequest, RunResult
from gateway.runs.runner import AgentRunner
from gateway.settings import Settings

Prepare = Callable[[dict[str, Any], Mapping[str, str], BodyRules, str], tuple[RunRequest, Form]]
"""Decodes a body: takes it, the headers, the bounds of a request and the key's id."""


class Batch:
    """The runs of one request in a scoring form."""

    def __init__(self, request: Request[Any, Any, Any], service: Service, body: dict[str, Any], prepare: Prepare):
        """Take the request, its decoded body, and what decodes a row."""
        settings: Settings = request.app.state.settings
        self._settings = settings
        self._request = request
        self._service = service
        self._body = body
        self._prepare = prepare
        self._max_rows = settings.max_input_items
        self._at_once = asyncio.Semaphore(settings.batch_concurrency)
        self._runner: AgentRunner = request.app.state.runner
        self._caller = caller_of(request)
        self._active: set[ActiveRun] = set()
        self._ended: GatewayError | None = None

    async def answer(self, raw: bytes) -> Response[Any]:
        """Run every row and answer with a prediction each, in order."""
        if self._body.get("stream"):
            raise InvalidRequest("A batch has no stream. Send its rows one by one, or leave stream out.", "stream")
        rows = rows_of(self._body, max_rows=self._max_rows)
        wanted = [self._prepared(row) for row in rows]  # all, before the first one runs
        claim = await self._service.claim(self._request, raw, self._caller)
        if isinstance(claim, Response):
            return claim
        try:
            async with self._service.admitted(self._caller), watch(self._request.receive, self._leave):
                outcomes = await self._run(wanted)
            _raise_if_nothing_came(outcomes)
            predictions = [
                _prediction(row, form, outcome) for row, (_, form), outcome in zip(rows, wanted, outcomes, strict=True)
            ]
            return await reply({"predictions": predictions}, claim)
        except BaseException:
            if claim is not None:
                await claim.drop()
            raise

    def _prepared(self, row: Row) -> tuple[RunRequest, Form]:
        try:
            wanted, form = self._prepare(row.body, {}, self._service.rules, self._caller.key_id)
        except InvalidRequest as error:
            raise InvalidRequest(f"{row.where}: {error}", f"{row.where}.{error.param}") from None
        self._service.check_agent(self._caller, wanted.agent)
        return replace(traced(wanted, self._request), stream=False), form

    async def _run(self, wanted: list[tuple[RunRequest, Form]]) -> list[RunResult | BaseException]:
        """Run all; rows of one session run in order, one after the other."""
        after: dict[str, asyncio.Task[RunResult]] = {}
        tasks = []
        for request, _ in wanted:
            earlier = after.get(request.session_id) if request.session_id else None
            tasks.append(asyncio.create_task(self._run_one(request, earlier)))
            if request.session_id:
                after[request.session_id] = tasks[-1]
        try:
            return await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            self._end(ServiceUnavailable(STOPPING))
            raise

    def _leave(self) -> None:
        for active in self._active:
            active.capture.trace.client_left = True
        if self._settings.on_disconnect == "cancel":
            self._end(RunCancelled(CLIENT_LEFT))

    def _end(self, reason: GatewayError) -> None:
        self._ended = reason
        for active in self._active:
            active.cancel(reason)

    def _take_in(self, active: ActiveRun) -> None:
        self._active.add(active)
        if self._ended is not None:  # while it began
            active.cancel(self._ended)

    async def _run_one(self, request: RunRequest, earlier: asyncio.Task[RunResult] | None) -> RunResult:
        if earlier is not None:
            await asyncio.wait([earlier])
        async with self._at_once:
            if self._ended is not None:
                raise self._ended
            active = await self._runner.start(request)
            self._take_in(active)
            try:
                return await active.result()
            finally:
                self._active.discard(active)


def _raise_if_nothing_came(outcomes: list[RunResult | BaseException]) -> None:
    """Raise what went wrong if it is not a run's own failure, or if every run failed."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, GatewayError):
            raise outcome
    first = outcomes[0]
    if isinstance(first, BaseException) and all(isinstance(outcome, BaseException) for outcome in outcomes):
        raise first


def _prediction(row: Row, form: Form, outcome: RunResult | BaseException) -> Any:
    """Return a text for a text, an answer object for a conversation, and an error object where the run failed."""
    if isinstance(outcome, RunResult):
        return outcome.answer if row.is_text else form.json(outcome.run, outcome)
    code = outcome.code if isinstance(outcome, GatewayError) else GatewayError.code
    trace_id = getattr(outcome, "trace_id", None)
    return {"error_code": code, "message": str(outcome)} | ({"trace_id": trace_id} if trace_id else {})
