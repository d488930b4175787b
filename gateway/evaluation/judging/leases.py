"""What one scoring may spend on judge calls, and what it has spent."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mlflow.tracing.constant import AssessmentMetadataKey

from gateway.evaluation.judging.prices import Tokens

ProblemKind = Literal[
    "rate_limited",
    "server_error",
    "timeout",
    "connection",
    "nonsense",
    "refused",
    "breaker_open",
    "busy",
    "unavailable",
    "given_up",
    "deadline",
    "calls_used_up",
    "tokens_used_up",
    "budget_used_up",
]
_PASSING = frozenset(
    {"rate_limited", "server_error", "timeout", "connection", "nonsense", "breaker_open", "busy", "unavailable"}
)


@dataclass(frozen=True)
class Problem:
    """Why a judge's call had no answer."""

    kind: ProblemKind
    message: str
    """What happened, for the person who looks at the failed score. It may quote what the provider said."""
    retry_after_s: float | None = None
    """Seconds after which another try may succeed, where somebody said so; ``None``: nobody did."""

    @property
    def is_passing(self) -> bool:
        """The same scoring may succeed later: the model was away or busy."""
        return self.kind in _PASSING


@dataclass
class Usage:
    """What was spent."""

    calls: int = 0
    """Attempts that left, those that failed included."""
    tokens: Tokens = field(default_factory=Tokens)
    """Where an answer did not say, a quarter of the bytes; so is the prompt of an attempt that timed out."""
    cost_usd: float = 0.0
    """Of the calls whose price is known."""
    unpriced_calls: int = 0
    """Calls that used tokens at an unknown price."""
    latency_s: float = 0.0
    """Seconds that the attempts took, one after the other; waiting for a slot is not in it."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """How the attempts and the refused calls ended: ``answered`` or a problem's kind."""

    def add(self, tokens: Tokens, cost_usd: float | None, latency_s: float) -> None:
        """Count one attempt; ``cost_usd`` is ``None`` if its price is unknown."""
        self.calls += 1
        mine = self.tokens
        self.tokens = Tokens(mine.input + tokens.input, mine.output + tokens.output, mine.cached + tokens.cached)
        self.cost_usd += cost_usd or 0.0
        self.unpriced_calls += cost_usd is None and tokens.total > 0
        self.latency_s += latency_s

    def details(self) -> dict[str, str]:
        """Return what an assessment's metadata says of it, by MLflow's keys; empty if nothing was asked.

        It takes the place of what the scorer reports, which may be nothing, or one call of several.
        """
        if not self.calls:
            return {}
        details = {
            AssessmentMetadataKey.JUDGE_INPUT_TOKENS: str(self.tokens.input),
            AssessmentMetadataKey.JUDGE_OUTPUT_TOKENS: str(self.tokens.output),
            "gateway.judge_calls": str(self.calls),
        }
        if not self.unpriced_calls:
            details[AssessmentMetadataKey.JUDGE_COST] = f"{self.cost_usd:.8f}"
        return details


class Lease:
    """One scoring's leave to call judges, from `Relay.lease` until it is closed or given up.

    All methods belong to the event loop of the relay; what a scorer's thread needs is in `binding`.
    """

    def __init__(
        self,
        scoring_id: str,
        scorer: str,
        model: str,
        *,
        deadline: float,
        most_calls: int,
        most_tokens: int,
        clock: Callable[[], float],
    ):
        """Take what the scoring is and what it may spend.

        Args:
            scoring_id: names the scoring in logs.
            scorer: name of the scorer.
            model: judge model that it is expected to ask, in MLflow's form.
            deadline: moment on ``clock`` from which on nothing leaves any more.
            most_calls: attempts at the most.
            most_tokens: tokens at the most; the last answer may exceed it.
            clock: seconds that only grow.
        """
        self.lease_id = secrets.token_hex(8)
        self.scoring_id = scoring_id
        self.scorer = scorer
        self.model = model
        self.usage = Usage()
        self.problem: Problem | None = None
        """The last one; ``None``: every call so far was answered, or is under way."""
        self._deadline = deadline
        self._most_calls = most_calls
        self._most_tokens = most_tokens
        self._clock = clock
        self._given_up = asyncio.Event()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; not below 0."""
        return max(self._deadline - self._clock(), 0.0)

    def give_up(self) -> None:
        """Nobody waits for this scoring any more: end the call under way, refuse those to come."""
        self._given_up.set()

    async def until_given_up(self) -> None:
        """Return once it is given up."""
        await self._given_up.wait()

    def refusal(self, tokens: int) -> Problem | None:
        """Return why no call of about so many tokens may leave now; ``None``: it may."""
        if self._given_up.is_set():
            return Problem("given_up", "The scoring was given up; its judge is not asked any more.")
        if not self.left_s:
            return Problem("deadline", "The time for the judge calls of this scoring is over.")
        if self.usage.calls >= self._most_calls:
            return Problem("calls_used_up", f"A scoring may make {self._most_calls} judge calls, and these are made.")
        if self.usage.tokens.total + tokens > self._most_tokens:
            return Problem(
                "tokens_used_up",
                f"A scoring may use {self._most_tokens} tokens; {self.usage.tokens.total} are used, and the next call "
                f"would need some {tokens} and its answer.",
            )
        return None
