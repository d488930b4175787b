"""Taking out what is personal or secret, before anything leaves the process or touches a disk.

Each pattern is an RE2 expression: linear time on any input. Some have a check that a pattern cannot express (Luhn's
checksum of card numbers). What is found becomes ``<KIND:xxxx>``, where ``xxxx`` is a keyed hash of session and value:
the same value reads the same within a session, so that a judge can tell that the agent remembered it; it is neither
reversible nor linkable across sessions.

Ids that merely look numeric (orders, payments, reservations) stay: phone numbers are taken where they are written as
such, with a country code or the usual separators, or after a word such as "phone".
"""

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import re2

from gateway.crypto import keyed_hash


class Pattern(NamedTuple):
    """One kind of value."""

    kind: str
    """Upper-case label of the placeholder."""
    expression: str
    """RE2 expression. Its group ``value``, if it has one, is what is replaced; else the whole match is."""
    check: Callable[[str], bool] | None = None
    """Must hold for the value, or it stays."""


_CARD_NUMBER = re2.compile(r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|6\d{15,18}")
"""Leading digits and lengths of the card schemes in use: one order id in ten passes the checksum by chance."""


def is_card_number(value: str) -> bool:
    """Whether ``value`` is a payment card's number: a scheme's prefix and length, and Luhn's checksum.

    Source: ISO/IEC 7812-1, annex B.
    """
    number = "".join(character for character in value if character.isdigit())
    if not _CARD_NUMBER.fullmatch(number):
        return False
    digits = [int(digit) for digit in number]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


PATTERNS = (
    Pattern("KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"),
    Pattern("KEY", r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    Pattern(
        "KEY",
        r"\b(?:sk-[A-Za-z0-9_-]{16,}|[rsp]k_(?:live|test)_[A-Za-z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{20,}"
        r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}"
        r"|xox[abeprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{20,}|dapi[a-f0-9]{32}|pypi-[A-Za-z0-9_-]{20,}"
        r"|npm_[A-Za-z0-9]{30,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,})",
    ),
    Pattern("KEY", r"(?i)\bbearer\s+(?P<value>[A-Za-z0-9._~+/-]{16,}=*)"),
    Pattern(
        "SECRET",
        r"(?i)\b(?:password|passwd|pwd|secret|api[_ -]?key|access[_ -]?token|auth[_ -]?token)\b"
        r"[\"'\\]{0,4}\s*(?:[:=]|\bis\b)\s*[\"'\\]{0,4}(?P<value>[^\s\"'\\,;}<>]{4,})",
    ),
    Pattern("EMAIL", r"[\pL\pN._%+-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)*\.\pL{2,}"),
    Pattern("CARD", r"\b\d(?:[ -]?\d){12,18}\b", is_card_number),
    Pattern("PHONE", r"(?:\+|\b00)[1-9]\d{0,2}(?:[ .()/-]{0,3}\d){6,13}\b"),
    Pattern("PHONE", r"(?:\(\d{3}\) ?|\b\d{3}[.-])\d{3}[ .-]\d{4}\b"),
    Pattern("PHONE", r"\b0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}\b"),
    Pattern(
        "PHONE",
        r"(?i)\b(?:phone|mobile|cell|tel|telephone|call me (?:at|on)|fax)\b[\s:.#=\"'a-z]{0,20}?"
        r"(?P<value>\d(?:[ .-]?\d){6,14})\b",
    ),
)

PLACEHOLDER = re2.compile(r"<[A-Z]+:[a-z2-7]{4}>")

_SENSITIVE_NAME = re2.compile(
    r"(?i)^(?:.*[_-])?(?:password|passwd|pwd|secret|api[_-]?key|token|authorization|phone|mobile|telephone)$"
)
"""Names of fields whose value goes whatever it looks like: in JSON the name stands apart from the value."""
_NOT_SECRET = re2.compile(r"(?i)(?:^|_)(?:input|output|total|max|prompt|completion|cached?)_?tokens?$")


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
        for index in sorted(self._any.Match(value) or ()):
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
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return self._placeholder("CARD", str(value), scope) if is_card_number(str(value)) else value
        if isinstance(value, dict):
            return {self.text(str(name), scope): self._named(str(name), item, scope) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item, scope) for item in value]
        return self.value(_plain(value), scope)

    def identifier(self, value: str, kind: str) -> str:
        """Return an id that may be stored: itself, or a hash keyed for the whole deployment if it is personal.

        Unlike a placeholder it is the same in every session, so that grouping by user works.
        """
        return value if self.text(value) == value else f"{kind}-{keyed_hash(self._key, kind, value).hex()[:16]}"

    def _named(self, name: str, item: Any, scope: str) -> Any:
        """Redact a mapping's item whose name may say that it is sensitive."""
        named = isinstance(item, str | int) and not isinstance(item, bool) and bool(item)
        if named and _SENSITIVE_NAME.match(name) and not _NOT_SECRET.search(name):
            text = str(item)
            redacted = self.text(text, scope)
            if redacted != text:
                return redacted
            kind = "PHONE" if name.lower().endswith(("phone", "mobile")) else "SECRET"
            return text if PLACEHOLDER.fullmatch(text) else self._placeholder(kind, text, scope)
        return self.value(item, scope)

    def _replace(self, pattern: Pattern, compiled: Any, value: str, scope: str) -> str:
        group = compiled.groupindex.get("value", 0)

        def substitute(match: Any) -> str:
            found: str = match.group(group)
            if pattern.check and not pattern.check(found):
                return str(match.group())
            start, end = match.span(group)
            offset = match.start()
            whole: str = match.group()
            return whole[: start - offset] + self._placeholder(pattern.kind, found, scope) + whole[end - offset :]

        return str(compiled.sub(substitute, value))

    def _placeholder(self, kind: str, found: str, scope: str) -> str:
        # 20 bits: enough to tell the few values of one session apart, too few to find a value by its hash.
        digest = base64.b32encode(keyed_hash(self._key, scope, _canonical(kind, found)))[:4].decode().lower()
        return f"<{kind}:{digest}>"


def _canonical(kind: str, found: str) -> str:
    """Return the form by which two ways of writing one value are the same."""
    if kind == "EMAIL":
        return found.lower()
    if kind in {"CARD", "PHONE"}:
        return "".join(character for character in found if character.isdigit())
    return found


def _plain(value: Any) -> Any:
    """Return the JSON form of an object that is none of JSON's own types."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    try:
        return msgspec.to_builtins(value, enc_hook=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)
