"""Names of people, places and groups, found by a language model that was trained for it: optional, and off by default.

Patterns cannot find names. This can, at a cost that the web process could not bear, so it runs in the evaluator, before
anything reaches MLflow. It needs the extra ``ner`` and a spaCy model.

It fails closed: what it cannot work on raises `Unredactable`, and the caller withholds the trace.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from gateway.errors import ConfigurationError
from gateway.tracing.redaction.redactor import PLACEHOLDER, Redactor, Unredactable
from gateway.tracing.redaction.walk import EXEMPT
from gateway.tracing.spans import Span, Trace

if TYPE_CHECKING:
    from gateway.evaluation.scoring import Score

_KINDS = {"PERSON": "PERSON", "LOCATION": "LOCATION", "NRP": "GROUP"}
"""Presidio's entities and our placeholders. ``NRP``: a nationality, a religious or a political group. Organizations
stay: they are no one's personal data, and judges need them."""
_LANGUAGE = "en"  # only the name under which Presidio keeps the one model, whatever its language
_CHUNK_CHARACTERS = 20_000  # spaCy takes about 1 GB for 100,000
_OVERLAP_CHARACTERS = 200  # longer than any name: what one cut divides is whole in the next chunk
_MEMORY_TEXTS = 2_000
_NO_PROSE = frozenset({"role", "type", "tool_call_id", "call_id", "id", "finish_reason"})
"""Fields of messages with ids and fixed words."""
_NO_PROSE_ATTRIBUTES = frozenset(
    {"mlflow.chat.tools", "mlflow.llm.model", "mlflow.llm.provider", "mlflow.chat.tokenUsage"}
)
"""What the agent's developer wrote; scorers compare tool calls with it word for word."""


class EntitySettings(Protocol):
    """The settings that this reads."""

    @property
    def ner_model(self) -> str:
        """Package or folder of a spaCy model."""


class _Place(NamedTuple):
    start: int
    end: int
    kind: str


class EntityRedactor:
    """Replaces named entities by placeholders of the session. Not to be shared by threads."""

    def __init__(self, settings: EntitySettings, redactor: Redactor):
        """Load the model, which takes seconds and up to a gigabyte of memory.

        Raises:
            ConfigurationError: the extra or the model is not installed.
        """
        self._redactor = redactor
        self._analyzer = _load(settings.ner_model)
        self._places = lru_cache(_MEMORY_TEXTS)(self._analyze)

    def trace(self, trace: Trace) -> Trace:
        """Replace names in all texts of the trace but span names and keys of JSON, in place, and return it.

        Raises:
            Unredactable: it could not be done. The trace is then not to be used.
        """
        scope = trace.session_id or trace.trace_id
        _closed(lambda: self._struct(trace, scope))
        return trace

    def value(self, value: Any, scope: str | None = None) -> Any:
        """Return a copy of a JSON-like value with names replaced in its texts; raise `Unredactable` if that fails."""
        return _closed(lambda: self._value(value, scope))

    def _struct(self, struct: msgspec.Struct, scope: str) -> None:
        kept = EXEMPT.get(type(struct), frozenset()) | ({"name"} if isinstance(struct, Span) else frozenset())
        fields = [name for name in struct.__struct_fields__ if name not in kept]
        redacted = [self._field(name, getattr(struct, name), scope) for name in fields]
        for name, value in zip(fields, redacted, strict=True):
            setattr(struct, name, value)

    def _field(self, name: str, value: Any, scope: str) -> Any:
        if isinstance(value, msgspec.Struct):
            self._struct(value, scope)
            return value
        if name == "attributes" and isinstance(value, dict):
            return {k: v if k in _NO_PROSE_ATTRIBUTES else self._value(v, scope) for k, v in value.items()}
        if isinstance(value, list):
            return [self._field(name, each, scope) for each in value]
        return self._value(value, scope)

    def _value(self, value: Any, scope: str | None) -> Any:
        if isinstance(value, str):
            return self._text(value, scope)
        if isinstance(value, dict):
            return {key: item if key in _NO_PROSE else self._value(item, scope) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item, scope) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TypeError(f"a JSON-like value was expected, not {type(value).__name__}")

    def _text(self, text: str, scope: str | None) -> str:
        """Redact prose; of JSON in a string, the values alone."""
        if text.lstrip()[:1] in {"{", "["}:
            try:
                parsed = json.loads(text)
            except ValueError:
                pass
            else:
                redacted = self._value(parsed, scope)
                return text if redacted == parsed else json.dumps(redacted, ensure_ascii=False)
        pieces, done = [], 0
        for start, end, kind in self._places(text):
            name = " ".join(text[start:end].split()).casefold()
            pieces += [text[done:start], self._redactor.placeholder(kind, name, scope)]
            done = end
        return "".join([*pieces, text[done:]])

    def _analyze(self, text: str) -> tuple[_Place, ...]:
        """Return where names are, from left to right, none within another or within a placeholder."""
        found = [place for start, end in _chunks(text) for place in self._in_chunk(text, start, end)]
        placeholders = [match.span() for match in PLACEHOLDER.finditer(text)]
        places, done, next_placeholder = [], 0, 0
        for place in sorted(found, key=lambda each: (each.start, -each.end)):
            while next_placeholder < len(placeholders) and placeholders[next_placeholder][1] <= place.start:
                next_placeholder += 1
            in_the_way = next_placeholder < len(placeholders) and placeholders[next_placeholder][0] < place.end
            if place.start >= done and not in_the_way:
                places.append(place)
                done = place.end
        return tuple(places)

    def _in_chunk(self, text: str, start: int, end: int) -> Iterator[_Place]:
        if not any(char.isalpha() for char in text[start:end]):
            return
        for found in self._analyzer.analyze(text[start:end], language=_LANGUAGE, entities=list(_KINDS)):
            yield _Place(start + found.start, start + found.end, _KINDS[found.entity_type])


