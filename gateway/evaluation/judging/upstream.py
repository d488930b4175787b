"""One judge call on its way to the provider: its turn, its attempts, and what it used."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import psycopg
import structlog

from gateway.evaluation.judging.breaker import Breaker, Passage
from gateway.evaluation.judging.budget import Spent
from gateway.evaluation.judging.leases import Lease, Problem, ProblemKind, Usage
from gateway.evaluation.judging.limits import JudgeLimits, ModelLimits, RequestRate, SlotKeeper
from gateway.evaluation.judging.litellms import LiteLLMTransport
from gateway.evaluation.judging.prices import Price, Prices, Tokens
from gateway.evaluation.judging.spending import SpendingBook
from gateway.evaluation.judging.wire import (
    LITELLM_SCHEME,
    Call,
    error_message,
    estimated_tokens,
    json_object,
    retry_after_s,
    tokens_of,
)

log = structlog.get_logger(__name__)

_LONGEST_BACKOFF_S = 20.0
_FAILED = 424  # MLflow's judges retry 429, 500, 502 and 503; this one they take for an answer
_TRANSIENT = frozenset({408, 409, 425, 429})
_UNUSABLE = frozenset({401, 402, 403, 404, 407})
"""The key, the account or the model's name is wrong: no call will do better until a person mends it."""
_RETRIED: frozenset[ProblemKind] = frozenset({"rate_limited", "server_error", "timeout", "connection", "nonsense"})


@dataclass(frozen=True)
class Reply:
    """What the judge gets."""

    status: int
    body: bytes


