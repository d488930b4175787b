"""Taking out what is personal or secret, before anything leaves the process or touches a disk.

Each pattern is an RE2 expression: linear time on any input. Some have a check that a pattern cannot express (Luhn's
checksum of card numbers). What is found becomes ``<KIND:xxxx>``, where ``xxxx`` is a keyed hash of session and value:
the same value reads the same within a session, so that a judge can tell that the agent remembered it; it is neither
reversible nor linkable across sessions.

Ids that merely look numeric (orders, payments, reservations) stay: phone numbers are taken where they are written as
such, with a country code or the usual separators, or after a word such as "phone".
"""

import base64
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import re2

from gateway.crypto import keyed_hash
from gateway.tracing.spans import Trace

PLACEHOLDER = re.compile(r"<[A-Z]+:[a-z2-7]{4}>")

_Find = Callable[[str, int, int], Iterator[tuple[int, int]]]


def _whole(_text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the span as it is."""
    yield start, end


def _secret(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the span unless it says something about a secret instead of being one, or was redacted before."""
    redacted = PLACEHOLDER.search(text, start, end) or PLACEHOLDER.match(text, max(start - len("<SECRET:"), 0))
    if not redacted and text[start:end].lower().rstrip(".!?") not in _NO_SECRETS:
        yield start, end


_NO_SECRETS = frozenset(
    [
        "correct",
        "empty",
        "expired",
        "false",
        "incorrect",
        "invalid",
        "missing",
        "none",
        "null",
        "optional",
        "required",
        "true",
        "undefined",
        "valid",
        "wrong",
    ]
)

_CARD_NUMBER = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|35[0-9]{14}|3[0689][0-9]{12}"
    r"|6[0-9]{15}|62[0-9]{15,17}"
)
"""Leading digits and lengths of the card schemes in use: one order id in ten passes the checksum by chance."""
_DIGITS = re.compile(r"[0-9]+")
_FIRST_GROUP = re.compile(r"(?<![0-9])[2-6][0-9]{3,}")
_MAX_CARD_DIGITS = 19
_LEAST_CARD = 1e12
_MAX_CARD_CHARACTERS = 24  # 19 digits in five groups, and one more that tells that it goes on


def is_card_number(digits: str) -> bool:
    """Whether these are a payment card's digits: a scheme's prefix and length, and Luhn's checksum.

    Source: ISO/IEC 7812-1, annex B.
    """
    if not _CARD_NUMBER.fullmatch(digits):
        return False
    numbers = [int(digit) for digit in digits]
    doubled = [number * 2 - 9 * (number > 4) for number in numbers[-2::-2]]
    return (sum(numbers[-1::-2]) + sum(doubled)) % 10 == 0