def redact_score(score: "Score", scope: str, *redact: Callable[[Any, str], Any]) -> "Score":
    """Return a score fit to be stored and shown: name, rationale, error, value and metadata redacted.

    Args:
        score: as the scorer gave it.
        scope: the session that was scored, or the trace if it has none: placeholders are those of its traces.
        redact: `Redactor.value`, and `EntityRedactor.value` behind it where names are to go as well.

    Raises:
        Unredactable: it could not be done.
    """
    texts = {"name": score.name, "value": score.value, "rationale": score.rationale, "error": score.error}
    details: Any = score.details
    for each in redact:
        texts = {name: each(text, scope) for name, text in texts.items()}
        details = each(details, scope)
    return dataclasses.replace(score, **texts, details=details)


def _chunks(text: str) -> Iterator[tuple[int, int]]:
    """Yield chunks that overlap, cut at blanks where there are any."""
    start = 0
    while start < len(text):
        end = min(start + _CHUNK_CHARACTERS, len(text))
        if end < len(text):
            blank = text.rfind(" ", start + _CHUNK_CHARACTERS // 2, end)
            end = blank if blank > 0 else end
        yield start, end
        if end == len(text):
            return
        blank = text.find(" ", end - _OVERLAP_CHARACTERS, end)
        start = blank if blank > 0 else end - _OVERLAP_CHARACTERS


def _load(model: str) -> Any:
    """Return Presidio's analyzer with the model and nothing else: patterns are ours, and faster."""
    try:
        presidio = importlib.import_module("presidio_analyzer")
        engines = importlib.import_module("presidio_analyzer.nlp_engine")
        spacy = importlib.import_module("spacy")
    except ImportError:
        raise ConfigurationError(
            "GATEWAY_NER needs Presidio and spaCy; install them with `pip install 'agent-gateway[ner]'`."
        ) from None
    if not spacy.util.is_package(model) and not Path(model, "config.cfg").is_file():  # Presidio would download one
        raise ConfigurationError(
            f"GATEWAY_NER_MODEL is {model}, and there is no such spaCy model, as a package or as a folder; install it "
            f"with `python -m spacy download {Path(model).name}`, or name a folder that a model was saved to."
        )
    engine = engines.SpacyNlpEngine(models=[{"lang_code": _LANGUAGE, "model_name": model}])
    engine.load()
    recognizer = presidio.predefined_recognizers.SpacyRecognizer(
        supported_language=_LANGUAGE, supported_entities=list(_KINDS)
    )
    registry = presidio.RecognizerRegistry(recognizers=[recognizer], supported_languages=[_LANGUAGE])
    return presidio.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[_LANGUAGE])


def _closed(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - fails closed, whatever it was
        kind = type(error).__name__
    raise Unredactable(f"Names could not be looked for ({kind}); the text is withheld.")
