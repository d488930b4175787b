"""What can be read off an English text without understanding it: its words, names, numbers, yes or no.

The offline model has nothing better to choose and fill the tools of a client with.
"""

import itertools
import re
from collections.abc import Iterator

_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_CLAUSE_END = re.compile(r'[,;:()\[\]"]')
_QUOTED = re.compile(r'"([^"]+)"')
_TYPEWRITER_QUOTES = str.maketrans("\u2019\u201c\u201d", '\'""')
_AFTER_PREPOSITION = [re.compile(rf"\b{word}\s+([^.!?,;]+)", re.IGNORECASE) for word in ("in", "for", "of")]

# Not a part of "A-1001" or of "2026-03-16"; never so long that it could not be a float.
_NUMBER = re.compile(r"(?<![\w.:/-])-?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,15})?(?!\d|[.:/-]\d)")
_DIGITS = re.compile(r"\d{1,15}")

_NO = re.compile(r"\b(?:no|not|never|none|without|cannot|refused|rejected)\b|n't\b", re.IGNORECASE)
_YES = re.compile(
    r"\b(?:yes|true|ok|okay|sure|certainly|correct|right|approved|accepted|confirmed|allowed|done)\b",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Return the words of a text or of an identifier, in lower case and without the "s" of a plural."""
    return [_singular(word.lower()) for word in _WORD.findall(_CAMEL_CASE.sub(" ", text))]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    return word.removesuffix("s") if len(word) > 3 else word


# Besides words that every sentence has, those that every other tool is named by: "get" says nothing of `get_weather`.
_COMMON = frozenset(
    words(
        "an and any are as at be but by can could did do does for from has have he her his how if in into is it its "
        "me my no not of off on one or our out she so some that the their them then there these they this those to "
        "up us was we were what when where which who why will with would yes you your about all also please "
        "add ask call check create current delete fetch find function get give given list look lookup make need "
        "read return run search send set show tell tool update use user want write"
    )
)


def topics(text: str) -> set[str]:
    """Return the words that say what a text is about."""
    return {word for word in words(text) if len(word) > 1} - _COMMON


def phrases(text: str) -> list[str]:
    """Return what looks like the object of a request, the best guess first.

    That is every capitalised phrase inside a sentence, then every quotation. Where there is neither, it is what
    follows "in", else "for", else "of". Empty when there is none of it.
    """
    text = _plain(text)
    found = [*_capitalised(text), *_QUOTED.findall(text)]
    if not found:
        found = [match[1] for match in (pattern.search(text) for pattern in _AFTER_PREPOSITION) if match][:1]
    stripped = (phrase.strip(" .!?'").removesuffix("'s") for phrase in found)
    return list(dict.fromkeys(phrase for phrase in stripped if phrase))


def _capitalised(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text):
        _, _, after_first_word = sentence.strip().partition(" ")
        for clause in _CLAUSE_END.split(after_first_word):
            for is_name, group in itertools.groupby(clause.split(), _is_name):
                if is_name:
                    yield " ".join(group)


def _is_name(word: str) -> bool:
    return word[0].isupper() and word.partition("'")[0] != "I"


def numbers(text: str) -> list[float]:
    """Return the numbers of a text in their order; where none stands alone, those inside names such as A-1001."""
    found = _NUMBER.findall(text) or _DIGITS.findall(text)
    values = (float(number.replace(",", "")) for number in found)
    return [int(value) if value.is_integer() else value for value in values]


def denies(text: str) -> bool:
    """Return whether the text says no to something."""
    return bool(_NO.search(_plain(text)))


def affirms(text: str) -> bool:
    """Return whether the text says yes, and no to nothing."""
    return bool(_YES.search(text)) and not denies(text)


def _plain(text: str) -> str:
    """Return the text with typewriter quotes, which is how the patterns here have them."""
    return text.translate(_TYPEWRITER_QUOTES)