def _cards(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the card numbers within a run of digits, which other numbers (a quantity, an expiry date) may be part of.

    A card number is written in groups of four or more digits, only its last one may be shorter.
    """
    if text[start - 1 : start] == "." and text[max(start - 2, 0) : start - 1].isdigit():
        start = next(_DIGITS.finditer(text, start, end)).end()  # behind the decimals of a number
    free = start
    for first in _FIRST_GROUP.finditer(text, start, end):
        if first.start() < free:
            continue
        digits = ""
        for group in _DIGITS.finditer(text, first.start(), min(first.start() + _MAX_CARD_CHARACTERS, end)):
            digits += group.group()
            if is_card_number(digits):
                free = group.end()
            if len(group.group()) < 4 or len(digits) > _MAX_CARD_DIGITS:
                break
        if free > first.start():
            yield first.start(), free


_PART_OF_AN_ID = (re.compile(r"[0-9][-./:]"), re.compile(r"[-.][0-9]"))
_DECIMAL = re.compile(r"\+[0-9]+\.[0-9]{1,2}")


def _phone(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the span unless digits go on behind it, or before it where that is no area code's leading 1."""
    before, after = _PART_OF_AN_ID
    goes_on = text[start] == "0" and before.match(text[max(start - 2, 0) : start])
    if not goes_on and not after.match(text, end) and not _DECIMAL.fullmatch(text, start, end):
        yield start, end


class Pattern(NamedTuple):
    """One kind of value."""

    kind: str
    """Upper-case label of the placeholder."""
    expression: str
    """RE2 expression. Its group ``value``, if it has one, is what is replaced; else the whole match is."""
    find: _Find = _whole
    """Narrows that down, given the text and the span: which parts of it really are such values."""


# A word begins here. In JSON that was put into a string, a line break is a backslash and an "n", which hides it.
_START = r"(?:\b|\\[nrt])"
# Letters and digits of any script, also escaped as JSON does it.
_LETTER = r"(?:[\pL\pM\pN]|\\+u[0-9a-fA-F]{4})"
# What makes the following text a secret: `password=`, `"db_password": `, `my password is `, `<password>`.
_GIVES_AWAY = (
    r"(?i)(?:passw(?:or)?d|passphrase|pwd|secret(?:[_ -]?(?:access[_ -]?)?key)?|(?:api|private|access)[_ -]?key"
    r"|(?:access|auth|refresh|session|bearer)[_ -]?token)\b[\"'\\]{0,8}\s*(?:is\b\s*:?|[:=]+>?|>)\s*"
)
_PHONE_SAYS = r"(?i)\b(?:phone|mobile|cell|tel|telephone|call me|reach me|contact me|my number|fax)(?:\b|_)"

PATTERNS = (
    Pattern(
        "KEY",
        r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\z)",
    ),
    Pattern("KEY", _START + r"(?P<value>eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"),
    Pattern(
        "KEY",
        _START + r"(?P<value>sk-[A-Za-z0-9_-]{16,}|[rsp]k_(?:live|test)_[A-Za-z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{20,}"
        r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}"
        r"|xox[abeprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{20,}|dapi[a-f0-9]{32}|pypi-[A-Za-z0-9_-]{20,}"
        r"|gw_[0-9a-f]{8}_[A-Za-z0-9_-]{43}|npm_[A-Za-z0-9]{30,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,})",
    ),
    Pattern("KEY", r"(?i)bearer\s+(?P<value>[A-Za-z0-9._~+/-]{16,}=*)", _secret),
    Pattern("KEY", r"(?i)authorization[\"'\\]{0,8}\s*[:=]\s*[\"'\\]{0,8}(?:[a-z]+\s+)?(?P<value>[^\s\"'\\,;<>]{8,})"),
    Pattern("SECRET", r"://[^\s/:@\"'\\<>]*:(?P<value>[^\s/@\"'\\]+)@", _secret),
    Pattern("SECRET", _GIVES_AWAY + r"\\*\"(?P<value>[^\"\\]+)\\*\"", _secret),
    Pattern("SECRET", _GIVES_AWAY + r"'(?P<value>[^'\\]+)'", _secret),
    Pattern("SECRET", _GIVES_AWAY + r"[\"'\\]{0,8}(?P<value>[^\s\"'\\,;}<>]{4,})", _secret),
    Pattern(
        "EMAIL",
        rf"(?:\\[nrt])?(?P<value>(?:{_LETTER}|[._%+-])+(?:@|%40)(?:{_LETTER}|-)+(?:\.(?:{_LETTER}|-)+)*"
        r"\.(?:\pL|\\+u[0-9a-fA-F]{4}){2,})",
    ),
    Pattern("CARD", _START + r"(?P<value>\d(?:[ \x{a0}\x{202f}\x{2011}-]?\d){12,})\b", _cards),
    Pattern("PHONE", r"(?:^|\\[nrt]|[^\w)])(?P<value>\+[1-9](?:[ .()/-]{0,3}\d){8,14})\b", _phone),
    Pattern(
        "PHONE",
        _START + r"(?P<value>00 ?[1-9]\d{0,2}[ /.-](?:[ .()/-]{0,2}\d){6,12}|00[1-9]\d{10,13})\b",
        _phone,
    ),
    Pattern("PHONE", r"(?:^|\\[nrt]|[^\w)])(?P<value>\+[1-9]\d{0,2}[ .-]\d{3}[ .-]\d{4})\b", _phone),
    Pattern("PHONE", r"(?P<value>(?:\(\d{3}\) ?|\b\d{3}[.-])\d{3}[ .-]\d{4})\b", _phone),
    Pattern("PHONE", r"\b(?P<value>[2-9]\d\d [2-9]\d\d \d{4})\b", _phone),
    Pattern("PHONE", r"\\[nrt](?P<value>\d{3}[.-]\d{3}[ .-]\d{4})\b", _phone),
    Pattern(
        "PHONE",
        _START + r"(?P<value>0[1-9]\d{1,3}[ /-]\d{3,4}[ -]?\d{3,5}|0[1-9](?:[ .-]\d{2}){4})\b",
        _phone,
    ),
    Pattern(
        "PHONE",
        _PHONE_SAYS + r"[\s:.#=\"'\\_]{0,8}(?:(?:number|no|nr|is|at|on)\b[\s:.#=\"'\\]{0,8}){0,3}"
        r"(?P<value>\d(?:[ .-]?\d){6,14})\b",
    ),
)

_SENSITIVE_NAME = re2.compile(
    r"(?:.*_)?(?:passw(?:or)?d|passphrase|pwd|secret|(?:api|private|access|secret)_?key|token|authorization"
    r"|(?P<phone>(?:phone|mobile|telephone|fax)(?:_?(?:number|no|nr))?))"
)
_TOKEN_COUNT = re2.compile(r"(?:.*_)?(?:input|output|total|max|prompt|completion|cached?)_token")
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MAX_NAME_CHARACTERS = 64


