"""Which pieces of information an assistant asks for."""

import re

from ._speech import REQUEST
from ._words import CODE, PLACEHOLDER

# The pieces of information an assistant asks for. In this order: what one matches is not read again by the next, so the
# address in "e-mail address" is no postal address. A group tells two of a kind apart: return date and start date.
NUMBERED = "order|tracking|invoice|account|customer|member(?:ship)?|booking|reservation|confirmation|policy|serial"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("email", re.compile(r"\be-?mails?(?: address)?\b")),
    ("phone", re.compile(r"\b(?:(?:tele)?phone|mobile|cell)(?: number)?\b")),
    ("card", re.compile(r"\b(?:credit |debit )?card(?: number| details)?\b")),
    ("number", re.compile(rf"\b({NUMBERED})[ -]?(?:number|no\b|id\b|code|reference|#)")),
    ("postal code", re.compile(r"\b(?:zip|post(?:al)?)[ -]?code\b")),
    ("birthday", re.compile(r"\b(?:date of birth|birth ?da(?:y|te))\b")),
    ("date", re.compile(r"\b(?:([a-z-]+) )?dates?\b|\bday of (?:the )?(?:travel|departure|arrival|trip|visit)\b")),
    ("address", re.compile(r"\b(?:(billing|delivery|shipping|home|work) )?address\b")),
    ("name", re.compile(r"\b(?:(first|last) )?names?\b")),
    ("time", re.compile(r"\b(?:(arrival|departure|start|end) )?time\b")),
    ("age", re.compile(r"\bhow old\b|\bages?\b")),
    ("class", re.compile(r"\bclass\b")),
    ("share", re.compile(r"\bhow many per ?cent\b|\b(?:which|what) percentage\b")),
    ("quantity", re.compile(r"\bhow many ([a-z]+)")),
    (
        "detail",
        re.compile(
            r"\b(city|country|location|size|colou?r|budget|quantity|amount|model|reason|destination|price|value)\b"
        ),
    ),
)
_QUALIFIES_NOTHING = frozenset(
    {"what", "which", "the", "your", "a", "exact", "preferred", "specific", "correct", "full", "travel"}
)

_WH_REQUEST = re.compile(r"\b(?:what|which|how many|how old)\b")
# From here on a sentence says what the information is for, and may name other pieces of it.
_PURPOSE = re.compile(r"\b(?:so|in order|to|for|because|since|if|used|associated|linked|on|where)\b")
# Someone else's, or a further one: not what was given before.
FURTHER = re.compile(
    r"\b(?:another|other|second|new|(?<!how )old|previous|different|next|alternative|recipient|friend"
    r"|(?<!the )(?:guest|passenger))\b"
)
# What was given did not work, so that asking again is right.
REJECTS = re.compile(
    r"couldn't find|could not find|can't find|cannot find|unable to find|not found|doesn't (?:exist|match|seem|look)"
    r"|does not (?:exist|match)|invalid|incorrect|not valid|isn't valid|isn't right|no (?:order|account|booking|record)"
    r"|double[- ]check|typo"
)


def requested(answer: str) -> set[str]:
    """Return the kinds of information that the assistant asks for."""
    text = answer.lower().replace("\u2019", "'")
    if REJECTS.search(text):
        return set()
    kinds: set[str] = set()
    for sentence in re.findall(r"[^.!?\n]+[.!?]?", text):
        request = REQUEST.search(sentence.strip()) or (_WH_REQUEST.search(sentence) if "?" in sentence else None)
        # With a value in it, it is a question whether that value is right.
        if request and not FURTHER.search(sentence) and not CODE.search(sentence) and not PLACEHOLDER.search(sentence):
            kinds |= _kinds_in(sentence.strip() if request.re is REQUEST else sentence, request)
    return kinds


def _kinds_in(sentence: str, request: re.Match[str]) -> set[str]:
    purpose = _PURPOSE.search(sentence, request.end())
    asked = sentence[request.start() : purpose.start() if purpose else None]
    kinds = set()
    for kind, pattern in _KINDS:
        for match in pattern.finditer(asked):
            qualifier = match[1] if pattern.groups else None
            kinds.add(f"{qualifier} {kind}" if qualifier and qualifier not in _QUALIFIES_NOTHING else kind)
        asked = pattern.sub(" ", asked)
    return kinds
