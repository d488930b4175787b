"""Taking out what is personal or secret, before anything leaves the process or touches a disk.

What is found (`gateway.tracing.redaction.patterns`) becomes ``<KIND:xxxx>``, where ``xxxx`` is a keyed hash of session
and value: the same value reads the same within a session, in every process, so that a judge can tell that the agent
remembered it; it is neither reversible nor linkable across sessions. Without a session, as in logs, it is ``<KIND>``
alone.

It fails closed: what cannot be redacted raises `Unredactable`, and there is no partial result. The caller withholds
the payload.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import re2

from gateway.crypto import keyed_hash
from gateway.errors import ConfigurationError, GatewayError
from gateway.tracing.redaction.canonical import canonical, simplify
from gateway.tracing.redaction.checks import Span as Place
from gateway.tracing.redaction.patterns import KINDS, PATTERNS, Pattern
from gateway.tracing.redaction.walk import Memory, Walk
from gateway.tracing.spans import Trace

T = TypeVar("T")

PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]{0,20}:[a-z2-7]{4}>")
"""A placeholder of a session."""
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_KIND = re.compile(r"[A-Z][A-Z0-9_]{0,20}")
_LONGEST_PLACEHOLDER_BYTES = 28
_PUNCTUATION = b" .,;:!?\"'()[]{}\\-_/"
_SET_BYTES = 32 << 20  # RE2's memory for the states of all expressions together; fuller, it begins anew
_CONTROL = b"a@example.com"


class Unredactable(GatewayError):
    """Something could not be redacted, and so must not be stored, sent or shown."""


class _Compiled(NamedTuple):
    pattern: Pattern
    expression: Any
    group: int


class Redactor:
    """Redacts text and JSON-like values with one deployment's key. May be shared by threads."""

    def __init__(self, key: bytes, patterns: Mapping[str, str] | None = None):
        """Take the key of the hashes, and the setting ``redact_patterns``: RE2 expressions by kind.

        Raises:
            ConfigurationError: a kind's name or expression is not valid, or the expression matches the empty text.
        """
        self._key = key
        # BLAKE2's own keyed mode (RFC 7693): a fifth of what an HMAC costs, and there may be one a value.
        self._hash_key = hashlib.sha256(b"placeholders" + key).digest()
        self._own = [_compile_own(kind, expression) for kind, expression in (patterns or {}).items()]
        options = _options()
        self._compiled = [_compiled(pattern, re2.compile(_bytes(pattern), options)) for pattern in PATTERNS]
        # One pass that says which patterns can match: most strings hold nothing, and go through it alone.
        options.max_mem = _SET_BYTES
        self._any = re2.Set.SearchSet(options)
        for pattern in PATTERNS:
            self._any.Add(_bytes(pattern))
        self._any.Compile()
        if not self._any.Match(_CONTROL):
            raise RuntimeError("RE2 has too little memory for the patterns, and would find nothing")
        kinds = "|".join(sorted({*KINDS, *(patterns or {})}, key=len, reverse=True))
        self._redacted = re.compile(rf"<(?:[A-Z][A-Z0-9_]{{0,20}}:[a-z2-7]{{4}}|{kinds})>".encode())
        self._memory = Memory()

    def text(self, value: str, scope: str | None = None) -> str:
        """Return ``value`` with everything personal or secret replaced; the same object if there is nothing.

        Args:
            value: any text.
            scope: what placeholders are comparable within; the session id for traces. ``None``: they carry no hash,
                and can be compared with nothing.

        Raises:
            Unredactable: it could not be done.
        """
        return _closed(self._text, value, scope)

    def value(self, value: Any, scope: str | None = None) -> Any:
        """Return a copy of a JSON-like value with every string in it redacted, keys of mappings included.

        Structs, models, exceptions and other objects are taken as the JSON or text they would be stored as. Numbers
        stay, unless they are a payment card or stand under a name that says what they are.

        Raises:
            Unredactable: it is nested too deep or in itself, or an object in it cannot be taken as JSON or text.
        """
        return _closed(self._walk(scope).value, value)

    def trace(self, trace: Trace) -> Trace:
        """Redact everything in the trace but ids, kinds and times, in place, and return it.

        A trace without a session is a scope of its own.

        Raises:
            Unredactable: as `value`. The trace is then not to be used.
        """
        _closed(self._walk(trace.session_id or trace.trace_id).struct, trace)
        return trace

    def identifier(self, value: str, kind: str) -> str:
        """Return an id that may be stored: itself, or a hash keyed for the whole deployment if it is personal.

        Unlike a placeholder it is the same in every session, so that grouping by user works.
        """
        return value if self.text(value) == value else f"{kind}-{keyed_hash(self._key, kind, value).hex()[:16]}"

    def placeholder(self, kind: str, canonical_value: str, scope: str | None) -> str:
        """Return what a value becomes, given the form of it that all ways of writing it have in common."""
        if scope is None:
            return f"<{kind}>"
        # 20 bits: enough to tell the few values of one session apart, too few to find a value by its hash.
        message = len(scope).to_bytes(8, "big") + scope.encode("utf-8", "replace") + canonical_value.encode()
        bits = int.from_bytes(hashlib.blake2b(message, key=self._hash_key, digest_size=3).digest(), "big")
        return f"<{kind}:{''.join(_BASE32[bits >> shift & 31] for shift in (0, 5, 10, 15))}>"

    def is_placeholder(self, text: str) -> bool:
        """Whether the text is one placeholder, and nothing else."""
        return self._redacted.fullmatch(text.encode("utf-8", "replace")) is not None

    def _walk(self, scope: str | None) -> Walk:
        return Walk(
            lambda text, is_id: self._text(text, scope, is_id=is_id),
            lambda kind, text: text if self.is_placeholder(text) else self._hashed(kind, text, scope),
            self._memory,
        )

    def _text(self, value: str, scope: str | None, *, is_id: bool = False) -> str:
        if not isinstance(value, str):
            raise TypeError(f"a text was expected, not {type(value).__name__}")
        try:
            data = value.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which nothing that comes after could write down
            value = value.encode("utf-8", "replace").decode()
            data = value.encode()
        if "\0" in value:  # Postgres, and so MLflow, has no text with it
            value = value.replace("\0", "\ufffd")
            data = value.encode()
        searched = simplify(data) if b"\\u" in data else data
        redacted = searched
        for compiled in self._own:
            redacted = self._replace(compiled, redacted, scope)
        for index in sorted(self._any.Match(searched) or ()):
            compiled = self._compiled[index]
            if not (is_id and compiled.pattern.weak):
                redacted = self._replace(compiled, redacted, scope)
        return value if redacted is searched else redacted.decode()

    def _replace(self, compiled: _Compiled, data: bytes, scope: str | None) -> bytes:
        pieces: list[bytes] = []
        done = 0
        for start, end in self._places(compiled, data):
            kind = compiled.pattern.kind
            pieces += (data[done:start], self._hashed(kind, data[start:end].decode("utf-8", "replace"), scope).encode())
            done = end
        return b"".join([*pieces, data[done:]]) if done else data

    def _places(self, compiled: _Compiled, data: bytes) -> Iterator[Place]:
        """Yield where values are, from left to right, what is redacted already left out."""
        find, done = compiled.pattern.find, 0
        was_redacted = b"<" in data and self._redacted.search(data) is not None
        for match in compiled.expression.finditer(data):
            if match.end() <= done:
                continue  # the value before it reached further than its expression
            span = match.span(compiled.group)
            span = match.span() if span[0] < 0 else span
            if was_redacted and self._is_redacted(data, span[0], span[0] + 1):
                continue  # a placeholder's own kind reads like a field's name
            for start, end in find(data, *span):
                if done <= start < end and not (was_redacted and self._is_redacted(data, start, end)):
                    yield start, end
                    done = end

    def _is_redacted(self, data: bytes, start: int, end: int) -> bool:
        """Whether the span is within a placeholder or reaches into one, or holds nothing else."""
        around = max(start - _LONGEST_PLACEHOLDER_BYTES, 0)
        rest, known = [], start
        for place in self._redacted.finditer(data, around, min(end + _LONGEST_PLACEHOLDER_BYTES, len(data))):
            if place.end() <= start or place.start() >= end:
                continue
            if place.start() < start or place.end() > end:
                return True
            rest.append(data[known : place.start()])
            known = place.end()
        return known > start and not b"".join([*rest, data[known:end]]).strip(_PUNCTUATION)

    def _hashed(self, kind: str, found: str, scope: str | None) -> str:
        return self.placeholder(kind, "" if scope is None else canonical(kind, found), scope)