@dataclass
class JudgeModel:
    """What this worker knows of one model."""

    name: str
    limits: ModelLimits
    price: Price | None
    breaker: Breaker
    usage: Usage = field(default_factory=Usage)
    """Since this worker began."""
    held_until: float = 0.0
    """Until when the provider asked everybody to wait."""
    last_failure: str | None = None
    """What was wrong with the last call that failed."""

    def expected(self, call: Call) -> Spent:
        """Return what a call will probably take: its prompt, and an answer as long as they were so far."""
        tokens = Tokens(call.estimated_tokens, self.usage.tokens.output // max(self.usage.calls, 1))
        return Spent(self.price.cost(tokens) if self.price is not None else 0.0, tokens.total)


def failed(problem: Problem) -> Reply:
    """Return a problem as an answer that MLflow's judges do not retry."""
    message = httpx.Response(_FAILED, json={"error": {"message": problem.message, "type": problem.kind}})
    return Reply(_FAILED, message.content)


class Upstream:
    """Sends calls to the providers, within every limit."""

    def __init__(
        self,
        limits: JudgeLimits,
        prices: Prices,
        slots: SlotKeeper,
        rate: RequestRate,
        *,
        book: SpendingBook,
        may_call: Callable[[], Awaitable[bool]],
        clock: Callable[[], float],
    ):
        """Take the parts.

        Args:
            limits: of attempts, times and models.
            prices: by model.
            slots: concurrency over all workers.
            rate: requests a minute over all workers.
            book: is told what each attempt took.
            may_call: whether the budget allows a call at all.
            clock: seconds that only grow.
        """
        self._limits = limits
        self._prices = prices
        self._slots = slots
        self._rate = rate
        self._book = book
        self._may_call = may_call
        self._clock = clock
        # Times are bounded here, connections by the slots.
        self._client = httpx.AsyncClient(
            timeout=None,  # noqa: S113
            limits=httpx.Limits(max_connections=None),
            mounts={LITELLM_SCHEME: LiteLLMTransport(limits.call_timeout_s)},
        )
        self.models: dict[str, JudgeModel] = {}
        """What was asked so far, by model."""

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, call: Call, lease: Lease) -> Reply:
        """Return the provider's answer, or why there is none, after as many attempts as are worth it."""
        model = await self._model(call.model)
        attempt = 0
        while True:
            attempt += 1
            got = await self._attempt(call, lease, model)
            if isinstance(got, Reply):
                return got
            lease.problem = got
            pause_s = self._pause_s(attempt, got)
            if got.kind not in _RETRIED or attempt >= self._limits.attempts or pause_s >= lease.left_s:
                log.info(
                    "a judge call failed", scoring=lease.scoring_id, model=model.name, kind=got.kind, tries=attempt
                )
                return failed(got)
            await asyncio.sleep(pause_s)

    def refused(self, problem: Problem, lease: Lease) -> Reply:
        """Count a call that does not leave, or is given up."""
        lease.problem = problem
        lease.usage.outcomes[problem.kind] += 1
        return failed(problem)

    async def _model(self, name: str) -> JudgeModel:
        if name not in self.models:
            price = await asyncio.to_thread(self._prices.of, name)
            breaker = Breaker(self._clock, failures=self._limits.breaker_failures, open_s=self._limits.breaker_open_s)
            self.models.setdefault(name, JudgeModel(name, self._limits.of(name), price, breaker))
        return self.models[name]

    def _pause_s(self, attempt: int, problem: Problem) -> float:
        longest_s: float = min(self._limits.backoff_s * 2 ** (attempt - 1), _LONGEST_BACKOFF_S)
        return max(random.uniform(0.5, 1.0) * longest_s, problem.retry_after_s or 0.0)  # noqa: S311 - no secret

    async def _attempt(self, call: Call, lease: Lease, model: JudgeModel) -> Reply | Problem:
        got = await self._stopped(call, lease, model) or await self._in_turn(call, lease, model)
        if isinstance(got, Problem):
            if got.kind in _RETRIED:
                model.last_failure = got.message
            for usage in (lease.usage, model.usage):
                usage.outcomes[got.kind] += 1
        return got

    async def _stopped(self, call: Call, lease: Lease, model: JudgeModel) -> Problem | None:
        """Return what speaks against this call whether or not it is its turn."""
        if not await self._may_call():
            return Problem("budget_used_up", "The budget of the judges is used up.")
        if (problem := lease.refusal(call.estimated_tokens)) is not None:
            return problem
        return _left_alone(model) if model.breaker.wait_s else None

    async def _in_turn(self, call: Call, lease: Lease, model: JudgeModel) -> Reply | Problem:
        """Wait for the turn, then send. The slot comes first: a promised moment must not pass while waiting for it."""
        if (held_s := model.held_until - self._clock()) > 0:
            if held_s >= lease.left_s:
                return Problem("rate_limited", f"{model.name} asks to wait longer than the scoring may take.", held_s)
            await asyncio.sleep(held_s)
        try:
            async with self._slots.slot(model.name, model.limits.concurrency):
                wait_s = await self._rate.reserve(model.name, model.limits.requests_per_minute, lease.left_s)
                if wait_s is None:
                    return Problem("busy", f"The calls a minute that {model.name} may get are promised to others.")
                await asyncio.sleep(wait_s)
                passage = model.breaker.admit()
                if passage is None:
                    return _left_alone(model)
                try:
                    if (problem := await self._stopped(call, lease, model)) is not None:
                        return problem
                    with self._book.expecting(model.expected(call)):
                        return await self._send(call, lease, model, passage)
                finally:
                    passage.abandoned()
        except psycopg.OperationalError:
            return Problem("unavailable", "The limits of the judges cannot be read: the database is away.")

    async def _send(self, call: Call, lease: Lease, model: JudgeModel, passage: Passage) -> Reply | Problem:
        began = self._clock()
        own_limit = lease.left_s > self._limits.call_timeout_s
        try:
            async with asyncio.timeout(min(self._limits.call_timeout_s, lease.left_s)):
                response = await self._client.post(call.url, content=call.body, headers=call.headers)
        except TimeoutError:
            if own_limit:
                passage.failed()
            self._count(lease, model, Tokens(call.estimated_tokens), began)
            return Problem("timeout", f"{model.name} did not answer within {self._clock() - began:.0f} s.")
        except httpx.HTTPError as error:
            passage.failed()
            # It may have worked on what it got, and then it takes its price.
            sent = not isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol)
            self._count(lease, model, Tokens(call.estimated_tokens if sent else 0), began)
            return Problem("connection", f"{model.name} cannot be reached: {type(error).__name__}.")
        except asyncio.CancelledError:
            self._count(lease, model, Tokens(call.estimated_tokens), began)
            raise
        return self._judge(call, response, lease, model, passage, began)

    def _judge(
        self, call: Call, response: httpx.Response, lease: Lease, model: JudgeModel, passage: Passage, began: float
    ) -> Reply | Problem:
        """Say what an answer is worth, and count what it took."""
        status, body = response.status_code, response.content
        answer = json_object(body)
        tokens = tokens_of(answer) if answer is not None else None
        if response.is_success:
            self._count(lease, model, tokens or Tokens(call.estimated_tokens, estimated_tokens(body)), began)
            if answer is None or (call.url.endswith("/chat/completions") and not answer.get("choices")):
                passage.failed()
                return Problem("nonsense", f"{model.name} answered what is no answer of its API.")
            passage.succeeded()
            lease.problem = None
            for usage in (lease.usage, model.usage):
                usage.outcomes["answered"] += 1
            return Reply(status, body)
        self._count(lease, model, tokens or Tokens(), began)
        said = f"{model.name} answered {status}: {error_message(body)}"
        if status == 429:
            wait_s = retry_after_s(dict(response.headers))
            model.held_until = max(model.held_until, self._clock() + (wait_s or 0.0))
            return Problem("rate_limited", said, wait_s)
        if status in _TRANSIENT or status >= 500:
            passage.failed()
            return Problem("server_error", said, retry_after_s(dict(response.headers)))
        return self._refused_by(passage, status, body, lease, said)

    def _refused_by(self, passage: Passage, status: int, body: bytes, lease: Lease, said: str) -> Reply | Problem:
        """Pass a refusal on: MLflow's judges react to some, by a shorter prompt or another format."""
        if status in _UNUSABLE:
            passage.failed()
        else:
            passage.succeeded()
        problem = Problem("refused", said)
        if status < 400:  # a redirect; the judge would follow it, past every limit
            return problem
        self.refused(problem, lease)
        return Reply(status, body)

    def _count(self, lease: Lease, model: JudgeModel, tokens: Tokens, began: float) -> None:
        latency_s = self._clock() - began
        cost_usd = None if model.price is None else model.price.cost(tokens)
        for usage in (lease.usage, model.usage):
            usage.add(tokens, cost_usd, latency_s)
        self._book.add(model.name, tokens, cost_usd)


def _left_alone(model: JudgeModel) -> Problem:
    wait_s = model.breaker.wait_s
    last = f" (at last: {model.last_failure})" if model.last_failure else ""
    said = f"{model.name} failed again and again{last}; it is asked again in {wait_s:.0f} s."
    return Problem("breaker_open", said, wait_s)
