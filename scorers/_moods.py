"""How a user's message sounds: angry, let down, weary, glad.

The lists are families of wordings that people use against any service: what they call it, what they say it does wrong,
what they remind it of. None names what a service is about.
"""

import re
from collections.abc import Container

from ._turns import Turn
from ._words import CODE

_SERVICE = (
    r"(?:service|support|experience|customer (?:service|care)|help|bot|assistant|shop|store|company|answer|app|site)s?"
)

# What nobody says who is content. In lower case, with all apostrophes.
_INSULTS = (
    r"useless|ridiculous|(?:not |un)acceptable|pathetic|outrageous|absurd|incompetent|disgrace(?:ful)?|nonsense",
    r"(?:garbage|rubbish)(?! (?:bins?|bags?|cans?|collection|disposal))",
    r"idiots?|idiotic|morons?|crap|bullshit|wtf|ffs|for (?:god|heaven|christ|fuck)'?s sake|hopeless",
    r"thie(?:f|ves)|scam(?:mers?)?|liars?|shame on|joke of a|not good enough",
    r"what an? (?:\w+ )?(?:circus|joke|mess|farce|shambles|disaster|waste|disgrace|shame)",
    r"(?:this is|is this) (?:a joke|not funny)|(?:are you|you're|must be|got to be) (?:joking|kidding)",
    rf"(?:are you|can't be) serious|(?:bad|poor|awful|terrible|worst|horrible|lousy|dreadful) {_SERVICE}",
    r"(?:you|this|that|it)(?:'re| are|'s| is| was) (?:\w+ ){0,3}(?:terrible|awful|horrible|stupid(?! question)"
    r"|dumb(?! question)|a mess|poor(?! (?:thing|you|kid))|the worst|no (?:help|use)|not help(?:ful|ing))",
)
_HAD_ENOUGH = (
    r"never again|fed up|(?:sick|tired) of|had enough|(?:i|i'll|we) giv(?:e|ing) up|los(?:t|ing|e) (?:my )?patience",
    r"wast(?:e|ing|ed) (?:of )?(?:my |our )?time|frustrat(?:ed|ing)|annoy(?:ed|ing)|furious",
    r"what's the point|(?:formal |a )complaint|(?:want|like|going) to complain",
    r"i(?:'m| am) (?:\w+ )?(?:angry|upset|disappointed|mad)|(?:very|really|so) (?:disappoint(?:ed|ing)|upset|angry)",
    r"took you (?:long enough|ages|forever)|how hard (?:can|is)|is it (?:so|that|really that) (?:hard|difficult)",
    r"thank(?:s| you) for (?:nothing|making|nearly|almost|wasting|ruining|not|losing|ignoring)",
)
# What the assistant does wrong, said to its face, and what was said to it before.
_REPROACHES = (
    r"(?<!do )(?<!can )(?<!will )(?<!if )you (?:keep|still don't|still haven't|never answer)",
    r"you always (?:stop|ask|say|forget|repeat|do)",
    r"you people",
    r"you(?:'re| are) (?:just |only |really |simply )?(?:making \w+ up|guessing|lying|inventing|ignoring|repeating)",
    r"you(?:'re| are) not (?:listening|reading|helping|answering|understanding)|says who\b",
    r"you (?:did not|didn't|don't|do not) (?:\w+ )?(?:listen|read|answer|understand|help)\w*|answer me\b",
    r"do you (?:even |actually |ever )?(?:read|listen) (?:at all|anything|me|what i)|do you even",
    r"are you even",
    r"stop (?:asking|repeating|sending)|is (?:anyone|anybody|somebody) (?:there|here|even)|you are customer",
    r"nobody (?:called|answers?|came|replied|helps?|wrote|is answering)|why do you (?:keep|ask)",
    r"(?:speak|talk) (?:to|with) (?:a |an |your )?(?:human|real|manager|supervisor)",
    r"(?:i'm|i am|been) (?:still )?waiting (?:since|for (?:hours|days|weeks|an hour|ages))",
    r"(?:i|we)(?:'ve| have| did| had)? (?:just |already )+(?:told|gave|given|asked) you|i (?:told|asked) you",
    r"i (?:have )?already (?:told|said|wrote|gave)|but i (?:said|asked|wrote)|(?:like|as) i (?:said|wrote|told|asked)",
    r"i did (?:say|write|tell|ask|mention)",
    r"i (?:said|wrote)(?: (?:it|that|this|so|above|before|already)\b|\s*(?=[.,!]|$))",
    r"how (?:many times|often (?:do|must|should) i)|(?:^|[.!?,] )(?:\w+ ){0,2}for the (?:second|third|\w+th|last) time",
    r"(?:asked|told|tried|said|wrote) (?:\w+ ){0,4}(?:twice|(?:three|four|five|several|many|\d) times)",
    r"see above|scroll up|read (?:my|what i|above)|you (?:just|already) asked|you asked (?:me )?(?:that|this)",
    r"again and again|over and over|same (?:answer|question|thing) (?:again|every)|not what i (?:asked|wanted|said)",
    r"(?:not|n't) (?:quite |really )?(?:what i asked|answer\w* (?:my|the|me))|that's not (?:an answer|helpful)",
)
# What can be meant well, and is not when the turn before has brought nothing, or asked for what was said.
_IMPATIENCE = (
    r"(?:i|we)(?:'ve| have| did| had)? (?:just |already )+(?:said|wrote|sent|explained|answered|did|done|asked|gave)",
    r"i (?:asked|said|wrote)\b",
    r"(?:as|like) (?:said|written|mentioned|stated|above)|it (?:says|said) so above",
    r"(?:second|third|fourth|fifth|2nd|3rd|4th|5th) (?:time|attempt|try)|why (?:can't|won't|don't|didn't) you",
    r"(?:are|is|was|it's|were|all) (?:both |all )?in (?:my|the|your) (?:first |last |previous |very )*(?:message|mail"
    r"|question|text|request|post|sentence|above|first|last)|it's (?:all )?in (?:the|my) \w+$",
    r"(?:they|it)(?:'re| are|'s| is) right there|(?:that's|this is) why i (?:ask|gave|said|told|wrote)\w*",
    r"you(?:'ve| have)? (?:left out|forgot|forgotten|ignored?|skipped|missed out|mixed (?:it |them )?up|misread)",
    r"aren't you (?:a|an|the|supposed|meant)\b|isn't (?:that|this) (?:your job|what you)",
    r"can't you (?:just|even|simply)",
    r"you could(?:'ve| have)? at least|you should (?:know|have)|should be in your (?:system|records?|data|files?)",
    r"so you (?:just |really )?(?:don't|can't|won't) |just (?:tell|answer|give) me|what are you (?:doing|for)\b",
    r"sort it out|forget it|doesn't help|why do (?:i|we) have to|answer my\b|you said that\b",
    r"great (?:shop|service|help|job|support|bot)",
    r"(?:don't|do not) you (?:know|have|see)|you can't (?:help|answer)|you're (?:a|the) (?:bot|calculator|assistant)",
)


