"""Whether a turn helped the user, by its form: the judgements on one turn that more than one scorer needs."""

import re
from typing import Any

from mlflow.entities import Span, Trace

from ._claims import denies, fulfils
from ._evidence import evidence_of_use
from ._speech import advises, declined, is_filler, is_small_talk, objects, praises, questions, stalls, wants_something
from ._trace import (
    assistant_text,
    earlier_messages,
    failure_of,
    has_failed,
    offered_tools,
    root_of,
    tool_calls,
    user_texts,
)
from ._words import CODE, name_parts, plain, sentences, stem, words

# --- declining ---

_REASON = re.compile(
    r"\b(?:because|since|as (?:it|the|you|this|that)|due to|already|polic|rules?|expired|past|passed|too late"
    r"|not eligible|ineligible|final|non-refundable|according to|therefore|overrid|exception|waive)"
)


def refusal_in(trace: Trace) -> tuple[str | None, str | None]:
    """Return the words with which the answer declines, and what excuses them; None where there are none."""
    answer = assistant_text(trace)
    words_of_it = declined(answer) if answer else None
    return words_of_it, _excuse(trace, answer or "", words_of_it) if words_of_it else None


def _excuse(trace: Trace, answer: str, declining: str) -> str | None:
    calls, tools = tool_calls(trace), offered_tools(trace)
    if any(failure_of(call) is not None for call in calls):
        return "a tool failed"
    if re.search(r"\bbut (?:i can|we can|here)\b|\bbut\b[^.]*\d", declining):
        return "it does what it can"
    if calls and re.search(r"\d", answer) and evidence_of_use(trace)[0]:
        return "it was told beside a tool's result"
    uncalled = {name: tool for name, tool in tools.items() if name not in {call.name for call in calls}}
    if calls and (_REASON.search(plain(answer)) or any(denies(call.outputs, "") for call in calls)):
        return "it was told from a tool's result"
    if not calls and _REASON.search(plain(answer)) and earlier_messages(trace, "tool"):
        return "the reason is known from before"
    # What the user wants may stand in the messages before: "why?", "its my own account".
    asked = " ".join([*earlier_messages(trace, "user")[-2:], *user_texts(trace)])
    if tools and not any(
        _could_do(name, tool, asked, declining) for name, tool in (uncalled if calls else tools).items()
    ):
        return "no tool has to do with it"
    return None


def _could_do(name: str, tool: dict[str, Any], asked: str, declining: str) -> bool:
    """Return whether the tool does what was declined: by its verb and what it is about, or by taking numbers."""
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    kinds = (
        [each.get("type") for each in properties.values() if isinstance(each, dict)]
        if isinstance(properties, dict)
        else []
    )
    if kinds and all(kind in ("number", "integer") for kind in kinds):
        return len(re.findall(rf"\d+|{_FRACTIONS}", asked.lower())) > 1
    verb, *objects = [stem(part) for part in name_parts(name)] or [""]
    spoken, wanted = words(declining), words(asked)
    is_general = _DEFLECTS.search(declining) is not None or not spoken - _GENERAL
    if verb in _READING:
        has_verb, said_verb = bool((spoken | wanted) & _READING), bool(spoken & _READING)
    else:
        has_verb, said_verb = (
            any(fulfils(verb, each, by_name=True) for each in said) for said in (spoken | wanted, spoken)
        )
    if is_general and CODE.search(asked) and any(_IDENTIFIES.search(each) for each in properties or ()):
        return True  # all is declined, without a look at the thing that the user named
    if is_general:
        return has_verb and (verb not in _READING or bool(set(objects) & wanted) or verb in wanted)
    # What is declined has to name the deed or its object, not only what was said before.
    is_about, said_about = bool(set(objects) & (spoken | wanted)), bool(set(objects) & spoken)
    if verb in _READING:
        return has_verb and is_about and (said_verb or said_about)
    return has_verb and (said_verb or said_about) and (is_about or bool(re.search(r"\d", asked)))


_FRACTIONS = r"\b(?:half|third|quarter|fifth|tenth|double|twice|dozen|two|three|four|five|six|ten|hundred)\b"
_IDENTIFIES = re.compile(r"(?:^|_)(?:id|number|no|reference|ref|code|sku|serial)$")
_DEFLECTS = re.compile(r"\bplease (?:contact|call|use|ask|get|reach|turn)\b")
_SAYS_NO_MORE = """
    ca wo do that this it help assist comply with not can cannot unable able i'm am beyond outside scope what
    something me capabilities abilities request possible unfortunately sorry understand here task process perform
    complete share tell say show give disclose grant granted given provided offered shared done processed issued work be
    decline declined refuse must rather mentioned complete request requests don't have way too many much for
    """
_GENERAL = frozenset(stem(word) for word in _SAYS_NO_MORE.split())
_TO_READ = "list get show find search look lookup check track view fetch share"
_READING = frozenset(stem(word) for word in _TO_READ.split())


# --- nothing said ---

