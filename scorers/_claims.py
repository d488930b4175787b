"""What an assistant says it has done or will do, and which tool calls make that true."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ._states import denied
from ._trace import leaves
from ._words import name_words, plain, sentences, stem

# Verbs that stand for one another where one is said and the other names a tool.
_ALIKE = (
    "cancel cancellation void annul",
    "book booking rebook reserve reservation schedule arrange appointment secure order purchase buy bought",
    "refund reimburse repay compensate return",
    "send sent resend email mail notify message sms text forward remind reminder notification alert inform contact "
    "call",
    "update change modify edit adjust amend correct reschedule move switch replace upgrade swap extend rebook set",
    "create open opened raise add register log submit file record save store issue start activate enable subscribe "
    "enrol sign upload post make made report place put",
    "remove delete drop clear unsubscribe deactivate disable close block freeze lock",
    "escalate transfer handoff assign ticket callback",
    "pay paid charge debit bill",
)
_GROUPS = tuple(frozenset(stem(word) for word in line.split()) for line in _ALIKE)
_ACTING = frozenset[str]().union(*_GROUPS)
# Deeds that do harm, or cost, when done twice.
_ONCE = frozenset().union(*(_GROUPS[place] for place in (0, 1, 2, 3, 7, 8))) | {stem("create"), stem("submit")}
_TO_LOOK = """
    check look search find found review verify locate track see get got fetch retrieve pull read list query show
    lookup calculate compute work worked convert count compare run ran examine investigate double estimate view
    describe inspect access consult pulled figure status quote validate availability info details use used
    percentage percent subtract multiply divide sum average
    """
_LOOKING = frozenset(stem(word) for word in _TO_LOOK.split())
# To say or to think is done by saying it.
_TO_SAY_OR_THINK = """
    be been help need needed explain explained know walk guide assume assist summarize summarise repeat tell told
    give given gave say said answer answered clarify share shared ask asked wait continue rephrase apologize
    apologise go gone point suggest recommend describe provide provided outline understand noticed hear mention
    include listed thought mean tried try happy glad sorry stop have become come rounded attached cover simplify
    break misunderstand misread overlook miss confuse lost interpret enjoy love hope believe think want like
    learned show stated spoke talk receive received reach reached assisted take taken left use limited allowed
    based located used called named required expected supposed designed able closed related
    """
_BY_WORDS = frozenset(stem(word) for word in _TO_SAY_OR_THINK.split())
# "I'll keep you posted" and the like: nobody will, unless a tool sees to it.
_LATER = re.compile(
    r"let you know|get back to you|keep (?:you (?:posted|updated|informed)|an eye)|follow up|be in touch|reach out"
    r"|contact you|(?:call|ring|phone) you|e-?mail you|notify you|message you|look into|remind you|take care of"
    r"|write to you"
)
_ADVERBS = (
    r"(?:(?:just|now|already|also|successfully|since|then|immediately|quickly|gladly|right away|personally|certainly"
    r"|definitely|go(?:ne)? ahead and|went ahead and|happily|be sure to|make sure to|all) )*"
)
_PARTICIPLE = r"(?:[a-z]+ed|sent|made|put|set|found|written|paid|bought|sold|brought|built|drawn|run|taken care)"
_HAVE_DONE = re.compile(rf"\b(?:i|we)(?:'ve| have) {_ADVERBS}(?P<verb>{_PARTICIPLE})\b")
_DID = re.compile(rf"\b(?:i|we) {_ADVERBS}(?P<verb>[a-z]+(?:ed|ied)|sent|made|put)\b")
_WAS_DONE = re.compile(rf"\b(?:has|have) {_ADVERBS}been {_ADVERBS}(?P<verb>{_PARTICIPLE})\b")
_IS_DONE = re.compile(
    rf"\b(?:is|'s|(?:you|both|they|your \w+|the \w+)(?: are|'re)) {_ADVERBS}(?P<verb>[a-z]+ed)\b(?! by\b)"
    rf"|\b(?P<noun>[a-z]+(?:tion|ment|ing|nd|nge)) (?:went|has gone)"
    r" through\b|\b(?P<change>is now) (?:for|on|at|set to)\b"
)
# A word that stands alone for the whole deed: "Booked: ...", "Cancelled!", "you're all set", "you're in".
_ALL_DONE = re.compile(
    r"(?:^|\b(?:ok|okay|yes|great|perfect|wonderful|done|sure)[,!.:]? )(?P<verb>(?:re)?booked|cancell?ed|changed"
    r"|updated"
    r"|refunded|sent|reserved|added|moved|removed|ordered|paid)(?=[:!.,]| (?:as|under|for|and|on|in)\b)"
    r"|\byou(?:'re| are) (?P<done>all set|in(?=[!.,])|good to go)|\b(?:it's|that's|all) (?P<all>done|sorted"
    r"|taken care of)\b"
)
_WILL_DO = re.compile(
    rf"\b(?:(?:i|we)(?:'ll| will| shall)|(?:i'm|i am|we're|we are) going to|(?:please )?(?:let|allow) me(?: to)?)"
    rf" {_ADVERBS}(?P<verb>[a-z-]+)"
)
_AM_DOING = re.compile(rf"\b(?:i'm|i am|we're|we are) {_ADVERBS}(?P<verb>[a-z]+ing)\b")
_OTHERS_WILL = re.compile(
    r"\b(?:team|colleagues?|agents?|specialists?|representatives?|managers?|department|support|staff|someone|somebody"
    r"|they)\b[^.!?]{0,40}?\b(?:will|'ll|is going to|are going to) (?:be )?(?P<verb>contact|call|ring|phone|reach"
    r"|get|email"
    r"|review|look|follow|take|handle|process|in touch|message|write)"
)
_ON_IT = re.compile(
    r"\b(?:i'm|i am|we're|already) on it\b|\b(?:is|are) being (?:taken care of|processed|handled|sorted)\b"
)
_CONDITION = re.compile(
    r"\b(?:if|once|as soon as|when(?:ever)?|after|before|until|unless|so (?:that )?i|then|would|could|should|want me to"
    r"|shall i|in case|without|need(?:ed)? (?:you|your))\b|\?$"
)
_NEGATED = re.compile(r"\b(?:not|never|cannot|unable|nor|no longer|already|can only|only)\b|n't\b")
_IDLE = re.compile(
    r"(?:looking|hoping|going|trying|having|sorry|getting|seeing|showing|asking|talking|being|missing|finding|here)$"
)


@dataclass(frozen=True)
class Deed:
    """Something said to be done, or promised."""

    verb: str
    """Stem of the verb; "done" and "later" where the answer does not say what."""
    text: str
    is_passive: bool = False
    """Nobody is named who did it: it may be what a tool told of."""


def _verb(word: str) -> str:
    return stem(word.removeprefix("re-").replace("-", ""))


def claimed_deeds(answer: str, tools: Collection[str] = ()) -> Iterator[Deed]:
    """Yield what the answer says has been done; "is cancelled" is among it where one of `tools` cancels."""
    for sentence in sentences(plain(answer)):
        if sentence.endswith("?"):
            continue
        for pattern in (_HAVE_DONE, _DID, _WAS_DONE, _IS_DONE, _ALL_DONE):
            for match in pattern.finditer(sentence):
                deed = _deed(match, tools)
                before = sentence[max(0, match.start() - 30) : match.end()]
                if (
                    deed
                    and deed.verb not in _BY_WORDS
                    and not _NEGATED.search(before)
                    and not _depends(sentence, match)
                ):
                    yield deed


def _deed(match: re.Match[str], tools: Collection[str]) -> Deed | None:
    groups = match.groupdict()
    if groups.get("done") or groups.get("all"):
        return Deed("done", match[0]) if any(acts(tool) for tool in tools) else None
    word = "change" if groups.get("change") else next(each for each in groups.values() if each)
    verb = _verb(word)
    if match.re in (_IS_DONE, _ALL_DONE) and not any(fulfils(tool, verb, by_name=True) for tool in tools):
        return None
    return Deed(verb, match[0], is_passive=match.re in (_WAS_DONE, _IS_DONE) and not groups.get("change"))


def _depends(sentence: str, match: re.Match[str]) -> bool:
    """Return whether the deed stands in a clause that says under which condition it would hold."""
    start = max(sentence.rfind(mark, 0, match.start()) for mark in ",;:(") + 1
    clause = sentence[start : match.start()]
    return bool(re.search(r"\b(?:if|once|when|until|unless|after|before|whether|as soon as|that|which|what)\b", clause))


def promises(answer: str) -> Iterator[Deed]:
    """Yield what the answer says will be done, without a condition and not by talking."""
    for sentence in sentences(plain(answer)):
        if on_it := _ON_IT.search(sentence):
            yield Deed("later", on_it[0])
        for pattern in (_WILL_DO, _AM_DOING, _OTHERS_WILL):
            match = pattern.search(sentence)
            if not match or _CONDITION.search(sentence) or _NEGATED.search(sentence[: match.end()]):
                continue
            if _LATER.search(sentence):
                yield Deed("later", sentence)
            elif (verb := _verb(match["verb"])) not in _BY_WORDS and not _IDLE.fullmatch(match["verb"]):
                yield Deed(verb, match[0])


def acts(tool: str) -> bool:
    """Return whether a tool's name says that it does something that had better not be done twice."""
    return bool(name_words(tool) & _ONCE) and not only_looks(tool)