def _any_of(*lines: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(lines)})")


_ANGRY = _any_of(*_INSULTS, *_HAD_ENOUGH)
_REPROACH, _IMPATIENT = _any_of(*_REPROACHES), _any_of(*_IMPATIENCE)
_FACES = re.compile("[\U0001f620\U0001f621\U0001f624\U0001f92c\U0001f644\U0001f926]")
# Tired or let down, but perhaps not by the service.
_WEARY = re.compile(
    r"\b(?:u+gh+|a+r+gh+|sigh+|omg|je+z|gee+z|pf+t*|grr+|hm+pf|tsk|smh|bro|dude|come on|unbelievable|seriously"
    r"|whatever|for real|wrong again|finally|still (?:no|not|nothing|waiting|haven't|hasn't|doesn't|wrong)"
    r"|stupid(?! question)|terrible|awful|but i|wow ok|oh great|well thanks?)\b"
)
_GESTURE = re.compile(r"\*[^*]{3,40}\*")  # "*sighs*", "*closes the laptop*"
_MARKS = re.compile(r"\?{2,}|\?!|!\?|!{2,}|\.{4,}|\.\.$")
_REJECTS = re.compile(
    r"^(?:no[,.! ]+(?!thank|problem|worries|rush|it's fine)\w|wrong\b|that's wrong|incorrect\b|not true)"
)
_JOY = re.compile(
    r"\b(?:thank(?:s| you| god)?|thx|great|amazing|awesome|wow|love(?:ly)?|perfect|brilliant|genius|best|legend|nice"
    r"|happy|congrat\w*|cool|correct|wonderful|excellent|cheers)\b"
)
_LAUGHS = re.compile(r"\b(?:(?:ha){2,}h?|lo+l|lmao|rofl)\b|[:;]-?[)DP]|[\U0001f600-\U0001f606\U0001f609\U0001f60a]")
_NEGATION = re.compile(r"\b(?:not|no|never|without)\b|n't\b")
_ABBREVIATIONS = frozenset(
    {
        "OK",
        "USD",
        "EUR",
        "GBP",
        "CHF",
        "AM",
        "PM",
        "TV",
        "ID",
        "PDF",
        "CEO",
        "UK",
        "EU",
        "US",
        "USA",
        "FAQ",
        "VAT",
        "SMS",
    }
)
# Capitals before a number name a thing: a train, a model, a form.
_SHOUTED = re.compile(r"\b[A-Z]{2,}\b(?![ -]?\d)")


