"""How the user fared in a conversation, by what was said. True is a pass; None where there is nothing to judge.

They go by wording, in English: no language model is asked. What they cannot see is said in each docstring.
"""

import re

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._asking import asked_again
from ._help import helped
from ._questions import repeated, rephrased
from ._trace import in_order, user_texts
from ._words import CODE, plain


@scorer
def no_repeated_question(session: list[Trace]) -> Feedback | None:
    """Pass if the user never had to ask (nearly) the same question or make the same request again.

    Two questions are the same if one has all the words of the other and little more, spelling errors and filler aside;
    more may be added where the answer before did not help. A question with another number, date, code or other word is
    a different one, as is one for "another" or "more", and one that tools have answered: the user has a reason of their
    own. Asking again because a run failed counts. Messages of a single meaningful word ("thanks", "help") do not.

    Cannot see: a repetition in quite different words, or one that leaves out the number named the first time; a good
    answer from no tool, after which the user asks again for fun.

    Of labelled conversations that no rule was written by, 12 with the fault and 161 without: 6 missed, 1 false alarm.
    """
    turns = [trace for trace in in_order(session) if user_texts(trace)]
    if len(turns) < 2:
        return None
    for before, text, _ in repeated(turns):
        return Feedback(value=False, rationale=f"Asked again: {before.strip()!r}, then {text.strip()!r}")
    return Feedback(value=True, rationale=f"No question came twice in {len(turns)} turns.")


@scorer
def no_rephrased_question(session: list[Trace]) -> Feedback | None:
    """Pass if the user never had to ask the same thing in other words because the answer did not help.

    Two messages ask the same if they share words that carry meaning or values, the second has no value of its own, and
    the answer between them did not help: the run failed, the answer declined, said nothing, or drew on no tool's
    result. Words such as "I asked" or "or not" make less do. So do two messages that were answered alike from the same
    tool call.

    Cannot see: a question put in entirely other words, or an answer that is to the point but wrong. A repetition in
    the same words is another scorer's matter, as is a user who corrects a mistake of their own.

    Of labelled conversations that no rule was written by, 11 with the fault and 162 without: 8 missed, 6 false alarms.
    """
    turns = [trace for trace in in_order(session) if user_texts(trace)]
    if len(turns) < 2:
        return None
    for before, after in rephrased(turns):
        first, second = (" ".join(user_texts(turn)).strip() for turn in (before, after))
        return Feedback(value=False, rationale=f"Asked in other words: {first!r}, then {second!r}")
    return Feedback(value=True, rationale=f"No question came back in other words in {len(turns)} turns.")


@scorer
def no_information_asked_twice(session: list[Trace]) -> Feedback | None:
    """Pass if the assistant never asked for a piece of information that it was given or had asked for before.

    Knows order and other reference numbers, e-mail, phone, card, names, ages, addresses, dates, times, quantities and a
    few more by their English names. Given is what answered an earlier request, and what the user gave unasked where
    its form tells: an e-mail, a phone, card or order number, "Jo Bloggs, 34", a day, a percentage. Also sees the same
    question put again after the user has answered it. Asking again is right when the assistant says that what it got
    did not work, asks for a further or another person's one, or the user has turned to another order or had not
    answered.

    Cannot see: requests in other words ("who am I talking to?"), or whether an answer fits a request that asked for
    several things at once, unless its form tells (a number, a date).

    Of labelled conversations that no rule was written by, 9 with the fault and 164 without: 6 missed, 1 false alarm.
    """
    again, has_asked = asked_again(in_order(session))
    if again:
        place, what = again[0]
        return Feedback(value=False, rationale=f"Turn {place + 1} asks again: {what}")
    return Feedback(value=True, rationale="Nothing was asked for twice.") if has_asked else None


# --- signs of frustration ---

