"""States that exclude each other, and whether a text says that one of them holds."""

import re

from ._words import name_words, plain, sentences, stem

# Each line is one question that has one answer at a time; each group of a line is one answer, in the words for it.
_QUESTIONS: tuple[tuple[str, ...], ...] = (
    (
        r"processing|being (?:prepared|processed|packed)|not (?:yet )?(?:been )?(?:shipped|dispatched)|unshipped",
        r"shipped|dispatched|in[ _-]transit|on (?:its|the|their) way|out for delivery"
        r"|left (?:our|the) (?:warehouse|depot)",
        r"delivered|handed over|arrived",
        r"cancell?ed|called off",
    ),
    (r"approved|accepted|granted|authori[sz]ed", r"refused|rejected|denied|declined|not approved|disapproved"),
    (r"confirmed|booked|scheduled", r"cancell?ed|called off", r"pending|waitlisted|awaiting|on hold|tentative"),
    (
        r"available|in stock|vacant|bookable",
        r"unavailable|not available|sold[ _-]out|out[ _-]of[ _-]stock|fully booked|no longer available",
    ),
    (r"paid|settled", r"unpaid|overdue|outstanding|not (?:yet )?paid"),
    (r"active|enabled|valid", r"inactive|disabled|expired|suspended|invalid|deactivated"),
    (r"open", r"closed|shut"),
    (r"on[ _-]time|on schedule", r"delayed|late"),
    (r"refundable", r"non-?[ _]?refundable|not refundable"),
    (r"eligible", r"ineligible|not eligible"),
    (r"passed|succeeded|successful", r"failed|unsuccessful"),
    (r"window(?: seat)?", r"aisle(?: seat)?"),
    (r"one[ -]way", r"round[ -]trip"),
)
_PATTERNS = tuple(tuple(re.compile(rf"\b(?:{state})\b") for state in question) for question in _QUESTIONS)
# What may be, was once, or is to be: nothing that holds now.
_NOT_NOW = re.compile(
    r"\?$|\b(?:if|unless|once|when|whether|until|before|after|can|could|may|might|must|should|would|will|'ll|cannot"
    r"|going to|soon|usually|normally|typically|any|only|expected to|due to be|to be|ready to)\b"
)
_NOT = re.compile(
    r"\b(?:not|no|never|isn't|wasn't|aren't|hasn't|haven't|weren't|don't|doesn't|didn't|nothing|none|neither|without"
    r"|can't|cannot|couldn't|won't|unable|yet to)\b"
)


def states_in(value: str) -> set[tuple[int, int]]:
    """Return the states that a short value of a result names, as (question, answer)."""
    return _named(plain(value).replace("_", " ").replace("-", " ").strip())


def _named(text: str) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for question, answers in enumerate(_PATTERNS):
        rest = text
        # The negated forms come later in a line and contain the others: they are taken out first.
        for answer in range(len(answers) - 1, -1, -1):
            if answers[answer].search(rest):
                found.add((question, answer))
                rest = answers[answer].sub(" ", rest)
    return found


def states_said(text: str) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Return the states of which a text says that they hold, and those that it names without saying so."""
    held: set[tuple[int, int]] = set()
    named: set[tuple[int, int]] = set()
    for sentence in sentences(plain(text)):
        for clause in re.split(
            r"[,;:]\s|\s[-\u2013\u2014]\s|\b(?:but|although|though|however|because|since|so)\b"
            r"|\band (?=(?:will|should|can|may|might|must|would|could)\b)",
            sentence,
        ):
            states = _named(clause)
            named |= states
            if not _NOT_NOW.search(clause) and not _NOT.search(clause):
                held |= states
    return held, named


def exclude_each_other(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two states answer one question differently."""
    return one[0] == other[0] and one[1] != other[1]


_LATE, _IN_TIME = states_in("delayed"), states_in("on time")
_GONE, _THERE = states_in("sold out"), states_in("available")
_DELAY_KEYS = frozenset(stem(word) for word in ("delay", "delayed", "late", "overdue"))
_STOCK_KEYS = frozenset(stem(word) for word in ("stock", "available", "availability", "vacancies"))


def state_of_number(key: str, value: str) -> set[tuple[int, int]]:
    """Return the state that a result's number stands for: no delay is on time, nothing in stock is sold out."""
    if not re.fullmatch(r"-?\d+(?:\.\d+)?", value):
        return set()
    named = name_words(key)
    if named & _DELAY_KEYS:
        return _LATE if float(value) > 0 else _IN_TIME
    if named & _STOCK_KEYS:
        return _THERE if float(value) > 0 else _GONE
    return set()


_DENIED = re.compile(
    r"\b(?:refused|rejected|denied|declined|failed|unavailable|forbidden|unauthori[sz]ed|impossible|invalid"
    r"|(?:not|never|wasn't|isn't|hasn't been) (?:been )?(?:approved|allowed|possible|accepted|granted|done|executed"
    r"|available|permitted|authori[sz]ed|completed|found))\b"
)


def denied(value: str) -> bool:
    """Return whether a short text of a result says that something was not done."""
    return bool(_DENIED.search(plain(value).replace("_", " ")))
