"""Whether an answer is cut short."""

import re
from collections.abc import Iterator

from mlflow.entities import SpanType, Trace

from ._trace import assistant_text, earlier_messages, leaves, spans_of, text_leaves, tool_calls, user_texts
from ._words import name_words, sentences

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
    by_form = _cut_text(text) or _cut_list(text) or _cut_sentence(text)
    return _cut_by_model(trace) or by_form or _cut_word(trace, text)


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
    # "28,90 \u20ac" is how many countries write it.
    if end.endswith((",", ":", ";", "(", "[", "/", "&", " -", " \u2013", "=", "+")) or re.search(
        r"(?<!\d)(?<!\d )[$\u20ac\u00a3]$", end
    ):
        return "The last mark ends nothing"
    last = re.search(r"(?:^|[\s(\"'])([^\W\d_]+(?:['\u2019][a-z]+)?)$", end)
    if not last or len(end.split()) < 4 or _is_stranded(end, last[1].lower()):
        return None
    word = last[1].replace("\u2019", "'")
    if word.lower() in _NO_END and (word.islower() or word == "I"):
        return "The last word ends nothing"
    return None


_STRANDED = frozenset(("in", "on", "to", "for", "with", "from", "at", "by", "about", "of"))
_ELLIPSIS = frozenset(("have", "has", "had", "is", "are", "was", "were", "will", "would", "could", "should", "must"))


def _is_stranded(text: str, last: str) -> bool:
    """Return whether the last word can stand there: "what it is for", "all I have", "yes I will"."""
    sentence = re.split(r"[.!?]\s", text)[-1].lower()
    if last in _STRANDED:
        return bool(re.search(r"\b(?:what|which|who|whom|where|how|when)\b", sentence))
    before = re.search(r"(\w+) \w+$", sentence)
    return (
        last in _ELLIPSIS
        and before is not None
        and before[1] in ("i", "you", "we", "they", "it", "he", "she", "there", "that")
    )


_LEAST_WORDS = 3


def _cut_sentence(answer: str) -> str | None:
    """Return what is wrong if the last sentence ends with a word and no mark, where every other one has its mark."""
    lines = [line for line in answer.splitlines() if line.strip()]
    found = list(sentences(answer))
    if len(lines) > 1 or len(found) < 2 or not re.search(r"[a-z]$", answer) or re.search(r"[@/\\_]\S*$", answer):
        return None
    is_sentence = len(found[-1].split()) >= _LEAST_WORDS and found[0][0].isupper() and found[-1][0].isupper()
    has_ends = all(re.search(r"[.!?]$", each) for each in found[:-1])
    return "The last sentence has no end" if is_sentence and has_ends else None


def _cut_list(answer: str) -> str | None:
    # "1. ..., 2. ..., 3." is cut; a text that ends in a number and its point has it in a sentence.
    if re.search(r"\n\s*(?:\d{1,2}[.)]|[-*\u2022])$", answer):
        return "The last point of the list is empty"
    points = re.findall(r"(?m)^\s*(?:\d{1,2}[.)]|[-*\u2022])\s+(.+)$", answer)
    is_last = answer.endswith(points[-1]) if points else False
    if is_last and len(points) > 1 and all(re.search(r"[.!?]$", point) for point in points[:-1]):
        return None if re.search(r"[.!?)\"\u2026]$", points[-1]) else "The last point of the list has no end"
    return None


def _cut_word(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if the last word is no word of the turn, but the beginning of one."""
    last = re.search(r"(?<![\w.,-])[\w][\w.,-]*$", answer)
    if not last or len(answer.split()) < (3 if _SERIES.search(answer[: last.start()]) else 4):
        return None
    word = last[0].lower()
    known = set(re.findall(r"[\w][\w.,-]*", " ".join(_texts(trace)).lower() + " " + answer[: last.start()].lower()))
    known |= {each.rstrip(".,-") for each in known}
    if word in known:
        return None
    if word[0].isdigit():
        # A bare number may be one of many things; a price or a number that ends in its point is cut.
        is_price = answer[: last.start()].endswith(("$", "\u20ac", "\u00a3")) or word.endswith((".", ","))
        before = answer[: last.start()]
        if _ROUNDED.search(before):
            return None
        longer = next((each for each in sorted(known) if each.startswith(word) and each != word), None)
        is_cut = is_price and longer is not None and _is_cut_number(word, longer)
        # "34, 51, 6" beside 68, "2,8" beside 2866.5
        if not is_cut and (_SERIES.search(before) or re.fullmatch(r"\d{1,3}(?:,\d{3})*,\d{0,2}", word)):
            digits = word.replace(",", "")
            longer = next((each for each in sorted(known) if _is_beginning(digits, each)), None)
            is_cut = longer is not None
    else:
        rests = {each: each.removeprefix(word) for each in sorted(known) if len(word) > 2 and each.startswith(word)}
        longer = next((each for each, rest in rests.items() if word.endswith("v") or not _SUFFIX.fullmatch(rest)), None)
        is_cut = longer is not None
    return f"The last word is the beginning of {longer!r}" if is_cut else None


# "order" beside "orders" and "refund" beside "refundable" are words of their own; none ends in "v".
_SUFFIX = re.compile(
    r"'?s|e[sdr]?|ers?|rs?|d|n|t|y|ed|ings?|ments?|ly|ness|able|ies|al|ally|[ai]?tions?|ions?|ity|ors?|ists?|ful"
    r"|less|ure"
    r"|[ae]n[ct]e?s?|ive|age|ee|ship|[-.,_].*"
)


_ROUNDED = re.compile(r"(?:\b(?:about|around|roughly|approximately|nearly|almost|some)|~) ?\W?$", re.IGNORECASE)
_SERIES = re.compile(r"\d, \d[\d.]*, $")


def _is_beginning(digits: str, number: str) -> bool:
    """Return whether a number that the turn has begins with these digits and goes on before its decimals."""
    whole = number.replace(",", "").partition(".")[0]
    return whole.isdigit() and whole != digits and whole.startswith(digits)


def _is_cut_number(word: str, longer: str) -> bool:
    try:
        return float(word.rstrip(".,")) != float(longer)
    except ValueError:
        return True


def _texts(trace: Trace) -> Iterator[str]:
    yield from user_texts(trace)
    for call in tool_calls(trace):
        yield from (text for _, text in text_leaves(call.outputs))
        yield " ".join(word for key, _ in leaves(call.outputs) for word in (*name_words(key), key))
    yield from earlier_messages(trace)