_ANGRY = re.compile(
    r"\b(?:useless|ridiculous|unacceptable|not acceptable|pathetic|outrageous|absurd|incompetent|disgrace(?:ful)?"
    r"|nonsense|thie(?:f|ves)|scam|garbage|rubbish|idiots?|moron|crap|wtf|ffs|for (?:god|heaven|christ"
    r"|fuck)'?s sake|damn"
    r"|never again|fed up|(?:sick|tired) of|had enough|(?:i )?giv(?:e|ing) up|los(?:t|ing|e) (?:my )?patience"
    r"|(?:this is|is this) a joke|(?:are you|you're|must be|got to be) (?:joking|kidding)|wast(?:e"
    r"|ing) (?:of )?(?:my )?time"
    r"|(?:are you|can't be) serious|hopeless|frustrat(?:ed|ing)|annoy(?:ed|ing)|furious|shame on|(?:formal "
    r"|a )complaint"
    r"|(?:want|like|going) to complain|what's the point|forget it|how hard (?:can|is)|is it (?:so|that) (?:hard"
    r"|difficult)"
    r"|not good enough|(?:bad|poor|awful|terrible|worst|horrible|lousy) (?:service|support|experience"
    r"|customer service|bot"
    r"|assistant|answer)s?|(?:you|this|that|it)(?:'re| are|'s| is| was) (?:\w+ ){0,3}(?:terrible|awful|horrible|stupid"
    r"|dumb|a mess|the worst|no (?:help|use)|not helpful|not helping)|i(?:'m| am) (?:\w+ )?(?:angry|upset"
    r"|disappointed|mad)"
    r"|(?:very|really|so) (?:disappoint(?:ed|ing)|upset|angry))\b|[\U0001F620\U0001F621\U0001F624\U0001F92C\U0001F644]"
)
_OVER_AGAIN = re.compile(
    r"\b(?:(?:i|we)(?:'ve| have)? (?:just|already) (?:told|said|gave|given|wrote|written|asked|sent|explained|answered"
    r"|did|done)|i (?:told|asked) you|but i (?:said|asked|wrote)|i (?:said|wrote) (?:it|that|this|so|above|before"
    r"|already)|i (?:said|wrote"
    r"|asked)\s*"
    r"(?=[.,!]|$)|(?:like|as) i (?:said|wrote|told|mentioned)|as (?:said|written|mentioned|stated)|it (?:says"
    r"|said) so above"
    r"|how (?:many times|often do i)|for the (?:second|third|fourth|fifth|last|\w+th) time|(?:asked|told|tried"
    r"|said|wrote)"
    r" (?:\w+ ){0,4}(?:three|four|five|several|many|\d) times|see above|scroll up|read (?:my|what i|above|again)"
    r"|(?:are|is|was|it's|were) (?:both |all )?in (?:my|the) (?:first|last|previous|above)|it's (?:all )?in the \w+$"
    r"|you (?:keep|always|never|still don't|just asked|already asked|asked (?:me )?(?:that|this))"
    r"|you(?:'re| are) not (?:listening|reading|helping|answering|understanding)|you (?:did not|didn't|don't"
    r"|do not|can't)"
    r" (?:\w+ )?(?:listen|read|answer|understand|help)\w*|again and again|over and over|same (?:answer|question|thing)"
    r" (?:again|every)|you people|(?:speak|talk) (?:to|with) (?:a |an |your )?(?:human|real|manager|supervisor)"
    r"|why (?:can't|won't|don't|didn't|do i have to|do you (?:keep|ask))|doesn't help|you are customer|sort it out"
    r"|just (?:tell|answer|give) me|is (?:anyone|anybody|somebody) (?:there|here|even)"
    r"|nobody (?:called|answers?|came|replied|helps?|wrote|is answering)|(?:i'm|i am"
    r"|been) (?:still )?waiting (?:since|for"
    r" (?:hours|days|weeks|an hour|ages))|stop (?:asking|repeating|sending)|what are you (?:doing|for)"
    r"|that's not (?:what i|an answer|helpful)|not what i (?:asked|wanted|said)|answer (?:me|my))\b"
)
_JOY = re.compile(
    r"\b(?:thank(?:s| you| god)?|thx|great|amazing|awesome|wow|love(?:ly)?|perfect|brilliant|genius|haha+|lol"
    r"|best|legend"
    r"|nice|happy|congrat\w*|cool|correct|wonderful|excellent)\b|[:;]-?[)D]"
)
# Tired or let down, but perhaps not by the service.
_WEARY = re.compile(
    r"\b(?:ugh+|argh+|sigh|omg|still (?:no|not|nothing|waiting|haven't|doesn't|wrong)|come on|unbelievable|seriously"
    r"|whatever|i asked (?:about|for|if|how|what|when|where)|stupid|terrible|awful|wrong again|but i)\b"
)
_ABBREVIATIONS = frozenset(
    {"OK", "USD", "EUR", "GBP", "CHF", "AM", "PM", "TV", "ID", "PDF", "CEO", "UK", "EU", "US", "USA"}
)
_SHOUTED = re.compile(r"\b[A-Z]{2,}\b")


@scorer
def no_frustration(session: list[Trace]) -> Feedback | None:
    """Pass if the user shows no sign of frustration with the service.

    Sees: angry words, reminders of what was said before ("as I wrote", "for the third time"), and, if two of them come
    together or the answer before did not help, marks such as "???", "!!", "......" and words in capitals.

    Cannot see: irony, resignation without such words, anger in other languages. Anger at something else ("my landlord")
    is told apart only where the message sounds glad as well.

    Of labelled conversations that no rule was written by, 24 with the fault and 149 without: 15 missed, 6 false alarms.
    """
    turns = [trace for trace in in_order(session) if user_texts(trace)]
    if not turns:
        return None
    for place, turn in enumerate(turns):
        text = "\n".join(user_texts(turn))
        if sign := _frustration(text, turns[place - 1] if place else None):
            return Feedback(value=False, rationale=f"Sounds frustrated ({sign}): {text.strip()!r}")
    return Feedback(value=True, rationale=f"No sign of frustration in {len(turns)} turns.")


def _frustration(text: str, before: Trace | None) -> str | None:
    """Return what in the message sounds frustrated; `before` is the turn that it follows, if any."""
    low = plain(text)
    is_glad = bool(_JOY.search(low)) and not re.search(r"\b(?:not|no|never)\b|n't\b", low)
    if angry := _ANGRY.search(low) or _OVER_AGAIN.search(low):
        return angry[0] if not is_glad or not _has_helped(before) else None
    if is_glad:
        return None
    shouted = [word for word in _SHOUTED.findall(CODE.sub(" ", text)) if word not in _ABBREVIATIONS]
    if marks := re.search(r"[?!]{4,}", text):
        return marks[0]
    if len(shouted) > 3 or (len(shouted) > 2 and any(letter.islower() for letter in text)):
        return " ".join(shouted)
    weak = [
        bool(_WEARY.search(low)),
        bool(re.search(r"\?{2,}|\?!|!\?", text)),
        bool(re.search(r"!{2,}", text)),
        bool(re.search(r"\.{4,}", text)),
        any(len(word) > 2 for word in shouted),
    ]
    is_enough = sum(weak) > 1 or (sum(weak) == 1 and not _has_helped(before))
    return "marks, capitals and words" if is_enough else None


def _has_helped(before: Trace | None) -> bool:
    return before is None or helped(before)