def _closed(work: Callable[..., T], *args: Any) -> T:
    """Return what ``work`` returns; whatever it fails with becomes `Unredactable`, which says nothing of the value."""
    try:
        return work(*args)
    except Exception as error:  # noqa: BLE001 - an object's own __str__ may raise anything
        kind = type(error).__name__
    raise Unredactable(f"A value could not be redacted ({kind}), and is withheld.")


def _options() -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    return options


def _bytes(pattern: Pattern) -> bytes:
    return pattern.expression.encode("ascii")


def _compiled(pattern: Pattern, expression: Any) -> _Compiled:
    groups = {name.decode() if isinstance(name, bytes) else name: at for name, at in expression.groupindex.items()}
    return _Compiled(pattern, expression, groups.get("value", 0))


def _compile_own(kind: str, expression: str) -> _Compiled:
    """Compile a pattern of the settings; raise `ConfigurationError` if it is not fit for use."""
    setting = f"GATEWAY_REDACT_PATTERNS: {kind}"
    if not _KIND.fullmatch(kind):
        raise ConfigurationError(
            f"{setting}: a kind's name is a capital letter and up to 20 capitals, digits and underscores."
        )
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(expression, options)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        said = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise ConfigurationError(f"{setting}: RE2 does not take the expression {expression!r}: {said}") from None
    for text in ("", "a", " 1 a. "):
        if any(match.start() == match.end() for match in compiled.finditer(text)):
            raise ConfigurationError(f"{setting}: the expression {expression!r} matches the empty text.")
    return _compiled(Pattern(kind, expression), compiled)
