"""What a sentence does: ask for something, decline, give advice, or nothing but keep the talk going."""

import re

from ._words import plain, sentences

# --- asking ---

_TELL = r"(?:provide|share|tell|give|send|confirm|specify|enter|type|repeat|let me know|remind)"
REQUEST = re.compile(
    rf"\b(?:could|can|would|will) you (?:please |also |kindly |just )*{_TELL}\b"
    rf"|\b(?:please|kindly) (?:also |kindly |just )*{_TELL}\b"
    r"|\b(?:may|can|could) i (?:please |also )?(?:have|get|ask for|know)\b"
    rf"|\b(?:tell|give|send) me\b|\blet me know\b|\bdo you have (?:your|the|an?)\b|\byou (?:can )?(?:provide|share)\b"
    rf"|\bneed (?:to know |to have )?(?:either )?(?:your|the)\b|^(?:and |also,? )(?:the|your)\b[^.!]*\?$"
    rf"|^your\b[^.!]*\?$|^to (?:proceed|go on|continue), {_TELL}"
)
# "Is there anything else?" asks for nothing.
_OFFER = re.compile(
    r"\b(?:anything else|something else|any other|more i can|help you with|can i help|may i help|assist you|can i do"
    r"|else i can|further questions|any questions)\b"
)


def questions(answer: str) -> list[str]:
    """Return the sentences of the answer that the user has to answer for it to go on, in lower case."""
    return [
        sentence
        for sentence in sentences(plain(answer))
        if not _OFFER.search(sentence)
        and (sentence.endswith("?") or (REQUEST.search(sentence) and "let me know if" not in sentence))
    ]


def asks_back(answer: str) -> bool:
    """Return whether the answer asks the user something that has to be answered to go on."""
    return bool(questions(answer))


# --- declining ---

_ABLE = r"(?:ability|capability|access|means|way|tools?|option|permission|authority|function)"
_DECLINES = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:\w+ )?(?:can't|cannot|can not|won't|will not|decline|refuse|must decline"
    r"|have to decline|not able to|unable to|not allowed to|not permitted to|not comfortable|not authori[sz]ed to"
    r"|not equipped|not designed|not programmed|would rather not|'d rather not"
    rf"|don't (?:do|handle|deal|offer|discuss|have (?:the |any |an? )?(?:\w+ )?{_ABLE})"
    rf"|do not (?:do|handle|offer|have (?:the |any |an? )?(?:\w+ )?{_ABLE})|lack (?:the )?)\b"
    r"|\b(?:i'm|i am) an?\b[^.;]*?\b(?:and|but|so)(?: i)? (?:can't|cannot|won't|don't)\b"
    r"|\b(?:not|isn't) (?:possible|something|anything) (?:for me|that i|i|we)\b|\bnot within my\b|\bout of my\b"
    r"|\b(?:beyond|outside)(?: of)? (?:my|what i|the scope)\b"
    r"|\btoo (?:many|much|complex|complicated|long|difficult|hard)\b[^.]* for me\b"
    r"|\b(?:i'd|i would) rather not\b|\bi(?:'m| am) not in a position to\b|\b(?:that|this) (?:isn't|is not) (?:my"
    r"|what i)\b"
    r"|\bnot something (?:i|we) (?:can|do|offer|handle|could)\b|\bi (?:must|have to) (?:decline|refuse)\b"
    r"|\b(?:i|we) (?:no longer|don't|do not|never) (?:do|handle|deal|share|disclose|give out|show|process|book|take)\b"
    r"|\b(?:that|this) information is (?:confidential|private)\b"
    r"|\bunable to (?:help|assist|process|do|complete|perform|comply|fulfil)|\b(?:can't|cannot) (?:help|assist"
    r"|comply)\b"
    r"|\b(?:can't|cannot|can not|won't) be (?:granted|given|provided|offered|shared|done|processed|issued)\b"
    r"|\bplease (?:contact|call|use an?|ask|get in touch with|reach out to|turn to)(?: (?:our|your|the|another"
    r"|customer))?"
    r" (?:\w+ )?(?:support|service|team|provider|professional|expert|calculator|agent|staff)\b"
)
# What was looked for and is not there, what is not known, and what waits for something: none of them declines.
_NO_DECLINE = re.compile(
    r"(?:\w+ ){0,2}(?:find|found|locate|recommend|guarantee|promise|(?:say|tell|know|see) (?:for (?:sure|certain)"
    r"|which|what"
    r"|whether|if|why|when|any|a|an|that|it)|be (?:happier|more)|wait|thank|stress|believe|imagine|agree more|help but"
    r"|complain|make (?:it )?out|figure out what|get to see|go wrong)\b"
)
# "Yet" at the end is time; before a verb it is "but".
_WAITS = re.compile(
    r"\b(?:until|without|unless|before|as long as)\b|\byet[.!]?$|, only\b"
    r"|\bif you (?:don't|do not)\b|\bwould you like\b"
)


