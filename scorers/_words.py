"""What the scorers read out of wording: words without their endings, sentences, and what a sentence does."""

import re
from collections.abc import Iterator

# What redaction leaves in place of an e-mail address, a phone number, a card or a key.
PLACEHOLDER = re.compile(r"<[A-Z_]+:[a-z0-9]+>")
# An identifier: letters and digits in one, such as A-1001.
CODE = re.compile(r"(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[A-Za-z])\w+(?:-\w+)*")

# Words that say nothing about the subject of a sentence. Question words other than what and which are not among them:
# "where is my order" and "when is my order" are different questions.
_COMMON = """
    a about after all also am an and any are as at be been before being but by can could did do does doing for had has
    have having he her here hers him his i if in into is it its just let like may me might more most much must my of
    on or our ours out over please shall she should so some than thanks thank that the their them then there these
    they this those to too up us very was we were what which will with would you your yours
"""
STOPWORDS = frozenset(_COMMON.split())


def plain(text: str) -> str:
    """Return the text in lower case, with one kind of apostrophe and without the marks of Markdown."""
    return re.sub(r"[*`]+|(?<!\w)_+|_+(?!\w)", "", text.replace("\u2019", "'")).lower()


def stem(word: str) -> str:
    """Cut the common English endings, so that "shipped", "ships" and "shipment" are one word."""
    if len(word) > 4:
        short = re.sub(r"(?:ations?|ments?|ings?|ies|ed|es|s|y|e)$", "", word)
        word = short if len(short) > 2 else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def words(text: str, ignored: frozenset[str] = STOPWORDS) -> set[str]:
    """Return the stems of the words of `text`, without those of `ignored`, placeholders, codes and numbers."""
    text = CODE.sub(" ", PLACEHOLDER.sub(" ", text.replace("\u2019", "'"))).lower()
    text = re.sub(r"'(?:s|re|ve|ll|d|m)\b", "", re.sub(r"n't\b", " not", text))
    return {stem(word) for word in re.findall(r"[^\W\d_]+", text) if word not in ignored and len(word) > 1}


def name_parts(name: str) -> list[str]:
    """Return the words of an identifier in lower case: `cancelOrder` and `cancel_order` are "cancel" and "order"."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())


def name_words(name: str) -> set[str]:
    """Return the stems of the words of an identifier."""
    return {stem(word) for word in name_parts(name)}


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of `text`, each with the mark that ends it. A line break ends a sentence too."""
    for line in text.splitlines():
        for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+", line):
            if sentence.strip():
                yield sentence.strip()
