"""How alike two rows of a dataset are, by what the user asked last and which tools were called.

The whole input is no measure: it carries the history, so that the same question is another input in each turn. A
signature holds hashes of the words and word pairs of the question: the smallest ones, as many as a fixed size allows
(the sketch of Broder, "On the resemblance and containment of documents", 1997). Below that size, which is that of
nearly all messages, it holds all of them, and the similarity of two signatures is exact. A MinHash of the same size
would be off by some 0.03 here as well (its standard error is ``sqrt(J(1 - J) / n)`` with n hashes).

Pairs, so that "euros to dollars" is not "dollars to euros"; words, so that one word more does not undo it; no pieces of
words, by which A-1001 would be as good as A-1002. "And the other one?" means nothing alone, so that what was asked
before it has to be alike as well. The same question answered by other tools is another case.
"""

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, NamedTuple

from gateway.tracing.messages import text_of
from gateway.tracing.redaction.redactor import PLACEHOLDER

_MOST_HASHES = 192  # words and pairs of some 100 different words; of what was asked before, as many again
_HASH_BYTES = 4
_DIGEST_BYTES = 16
_HEAD = struct.Struct(f">{_DIGEST_BYTES}s{_DIGEST_BYTES}sH")
_FEW_WORDS = 6
_MOST_BEFORE = 2  # messages
# A word of Chinese, Japanese or Korean has no blanks around it: there, each character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


class Signature(NamedTuple):
    """What is kept of a row to compare it by."""

    inputs: bytes
    """Hash of the inputs: MLflow makes equal ones one row."""
    tools: bytes
    """Hash of the names of the tools."""
    question: frozenset[int]
    """Hashes of the words and pairs of the user's last message."""
    before: frozenset[int]
    """The same of the messages before it, where the last one has few words."""

    def encode(self) -> bytes:
        """Return it as it is stored: 42 bytes, and 4 a hash."""
        hashes = [*sorted(self.question), *sorted(self.before)]
        return _HEAD.pack(self.inputs, self.tools, len(self.question)) + struct.pack(f">{len(hashes)}I", *hashes)

    @classmethod
    def decode(cls, stored: bytes) -> "Signature":
        """Return what `encode` wrote."""
        inputs, tools, count = _HEAD.unpack_from(stored)
        hashes = struct.unpack_from(f">{(len(stored) - _HEAD.size) // _HASH_BYTES}I", stored, _HEAD.size)
        return cls(inputs, tools, frozenset(hashes[:count]), frozenset(hashes[count:]))


def signature(inputs: Mapping[str, Any], tools: Iterable[str]) -> Signature:
    """Return the signature of a row.

    Args:
        inputs: of the row: chat messages under ``messages``; anything else is compared by its JSON text.
        tools: names of the tools that were called for it.
    """
    whole = json.dumps(inputs, sort_keys=True, default=str)
    messages = inputs.get("messages")
    question, before = _question(messages) if isinstance(messages, list) else (_words(whole), [])
    return Signature(_digest(whole), _digest("\n".join(sorted(tools))), _sketch(question), _sketch(before))


def similarity(one: Signature, other: Signature) -> float:
    """Return how alike two rows are, from 0 to 1: Jaccard's index of the questions, or of what was before if less."""
    if one.tools != other.tools:
        return 0.0
    alike = _jaccard(one.question, other.question)
    return min(alike, _jaccard(one.before, other.before)) if alike else 0.0


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    union: Set[int] = one | other
    if max(len(one), len(other)) == _MOST_HASHES < len(union):
        union = set(sorted(union)[:_MOST_HASHES])
    return len(one & other & union) / len(union) if union else 1.0


def _sketch(words: Sequence[str]) -> frozenset[int]:
    pairs = (f"{one} {other}" for one, other in pairwise(words))
    hashes = sorted({int.from_bytes(_digest(each)[:_HASH_BYTES], "big") for each in (*words, *pairs)})
    return frozenset(hashes[:_MOST_HASHES])


def _question(messages: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the words of the user's last message, and of those before it if they are few.

    What is asked once more in the same words counts once.
    """
    said = [
        _words(text_of(each.get("content")))
        for each in messages
        if isinstance(each, Mapping) and each.get("role") == "user"
    ]
    if not said:
        return [], []
    *earlier, last = said
    if len(last) >= _FEW_WORDS:
        return last, []
    before = [words for words in earlier if words != last][-_MOST_BEFORE:]
    return last, [word for words in before for word in words]


def _words(text: str) -> list[str]:
    # A placeholder differs from session to session for the same value: only what it stands for is comparable.
    plain = PLACEHOLDER.sub(lambda found: f" {found[0][1:].partition(':')[0]} ", text)
    return _WORD.findall(unicodedata.normalize("NFKC", plain).casefold())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=_DIGEST_BYTES).digest()