def declined(answer: str) -> str | None:
    """Return the sentence, from the words that decline on, with which the answer declines to do something."""
    for sentence in sentences(plain(answer)):
        match = _DECLINES.search(sentence)
        if match and not _NO_DECLINE.match(sentence[match.end() :].lstrip()) and not _WAITS.search(sentence):
            return re.split(r"[;:]|, (?!so|and|but)", sentence[match.start() :])[0]
    return None


# --- advice ---

_ADVICE = re.compile(
    r"\bplease\b|\byou (?:can|could|may|might|should|will need to|need to|'ll need to|have to)\b|\byou(?:'ll"
    r"| will) need\b"
    r"|\bfeel free\b|\binstead\b|\balternatively\b|\bin the meantime\b|\bmeanwhile\b|\bgive it (?:a|another)\b"
    r"|(?:^|[,;:] |\b(?:so|and|then|or|maybe|perhaps) )(?:try|contact|call|reach out|visit|check|go to|write to|use"
    r"|wait|come back|get in touch|e-?mail|retry|ask|double[- ]check|send|give me)\b"
    r"|\b(?:try(?:ing)?|check(?:ing)?|call(?:ing)?|come) (?:again|back)\b|\btry(?:ing)? (?:again|later|another)\b"
    r"|\bi(?:'d| would)? (?:suggest|recommend|advise)\b|\b(?:best|safest|worth) (?:to |is )?(?:try|call|check"
    r"|contact|wait)\w*"
    r"|\bif you\b|\bi(?:'m| am) happy to\b"
)
_NO_ADVICE = re.compile(r"\bplease (?:hold|wait|bear|accept|excuse|forgive|be patient|stand by|hang)\b")


def advises(answer: str) -> bool:
    """Return whether the answer tells the user what to do next."""
    return any(
        _ADVICE.search(sentence) and not _NO_ADVICE.search(sentence)
        for sentence in sentences(plain(answer))
        if not _OFFER.search(sentence)
    )


# --- small talk ---

_SMALL = r"""
    hi hello hey hiya yo greetings good morning afternoon evening night day thanks thank you thx ty cheers ta much many
    so very a lot for your the help support great perfect awesome nice cool excellent wonderful lovely brilliant super
    amazing fantastic ok okay k kk alright right sure fine yes yeah yep yup no nope nah bye goodbye see later take care
    got it that's that is all was just what i needed needed wanted have and one works sounds good lol haha wow welcome
    appreciate appreciated understood noted done there how are doing today me too nothing else now my bad sorry oh ah
    ahh hm hmm mm never mind nevermind then this time again everything anything fair enough pity you're any on let's
    happy to help pleasure
"""
_SMALL_WORDS = frozenset(_SMALL.split())


def is_small_talk(text: str) -> bool:
    """Return whether a message only greets, thanks, agrees or says goodbye: it wants nothing."""
    found = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", plain(text))
    return not re.search(r"\d", text) and all(word in _SMALL_WORDS for word in found)


_WANTS = re.compile(
    r"\d|\b(?:whats?|how|when|where|which|who|why|whose|(?:can|could|will|would) (?:you|i|we)|pls|please|need"
    r"|want|wanna"
    r"|tell me|show me|give me|i'd like|looking for)\b"
    r"|^(?:(?:ok|okay|and|then|so|now|well|yes|no|just)[, ]+)*(?:is|are|do|does|did|can|could|give|tell|show|find"
    r"|check|list"
    r"|send|get|book|cancel|change|order|track|refund|return|help|make|add|search|write|explain|compare|calculate"
    r"|convert"
    r"|update|remove|move|try|open|close|call|pay|look|set|put|stop|start)\b"
)
_THANKS = re.compile(r"\b(?:thanks?|thank you|thx|cheers)\b")
_GREETS = re.compile(
    r"(?:(?:hi|hello|hey|good \w+)[ ,!.]*)*(?:how are you(?: doing)?|you there|anyone there|what'?s up)?[ ?!.]*"
)


def wants_something(text: str) -> bool:
    """Return whether a message of the user asks or wants something."""
    low = plain(text).strip()
    if "?" in text:
        return not _GREETS.fullmatch(low)
    return not is_small_talk(text) and not _THANKS.search(low) and bool(_WANTS.search(low))


# --- filler ---

