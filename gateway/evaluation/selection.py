"""Which scorers score a subject, with what probability, and why the others do not: pure functions.

Each scorer draws its share with a salt of its own, so that shares are independent of each other and of the sampling
of sessions. The budget multiplies the shares of judges, the pressure on the machine those of all; since the draw is the
same point for any share, lowering it only takes subjects away, and raising it brings them back.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.scoring import LiveScorer, NotApplicable, Score, ScorerOutcome
from gateway.tracing.sampling import draw

SHARE = "share"
BUDGET = "budget"
PRESSURE = "pressure"


class Room(NamedTuple):
    """How much may be scored now: factors in [0, 1] on the shares of the scorers."""

    budget: float = 1.0
    """By the money and the tokens that judges have left; on judges alone."""
    pressure: float = 1.0
    """By the machine and the database."""


AMPLE = Room()


class Selected(NamedTuple):
    """A scorer that is to score the subject."""

    live: LiveScorer
    probability: float
    """With which it scores it, given that the subject's trace was kept."""


class Selection(NamedTuple):
    """What becomes of a subject."""

    in_code: list[Selected]
    """Scorers in plain code that score it."""
    judges: list[Selected]
    """Judges that score it."""
    skips: dict[str, str]
    """By scorer that is for this agent and does not score it: what of its rule keeps it away (``status``, ``tag``,
    ``tool``, ``latency``), ``share``, ``budget`` or ``pressure``."""


def select(scorers: Iterable[LiveScorer], key: bytes, facts: TraceFacts, subject: str, room: Room = AMPLE) -> Selection:
    """Decide for one trace or conversation.

    Args:
        scorers: of traces, or of conversations.
        key: 32 bytes, one deployment's.
        facts: what filters may ask.
        subject: trace id or session id.
        room: how much may be scored now.
    """
    in_code: list[Selected] = []
    judges: list[Selected] = []
    skips: dict[str, str] = {}
    for live in scorers:
        if (reason := live.applies(facts)) == "agent":
            continue
        share = live.rule.share
        afforded = share * room.budget if live.is_judge else share
        probability = afforded * room.pressure
        point = draw(key, "scorer", live.name, subject)
        if reason is not None:
            skips[live.name] = reason
        elif point >= share:
            skips[live.name] = SHARE
        elif point >= afforded:
            skips[live.name] = BUDGET
        elif point >= probability:
            skips[live.name] = PRESSURE
        else:
            (judges if live.is_judge else in_code).append(Selected(live, probability))
    return Selection(in_code, judges, skips)


def scores_of(selected: Selected, outcome: ScorerOutcome, skips: dict[str, str]) -> list[Score]:
    """Return what a selected scorer said, with its probability; where it does not apply, ``skips`` is told why."""
    if isinstance(outcome, NotApplicable):
        skips[selected.live.name] = outcome.reason
    return [replace(score, inclusion_probability=selected.probability) for score in outcome.scores]


def affordable(live: LiveScorer, key: bytes, subject: str, budget_share: float) -> float | None:
    """Return the share of subjects that a judge can score now; ``None``: this one is not among them.

    Asked again when a judgement is begun, which may be long after it was drawn: the budget may be used up by then.
    """
    share = live.rule.share * budget_share
    return share if draw(key, "scorer", live.name, subject) < share else None