def only_looks(tool: str) -> bool:
    """Return whether a tool's name says that it reads and changes nothing."""
    first = re.match(r"[a-z]+|[A-Z][a-z]*", tool)
    named = name_words(tool)
    if first and stem(first[0].lower()) in _LOOKING:
        return True
    return bool(named & _LOOKING) and not named & _ACTING


def fulfils(tool: str, verb: str, *, by_name: bool = False) -> bool:
    """Return whether a call of the tool can be what the verb says.

    To look something up, any call will do. For anything else the tool's name has the verb or one like it, or,
    unless `by_name`, at least does not say that it only reads or does something else.
    """
    named = name_words(tool)
    if verb in named:
        return not only_looks(tool) or verb in _LOOKING
    if verb in _LOOKING:
        return not by_name
    if only_looks(tool):
        return False
    if any(verb in group and named & group for group in _GROUPS):
        return True
    return not by_name and (verb in ("done", "later") or verb not in _ACTING or not named & _ACTING)


def denies(result: Any, verb: str) -> bool:
    """Return whether a tool's result says that what was asked of it was not done: refused, not approved, false."""
    for key, value in leaves(result):
        if isinstance(value, bool):
            if not value and (
                verb in name_words(key) or key.lower() in ("ok", "success", "successful", "approved", "done")
            ):
                return True
        elif isinstance(value, str) and len(value.split()) <= 8 and denied(value):
            return True
    return False