@lru_cache(maxsize=4096)
def _kind_of_field(name: str) -> str | None:
    """Return the kind of what stands under this name whatever it looks like: in JSON the name stands apart from it."""
    words = _CAMEL_CASE.sub("_", name).lower().replace("-", "_")
    match = None if _TOKEN_COUNT.fullmatch(words) else _SENSITIVE_NAME.fullmatch(words)
    return None if match is None else "PHONE" if match.group("phone") else "SECRET"


class Redactor:
    """Redacts text and JSON-like values with one deployment's key."""

    def __init__(self, key: bytes):
        self._key = key
        self._patterns = [(pattern, re2.compile(pattern.expression)) for pattern in PATTERNS]
        # One pass that says whether any pattern can match: most strings hold nothing, and go through it alone.
        self._any = re2.Set.SearchSet()
        for pattern in PATTERNS:
            self._any.Add(pattern.expression)
        self._any.Compile()

    def text(self, value: str, scope: str = "") -> str:
        """Return ``value`` with everything personal or secret replaced.

        Args:
            value: any text.
            scope: what placeholders are comparable within; the session id for traces.
        """
        if "\0" in value:  # Postgres, and so MLflow, has no text with it
            value = value.replace("\0", "\ufffd")
        try:
            found = self._any.Match(value)
        except UnicodeEncodeError:  # half a surrogate pair, which nothing that comes after could write down
            value = value.encode("utf-8", "replace").decode()
            found = self._any.Match(value)
        for index in sorted(found or ()):
            pattern, compiled = self._patterns[index]
            value = self._replace(pattern, compiled, value, scope)
        return value

    def value(self, value: Any, scope: str = "") -> Any:
        """Return a copy of a JSON-like value with every string in it redacted, keys of mappings included.

        Structs and SDK objects are taken as the JSON they would be stored as. Numbers stay, unless they are a payment
        card or stand under a name that says what they are.
        """
        if isinstance(value, str):
            return self.text(value, scope)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return self.value(int(value), scope) if value.is_integer() and value > _LEAST_CARD else value
        if isinstance(value, int):
            is_card = 0 < value < 10**_MAX_CARD_DIGITS and is_card_number(str(value))
            return self._placeholder("CARD", str(value), scope) if is_card else value
        if isinstance(value, dict):
            return {self.text(str(name), scope): self._named(str(name), item, scope) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item, scope) for item in value]
        return self.value(_plain(value), scope)

    def trace(self, trace: Trace) -> Trace:
        """Redact everything in the trace that came from people, models or tools, in place, and return it."""
        scope = trace.session_id
        for span in trace.spans:
            span.name = self.text(span.name, scope)
            span.inputs = self.value(span.inputs, scope)
            span.outputs = self.value(span.outputs, scope)
            span.attributes = self.value(span.attributes, scope)
            if span.error:
                span.error.message = self.text(span.error.message, scope)
        if trace.error:
            trace.error.message = self.text(trace.error.message, scope)
        return trace

    def identifier(self, value: str, kind: str) -> str:
        """Return an id that may be stored: itself, or a hash keyed for the whole deployment if it is personal.

        Unlike a placeholder it is the same in every session, so that grouping by user works.
        """
        return value if self.text(value) == value else f"{kind}-{keyed_hash(self._key, kind, value).hex()[:16]}"

    def _named(self, name: str, item: Any, scope: str) -> Any:
        """Redact a mapping's item whose name may say that it is sensitive."""
        kind = _kind_of_field(name) if len(name) <= _MAX_NAME_CHARACTERS else None
        if kind is None or not item or isinstance(item, bool):
            return self.value(item, scope)
        if isinstance(item, list | tuple | set | frozenset):
            return [self._named(name, each, scope) for each in item]
        if not isinstance(item, str | int | float):
            return self.value(item, scope)
        text = str(item)
        return text if PLACEHOLDER.fullmatch(text) else self._placeholder(kind, text, scope)

    def _replace(self, pattern: Pattern, compiled: Any, text: str, scope: str) -> str:
        group = compiled.groupindex.get("value", 0)
        pieces, done = [], 0
        for match in compiled.finditer(text):
            for start, end in pattern.find(text, *match.span(group)):
                pieces += [text[done:start], self._placeholder(pattern.kind, text[start:end], scope)]
                done = end
        return "".join([*pieces, text[done:]])

    def _placeholder(self, kind: str, found: str, scope: str) -> str:
        # 20 bits: enough to tell the few values of one session apart, too few to find a value by its hash.
        digest = base64.b32encode(keyed_hash(self._key, scope, _canonical(kind, found)))[:4].decode().lower()
        return f"<{kind}:{digest}>"


def _canonical(kind: str, found: str) -> str:
    """Return the form by which two ways of writing one value are the same."""
    if kind == "EMAIL":
        return found.lower().replace("%40", "@")
    if kind in {"CARD", "PHONE"}:
        return "".join(_DIGITS.findall(found)) or found
    return found.rstrip(".!?") or found


def _plain(value: Any) -> Any:
    """Return the JSON form of an object that is none of JSON's own types."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    try:
        return msgspec.to_builtins(value, enc_hook=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)
