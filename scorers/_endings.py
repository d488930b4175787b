"""Whether an answer is cut short."""

import re
from collections.abc import Iterator

from mlflow.entities import SpanType, Trace

from ._trace import assistant_text, earlier_messages, leaves, spans_of, text_leaves, tool_calls, user_texts
from ._words import name_words, stem

_CUT_REASONS = ("length", "max_tokens", "max_output_tokens", "model_length", "incomplete")
_CANNOT_END = """
    a an the and or but nor of to for with from as in on under is are was were be been because since than your my our
    their his her its which who whose if when while where will would could should must into onto per via between
    including such has have had i we at by that's it's there's i'm you're we're i'll you'll we'll i've you've about
    until although
    """
_NO_END = frozenset(_CANNOT_END.split())


def cut_of(trace: Trace) -> str | None:
    """Return by what it shows that the answer is cut short, None if it does not."""
    text = (assistant_text(trace) or "").strip()
    if not text:
        return None
    return _cut_by_model(trace) or _cut_text(text) or _cut_list(text) or _cut_word(trace, text)


def _cut_by_model(trace: Trace) -> str | None:
    calls = spans_of(trace, SpanType.CHAT_MODEL)
    outputs = calls[-1].outputs if calls else None
    if not isinstance(outputs, dict):
        return None
    choices = outputs.get("choices")
    found = [each for each in [outputs, *(choices if isinstance(choices, list) else [])] if isinstance(each, dict)]
    reasons = [each.get(key) for each in found for key in ("finish_reason", "stop_reason", "status")]
    cut = next((each for each in reasons if isinstance(each, str) and each.lower() in _CUT_REASONS), None)
    return f"The model stopped early ({cut})" if cut else None


def _cut_text(answer: str) -> str | None:
    if answer.count("```") % 2:
        return "A code block is left open"
    # A smiley's bracket, or that of "a)", opens and closes nothing.
    bare = re.sub(r"[:;=]-?[()]|(?m:^\s*\w{1,3}\))|\b\w\)(?=\s)", " ", answer)
    if bare.count("(") > bare.count(")") or bare.count("[") > bare.count("]"):
        return "A bracket is left open"
    if bare.count("\u201c") > bare.count("\u201d"):
        return "A quotation is left open"
    end = answer.rstrip("*_` ")
    if end.endswith((",", ":", ";", "(", "[", "/", "&", "$", "\u20ac", "\u00a3", " -", " \u2013", "=", "+")):
        return "The last mark ends nothing"
    last = re.search(r"(?:^|[\s(\"'])([^\W\d_]+(?:['\u2019][a-z]+)?)$", end)
    is_sentence = bool(last) and len(end.split()) > 3
    if (
        last
        and is_sentence
        and last[1].replace("\u2019", "'").lower() in _NO_END
        and (last[1].islower() or last[1] == "I")
    ):
        return "The last word ends nothing"
    return None


def _cut_list(answer: str) -> str | None:
    points = re.findall(r"(?m)^\s*(?:\d{1,2}[.)]|[-*\u2022])\s+(.+)$", answer)
    is_last = answer.endswith(points[-1]) if points else False
    if is_last and len(points) > 1 and all(re.search(r"[.!?]$", point) for point in points[:-1]):
        return None if re.search(r"[.!?)\"\u2026]$", points[-1]) else "The last point of the list has no end"
    return None


def _cut_word(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if the last word is no word of the turn, but the beginning of one."""
    last = re.search(r"(?<![\w.,-])[\w][\w.,-]*$", answer)
    if not last or len(answer.split()) < 4:
        return None
    word = last[0].lower()
    known = set(re.findall(r"[\w][\w.,-]*", " ".join(_texts(trace)).lower() + " " + answer[: last.start()].lower()))
    known |= {each.rstrip(".,-") for each in known}
    is_number = word[0].isdigit()
    if word in known or (not is_number and len(word) < 3):
        return None
    # "order" beside "orders" is a word of its own; none ends in "v".
    if not word.endswith("v") and stem(word) in {stem(each) for each in known}:
        return None
    longer = next((each for each in sorted(known) if each.startswith(word) and each != word), None)
    if longer and (not is_number or _is_cut_number(word, longer)):
        return f"The last word is the beginning of {longer!r}"
    return None


def _is_cut_number(word: str, longer: str) -> bool:
    try:
        return float(word.rstrip(".")) != float(longer)
    except ValueError:
        return True


def _texts(trace: Trace) -> Iterator[str]:
    yield from user_texts(trace)
    for call in tool_calls(trace):
        yield from (text for _, text in text_leaves(call.outputs))
        yield " ".join(word for key, _ in leaves(call.outputs) for word in (*name_words(key), key))
    yield from earlier_messages(trace)
