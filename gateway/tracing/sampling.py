"""Which conversations are kept, why, and with what probability: pure functions of settings, session and outcome.

A session is drawn once, at its first turn: its id is mapped to a point in [0, 1) by a keyed hash, and the draw keeps
it if the point lies below the rate of the agent that answers. The rate is pinned with it, so that the whole
conversation shares one fate, whatever becomes of the rate meanwhile.

Tail rules keep what matters regardless. A turn that meets one promotes its whole conversation, the turns before it
included as long as they are held.

The inclusion probability is a property of the outcome, not of the way in: a conversation that meets a tail rule would
have been kept whatever its draw, so its probability is 1, even if the draw had kept it. Weighting by its inverse (the
estimator of Horvitz and Thompson, 1952) makes means over kept traces those of the whole traffic.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from gateway.crypto import keyed_hash
from gateway.rules import TailRule
from gateway.settings import Settings
from gateway.tracing.spans import Outcome

_SCALE = 2**64

SAMPLED = "sampled"
"""Reason for which a trace is kept that the draw alone keeps."""


def keep_session(key: bytes, session_id: str, rate: float) -> bool:
    """Whether the draw keeps the traces of this session.

    All turns of a session share one fate in every web process, nobody without the key can choose an id that is never
    looked at, and raising the rate only adds sessions.

    Args:
        key: 32 bytes, one deployment's.
        session_id: as the client gave it, or as generated.
        rate: 0.0 keeps none, 1.0 all.
    """
    return rate >= 1.0 or (rate > 0.0 and draw(key, session_id) < rate)


def draw(key: bytes, *subject: str) -> float:
    """Return the subject's point in [0, 1), uniform over subjects, always the same for one subject and key."""
    return int.from_bytes(keyed_hash(key, *subject)[:8], "big") / _SCALE


def rate_of(settings: Settings, agent: str) -> float:
    """Return the rate by which new sessions that begin with this agent are drawn."""
    rule = settings.agents.get(agent)
    return settings.sample_rate if rule is None or rule.sample_rate is None else rule.sample_rate


def rules_met(settings: Settings, agent: str, outcome: Outcome, *, asked: bool) -> tuple[TailRule, ...]:
    """Return the tail rules that a turn meets, in the order of the settings; ``asked``: the client asked to keep it."""
    rule = settings.agents.get(agent)
    slow_s = settings.tail_slow_s if rule is None or rule.slow_s is None else rule.slow_s
    met: dict[TailRule, bool] = {
        "error": outcome.failed,
        "tool_error": outcome.tool_failed,
        "guardrail": outcome.guardrail_tripped,
        "slow": outcome.duration_s >= slow_s,
        "asked": asked,
    }
    return tuple(each for each in settings.tail_rules if met[each])


class Draw(NamedTuple):
    """What is known of a run's sampling before it ends."""

    rate: float
    """Rate by which its session was drawn, or is now."""
    drawn: bool
    """Whether the draw keeps the session."""
    asked: bool
    """The client asked to keep it."""


class Decision(NamedTuple):
    """What becomes of a conversation, as far as its turns are known."""

    kept: bool
    """If not, its turns are held for as long as a later one may meet a tail rule."""
    reasons: tuple[str, ...]
    """Why it is kept: `SAMPLED`, the tail rules that it met, or both. Empty if it is not."""
    probability: float
    """Probability with which conversations like it are kept."""


def decide(*, drawn: bool, rate: float, rules: Iterable[str]) -> Decision:
    """Return what becomes of a conversation.

    Args:
        drawn: whether the draw keeps it, at its pinned rate.
        rate: that rate.
        rules: tail rules that its turns met so far.
    """
    met: Collection[str] = tuple(dict.fromkeys(rules))
    reasons = (*([SAMPLED] if drawn else []), *met)
    return Decision(bool(reasons), reasons, 1.0 if met else rate)