_NOTHING = frozenset({"", "none", "null", "n/a", "na", "undefined", "nan", "nil", "tbd", "todo", "object object"})
# A picture or a smiley: enough to answer "ok, thanks".
_SMILES = re.compile(r"[\u2600-\u27bf\U0001f300-\U0001faff]|[:;=]-?[)DP]")
_TAKES_NOTE = re.compile(r"(?:ok|okay|got it|noted|understood|i see|alright|right|sure)[,.!: ]")


def emptiness_of(trace: Trace) -> str | None:
    """Return in which way the answer says nothing, None if it says something."""
    root = root_of(trace)
    if root is None or (root.outputs is None and not has_failed(root)) or root.get_attribute("gateway.cancelled"):
        return None  # paused, ended from outside, or the trace does not show it
    answer = assistant_text(trace) or ""
    bare = re.sub(r"[\W_]+", " ", plain(answer)).strip()
    asked = user_texts(trace)
    is_wanted = any(wants_something(text) or objects(text) for text in asked)
    if bare in _NOTHING and (is_wanted or not _SMILES.search(answer)):
        return f"empty: {answer[:40]!r}"
    lines = list(sentences(answer))
    is_filling = is_wanted or (not tool_calls(trace) and any(stalls(line) for line in lines))
    if is_filling and all(_says_nothing(line, trace) for line in lines):
        return f"nothing but filler: {answer!r}"
    if _is_platitude(answer) and evidence_of_use(trace)[0] is False:
        return f"nothing but a platitude: {answer!r}"
    is_note = _TAKES_NOTE.match(plain(answer)) and not questions(answer) and not any("?" in text for text in asked)
    if is_note and not tool_calls(trace):
        said = set(re.findall(r"\w+", plain(" ".join(asked))))
        added = (
            words(answer) - {stem(word) for word in said} - {stem(word) for word in ("got", "noted", "okay", "right")}
        )
        values = set(re.findall(r"\d+", answer))
        if values and values <= said and not added:
            return f"nothing but what the user had said: {answer!r}"
    return None


def _says_nothing(sentence: str, trace: Trace) -> bool:
    if praises(sentence):
        return set(re.findall(r"\d[\d.,]*\d|\d", sentence)) <= set(
            re.findall(r"\d[\d.,]*\d|\d", " ".join(user_texts(trace)))
        )
    if re.search(r"\d", sentence) and not re.search(r"\b(?:sorry|apolog)", plain(sentence)):
        return False
    if is_small_talk(sentence):
        # "Yes." answers a question, "Sure, done!" reports an action.
        return not tool_calls(trace) and not re.match(r"(?:yes|no|nope|yep)\b", plain(sentence))
    return is_filler(sentence)


def _is_platitude(answer: str) -> bool:
    """Return whether an answer states no value and nothing that is so or is not so in this case."""
    return len(answer.split()) > 5 and not re.search(
        r"\d|\b(?:no|not|none|nothing|never|only|yes|i|it's|it|done|sorry|unfortunately|error|failed|problem|sadly|all|still"
        r"|now|true|more than|less than|first|then)\b"
        r"|n't\b|'(?:ve|ll|d)\b",
        plain(answer),
    )


# --- what came of it ---


def working_calls(trace: Trace) -> list[Span]:
    """Return the turn's tool calls that worked."""
    return [call for call in tool_calls(trace) if failure_of(call) is None]


def served(trace: Trace) -> bool:
    """Return whether tools did what was asked and the answer tells of it."""
    answer = assistant_text(trace)
    calls = working_calls(trace)
    if not answer or not calls or emptiness_of(trace) or refusal_in(trace)[0]:
        return False
    return not any(denies(call.outputs, "") for call in calls) and evidence_of_use(trace)[0] is not False


def failing_of(trace: Trace) -> str | None:
    """Return why the turn brought the user nothing, not even a question that gets them on; None if it did.

    It did not if the run failed, if the answer declines or says nothing, if tools failed and no advice is given, or if
    tools returned something and the answer has nothing of it.
    """
    answer = assistant_text(trace)
    if not answer or not answer.strip():
        return "no answer"
    if all(is_small_talk(text) for text in user_texts(trace)):
        return None
    declining, excuse = refusal_in(trace)
    if declining and not excuse:
        return "declined"
    if emptiness_of(trace):
        return "nothing said"
    if tool_calls(trace) and not working_calls(trace):
        return None if advises(answer) or questions(answer) else "an error"
    return "nothing of the results" if evidence_of_use(trace)[0] is False else None


def helped(trace: Trace) -> bool:
    """Return whether the turn brought the user something."""
    return failing_of(trace) is None


_ALIKE = 0.8


def is_alike(one: str, other: str) -> bool:
    """Return whether two answers say the same, or one a part of the other, by the words that carry meaning."""
    first, second = words(one), words(other)
    shared = len(first & second)
    return shared > 1 and shared / min(len(first), len(second)) >= _ALIKE