def sounds_glad(low: str) -> bool:
    """Return whether a message, in lower case with all apostrophes, has words of joy or thanks and no negation."""
    return bool(_JOY.search(low)) and not _NEGATION.search(low)


def may_be_frustrated(turn: Turn) -> bool:
    """Return whether the message has any sign of it, strong or weak: without one `frustration` finds nothing."""
    patterns = (_ANGRY, _REPROACH, _IMPATIENT, _WEARY)
    if any(pattern.search(turn.spoken) for pattern in patterns) or _FACES.search(turn.text):
        return True
    return bool(_MARKS.search(turn.text) or _GESTURE.fullmatch(turn.text.strip()) or _SHOUTED.search(turn.text))


def frustration(turns: list[Turn], place: int, vain: Container[int]) -> str | None:
    """Return what in the user's message sounds frustrated, None if nothing does.

    Args:
        turns: of the conversation.
        place: of the turn whose message is judged.
        vain: places of the turns that brought the user nothing.
    """
    text, low = turns[place].text, turns[place].spoken
    before = turns[place - 1] if place else None
    rejects = before is not None and not before.questions and bool(_REJECTS.search(low))
    is_vain = place > 0 and (place - 1 in vain or rejects)
    is_glad, laughs = sounds_glad(low), bool(_LAUGHS.search(text) or _LAUGHS.search(low))
    if angry := _ANGRY.search(low) or _FACES.search(text):
        return angry[0] if is_vain or "thank" in angry[0] or not (is_glad or laughs) else None
    if laughs or (is_glad and not is_vain):
        return None
    if reproach := _REPROACH.search(low) or (_IMPATIENT.search(low) if is_vain else None):
        return reproach[0]
    if marks := re.search(r"[?!]{4,}" if is_vain else r"\?[?!]{3,}", text):
        return marks[0]
    shouted = _shouted(turns, place)
    # Who answers a question in capitals may well be glad, and nobody has made the one angry who begins with them.
    if len(shouted) > (2 if is_vain else 3) and (is_vain or (before is not None and not before.questions)):
        return " ".join(shouted)
    return _weary(text, low, shouted, is_again=is_vain and place - 2 in vain) if is_vain else None


def _weary(text: str, low: str, shouted: list[str], *, is_again: bool) -> str | None:
    """Return the weaker signs, where they are enough after a turn in vain: a word, marks, capitals."""
    # A single word in capitals is stressed, not shouted, unless it was said before in vain.
    is_loud = any(len(word) > 2 for word in shouted) and (is_again or len(shouted) > 1)
    found = _WEARY.search(low) or _MARKS.search(text) or _GESTURE.fullmatch(text.strip())
    return found[0] if found else " ".join(shouted) if is_loud else None


def _shouted(turns: list[Turn], place: int) -> list[str]:
    """Return the words in capitals; none from a user who writes everything so."""
    text = turns[place].text
    words = [word for word in _SHOUTED.findall(CODE.sub(" ", text)) if word not in _ABBREVIATIONS]
    others = [turn.text for turn in turns[:place] if re.search(r"[A-Za-z]{3}", turn.text)]
    return [] if others and all(each.isupper() for each in others) else words