_OPENING = (
    r"(?:(?:sure|ok|okay|of course|certainly|absolutely|definitely|alright|right|great|got it|no problem|thanks"
    r"|thank you|hello|hi|hey|well|yes|on it)[ ,.!-]*)*"
)
_FILLERS = (
    r"(?:please |just )?(?:one|a|give me a|wait a|hold on)[ ,]?(?:a )?(?:moment|second|sec|minute)\b.*",
    r"(?:let me|i'll|i will|i'm going to|allow me to) (?:\w+ ){0,3}?(?:check|look|see|find|help|get|think|work"
    r"|assist|do"
    r"|take|pull|give)\b.*",
    r"(?:please )?(?:wait|hold|bear with me|stand by)\b.*",
    r"(?:that's a |what a )?(?:great|good|excellent|interesting) question.*",
    r"(?:many )?thank(?:s| you) for \w+.*",
    r"i(?:'m|'d be| am| would be)? (?:\w+ )?(?:happy|glad|here|pleased|delighted) to (?:\w+ )?(?:help|assist|hear"
    r"|support).*",
    r"(?:happy|glad|always happy) to (?:help|assist).*",
    r"i(?:'m| am) (?:\w+ )?(?:happy|glad) to (?:listen|be of (?:help|service)).*",
    r"what would you like (?:me )?to (?:do|know|find|find out|look up|check|calculate|compute|work out|ask)"
    r"(?: (?:for you|today|about))?",
    r"(?:i )?hope (?:that )?(?:you|this|it|that|everything|all)\b.*",
    r"(?:almost|nearly) (?:done|there|ready|finished)",
    r"(?:let me|i'll|i will) [^,;]* and (?:get|come) back to you(?: \w+)?",
    r"(?:hi|hello|hey|dear|thanks|thank you|sorry),? [a-z\u00e0-\u017f]+",
    r"(?:how|what) (?:can|may|shall) i (?:help|assist|do)\b.*",
    r"(?:is there )?anything else.*",
    r"(?:please )?(?:feel free|let me know if|don't hesitate).*",
    r"(?:i'm )?(?:still )?(?:working|looking|checking)(?: (?:on|into) (?:it|that|this))?",
    r"(?:it|this|that) (?:is|'s) being (?:\w+ )+?(?:of|now)?",
    r"i (?:completely |fully |totally )?(?:understand|see|hear you|appreciate|get it)(?: (?:your|how|that|this"
    r"|the)\b[^,;]*)?",
    r"(?:i(?:'m| am) )?(?:so |very |really |truly )?(?:sorry|apologi[sz]e|apologies)(?: (?:for|about) [^,;]*)?",
    r"i (?:\w+ )?apologi[sz]e for [^,;]*",
    r"we (?:value|appreciate|love)\b.*",
    r"(?:here (?:you go|it is|is|are)|this is) ?(?:the |your |what i found)?(?:answer|results?|information"
    r"|details|summary"
    r"|overview)?",
    r"your (?:\w+ )?(?:question|satisfaction|request|message) (?:is|has been|was)\b.*",
    r"(?:let's|we'll) (?:\w+ ){0,3}(?:see|look|sort|start|dive|get)\b.*",
)
_FILLER = re.compile(rf"{_OPENING}(?:{'|'.join(_FILLERS)})?[ ,.!:\u2026?-]*")


# "What a great idea to ...!", "... is an interesting sum!": praise of what the user said, or wants to do.
_PRAISE_WORDS = (
    r"(?:great|good|nice|lovely|wonderful|excellent|interesting|fascinating|fantastic|beautiful|amazing|perfect)"
)
_PRAISE = re.compile(
    rf"(?:{_OPENING})?(?:what an? (?:\w+ )?{_PRAISE_WORDS}\b.*"
    rf"|.{{0,40}}(?:\bis|\bare|'s) (?:such )?an? (?:\w+ )?{_PRAISE_WORDS} \w+(?: \w+){{0,2}}!)"
)
# To keep waiting in a talk where nothing happens between two messages says nothing, whatever was asked.
_STALLS = re.compile(
    r"(?:just |please )?(?:one|a|give me a) (?:moment|second|sec|minute)\b"
    r"|\b(?:please (?:wait|hold)|bear with me|stand by)\b"
    r"|\b(?:still )?(?:working on|looking into) (?:it|that|this)\b|^(?:almost|nearly) (?:done|there|ready|finished)\b"
)


def stalls(sentence: str) -> bool:
    """Return whether a sentence of an answer only asks to wait, or says that it is being worked on."""
    return is_filler(sentence) and bool(_STALLS.search(plain(sentence)))


def praises(sentence: str) -> bool:
    """Return whether a sentence of an answer only says how good or interesting something is."""
    return bool(_PRAISE.fullmatch(plain(sentence).strip()))


# What is said to the assistant about itself, and is no thanks.
_OBJECTS = re.compile(r"\b(?:not|no|never|nobody|nothing|still|wrong|useless)\b|n't\b")
_TO_YOU = re.compile(r"\b(?:you|your|u|ur)\b")


def objects(text: str) -> bool:
    """Return whether a message of the user tells the assistant that something about it is not as it should be."""
    low = plain(text)
    return bool(_TO_YOU.search(low) and _OBJECTS.search(low)) and not _THANKS.search(low)


def is_filler(sentence: str) -> bool:
    """Return whether a sentence of an answer only keeps the talk going."""
    text = plain(sentence).strip()
    return is_small_talk(sentence) or bool(_FILLER.fullmatch(text))
