"""Which scorers score a subject, with what probability, and why the others do not: pure functions.

Each scorer draws its share with a salt of its own, so that shares are independent of each other and of the sampling
of sessions. A budget multiplies the shares of judges; since the draw is the same point for any share, lowering it only
takes subjects away, and raising it brings them back.
"""

from collections.abc import Iterable
from typing import NamedTuple

from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.scoring import LiveScorer
from gateway.tracing.sampling import draw

SHARE = "share"
BUDGET = "budget"


class Selected(NamedTuple):
    """A scorer that is to score the subject."""

    live: LiveScorer
    probability: float
    """With which it scores it, given that the subject's trace was kept."""


class Selection(NamedTuple):
    """What becomes of a subject."""

    selected: list[Selected]
    skips: dict[str, str]
    """By scorer that is for this agent and does not score it: what of its rule keeps it away (``status``, ``tag``,
    ``tool``, ``latency``), ``share`` or ``budget``."""


def select(
    scorers: Iterable[LiveScorer], key: bytes, facts: TraceFacts, subject: str, *, budget_share: float = 1.0
) -> Selection:
    """Decide for one trace or conversation.

    Args:
        scorers: of traces, or of conversations.
        key: 32 bytes, one deployment's.
        facts: what filters may ask.
        subject: trace id or session id.
        budget_share: factor in [0, 1] by which the budget multiplies the shares of judges now.
    """
    selected: list[Selected] = []
    skips: dict[str, str] = {}
    for live in scorers:
        if (reason := live.applies(facts)) == "agent":
            continue
        share = live.rule.share
        affordable = share * budget_share if live.is_judge else share
        point = draw(key, "scorer", live.name, subject)
        if reason is not None:
            skips[live.name] = reason
        elif point >= share:
            skips[live.name] = SHARE
        elif point >= affordable:
            skips[live.name] = BUDGET
        else:
            selected.append(Selected(live, affordable))
    return Selection(selected, skips)


def affordable(live: LiveScorer, key: bytes, subject: str, budget_share: float) -> float | None:
    """Return the share of subjects that a judge can score now; ``None``: this one is not among them.

    Asked again when a judgement is begun, which may be long after it was drawn: the budget may be used up by then.
    """
    share = live.rule.share * budget_share
    return share if draw(key, "scorer", live.name, subject) < share else None
