"""Fills JSON schemas from a text, for the offline model: the arguments of a client's tool, and structured answers.

The values are valid against the schema; how sensible they are is luck. Left aside are `not`, `if`, counts of
properties, `uniqueItems` of anything but an enum, formats other than of dates, times, addresses and UUIDs, and a
`pattern` that no phrase or word of the text matches.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import re2

from gateway.runs.offline import wording

MAX_STEPS = 10_000
"""Parts of a schema that are looked at before it is given up as a trap; also the most that a string is padded to."""

Schema: TypeAlias = Mapping[str, Any]

_QUIET = re2.Options()
_QUIET.log_errors = False  # of a client's pattern, which is answered and not logged

# What a `format` looks like in a text, and what stands in when the text has nothing of the kind.
_FORMATS = {
    "date-time": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)", "2000-01-01T00:00:00Z"),
    "date": (r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])", "2000-01-01"),
    "time": (r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:Z|[+-]\d\d:\d\d)", "00:00:00Z"),
    "email": (r"[\w.+-]{1,64}@\w[\w-]{0,62}(?:\.\w[\w-]{0,62}){1,4}", "someone@example.com"),
    "uri": (r"https?://[\w.-]+(?::\d+)?(?:/[\w./%~+-]*)?", "https://example.com/"),
    "uuid": (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "00000000-0000-4000-8000-000000000000"),
}


def arguments_from(text: str, parameters: Schema) -> dict[str, Any]:
    """Fill the parameters of a tool from what a user asks for.

    Names, quotations and numbers are used once each, in their order; a string for which none is left is the whole
    text. Of the parameters that are not required, those are filled for which the text has something.

    Raises:
        ValueError: the schema is too big; RecursionError: no finite value meets it.
    """
    filled = _Request(parameters, text).value(parameters)
    return filled if isinstance(filled, dict) else {}


def answer_from(text: str, schema: Schema) -> Any:
    """Fill a schema from an answer in words, with all its properties.

    Strings are the text, numbers the last number in it, booleans whether it affirms. A schema that asks for no more
    than some object gives ``{"answer": text}``.

    Raises:
        ValueError: the schema is too big; RecursionError: no finite value meets it.
    """
    if schema == {"type": "object"}:
        return {"answer": text}
    return _Answer(schema, text).value(schema)


class _Filler(ABC):
    """Walks down a schema; what the text has for its leaves is up to the subclass."""

    def __init__(self, root: Schema, text: str):
        self._root = root
        self._text = text
        self._words = f" {' '.join(wording.words(text))} "
        self._steps = 0

    @abstractmethod
    def supply(self, kind: str, name: str) -> int:
        """Return how many values of that kind (`_kind`), for a property of that name, the text still has."""

    @abstractmethod
    def string(self) -> str:
        """Return the next string, or one that stands in."""

    @abstractmethod
    def number(self) -> float:
        """Return the next number, or one that stands in."""

    @abstractmethod
    def boolean(self) -> bool:
        """Return what the text says to a question of yes or no."""

    def value(self, schema: Any, name: str = "", above: frozenset[str] = frozenset()) -> Any:
        """Return a value for the schema.

        Args:
            schema: a part of the root schema.
            name: of the property that it describes; empty for the root.
            above: references that were followed on the way to it.
        """
        schema, followed = self._resolved(schema)
        above |= followed
        if options := _options(schema):
            return self.value(self._choice(options, name, above), name, above)
        match _kind(schema):
            case "choice":
                return schema["const"] if "const" in schema else self._member(schema["enum"])
            case "object":
                return self._object(schema, above)
            case "array":
                return self._array(schema, name, above)
            case "integer" | "number":
                return _within(self.number(), schema)
            case "boolean":
                return self.boolean()
            case "null":
                return None
            case "formatted":
                return self._formatted(schema) or _FORMATS[schema["format"]][1]
            case _:
                return self._string(schema)

    def found(self, schema: Any, name: str, above: frozenset[str]) -> bool:
        """Return whether the text has something for the schema; for one that holds itself, it has not."""
        schema, followed = self._resolved(schema)
        if followed & above:
            return False
        above |= followed
        if options := _options(schema):
            return any(self.found(option, name, above) for option in options)
        kind = _kind(schema)
        if self.supply(kind, name) or any(map(self._occurs, schema.get("enum", ()))):
            return True
        if kind == "formatted":
            return self._formatted(schema) is not None
        parts = {**schema.get("properties", {}), **({name: schema["items"]} if "items" in schema else {})}
        return any(self.found(part, inner, above) for inner, part in parts.items())

    def _object(self, schema: Schema, above: frozenset[str]) -> dict[str, Any]:
        required = schema.get("required", ())
        # What is required comes first, so that it gets the best of what the text has.
        properties = {**{name: {} for name in required}, **schema.get("properties", {})}
        return {
            name: self.value(part, name, above)
            for name, part in properties.items()
            if name in required or self.found(part, name, above)
        }

    def _array(self, schema: Schema, name: str, above: frozenset[str]) -> list[Any]:
        if "prefixItems" in schema:
            return [self.value(part, name, above) for part in schema["prefixItems"]]
        items = schema.get("items", {})
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        inner, _ = self._resolved(items)
        if "enum" in inner:
            members = sorted(inner["enum"], key=self._occurs, reverse=True)
            return members[: max(sum(map(self._occurs, members)), least)][:most]
        supply = max(self.supply(_kind(inner), name), 1) if self.found(items, name, above) else 0
        return [self.value(items, name, above) for _ in range(max(supply, least))][:most]

    def _string(self, schema: Schema) -> str:
        text = self.string()
        if "pattern" in schema:
            text = _matching(schema["pattern"], [text, *wording.phrases(self._text), *self._text.split()])
        return text[: schema.get("maxLength")].ljust(min(schema.get("minLength", 0), MAX_STEPS), ".")

    def _formatted(self, schema: Schema) -> str | None:
        match = re.search(_FORMATS[schema["format"]][0], self._text, re.ASCII)
        return match[0] if match else None

    def _member(self, members: Sequence[Any]) -> Any:
        otherwise = None if None in members else members[0]
        return next(filter(self._occurs, members), otherwise)

    def _occurs(self, member: Any) -> bool:
        wanted = wording.words(str(member))
        return f" {' '.join(wanted)} " in self._words if wanted else str(member) in self._text

    def _choice(self, options: Sequence[Schema], name: str, above: frozenset[str]) -> Schema:
        empty = next((option for option in options if _kind(self._resolved(option)[0]) == "null"), options[0])
        return next((option for option in options if self.found(option, name, above)), empty)

    def _resolved(self, schema: Any) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the schema with its references and `allOf` merged in, and the references that were followed."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError("the schema is too big for the offline model")
        if not isinstance(schema, Mapping):  # `true` as a schema: anything will do
            return {}, frozenset()
        followed = frozenset({schema["$ref"]} if "$ref" in schema else ())
        merged: dict[str, Any] = {}
        for part in [*map(self._at, followed), *schema.get("allOf", ())]:
            resolved, deeper = self._resolved(part)
            merged, followed = _merged(merged, resolved), followed | deeper
        return _merged(merged, {key: schema[key] for key in schema if key not in {"$ref", "allOf"}}), followed

    def _at(self, reference: str) -> Any:
        """Return what a reference such as `#/$defs/City` leads to; anything will do where it leads nowhere."""
        part: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            part = part.get(key) if isinstance(part, Mapping) else None
        return part


class _Request(_Filler):
    """Takes what a user asks for apart: each piece of it is used once."""

    def __init__(self, root: Schema, text: str):
        super().__init__(root, text)
        self._phrases = wording.phrases(text)
        self._numbers = wording.numbers(text)

    def supply(self, kind: str, name: str) -> int:
        match kind:
            case "string":
                return len(self._phrases)
            case "integer" | "number":
                return len(self._numbers)
            case "boolean":
                return int(not wording.topics(name).isdisjoint(wording.topics(self._text)))
        return 0

    def string(self) -> str:
        return self._phrases.pop(0) if self._phrases else self._text

    def number(self) -> float:
        return self._numbers.pop(0) if self._numbers else 0

    def boolean(self) -> bool:
        return not wording.denies(self._text)


class _Answer(_Filler):
    """Repeats an answer wherever a value is wanted."""

    def supply(self, kind: str, name: str) -> int:  # noqa: ARG002 - every property is wanted
        return int(kind != "null")

    def string(self) -> str:
        return self._text

    def number(self) -> float:
        return next(reversed(wording.numbers(self._text)), 0)

    def boolean(self) -> bool:
        return wording.affirms(self._text)


def _kind(schema: Schema) -> str:
    """Return the JSON type, or what says more than that: ``choice`` or ``formatted``.

    A schema without a type is known by its keywords; where it has none either, a string will do.
    """
    if "const" in schema or "enum" in schema:
        return "choice"
    if schema.get("format") in _FORMATS and schema.get("type", "string") == "string":
        return "formatted"
    if "type" in schema:
        return str(schema["type"])
    if schema.get("properties") or schema.get("required"):
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "string"


def _options(schema: Schema) -> list[Schema]:
    """Return the schemas of which one must be met; empty when there is no choice."""
    if _kind(schema) == "choice":
        return []
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    rest = {key: value for key, value in schema.items() if key not in {"anyOf", "oneOf"}}
    alternatives = schema.get("anyOf") or schema.get("oneOf") or ()
    return [{"allOf": [rest, option]} if rest else option for option in alternatives]


def _merged(base: Schema, more: Schema) -> dict[str, Any]:
    """Return a schema that asks for both."""
    both = {**base, **more}
    if "properties" in base:
        both["properties"] = {**base["properties"], **more.get("properties", {})}
    if "required" in base:
        both["required"] = [*base["required"], *more.get("required", ())]
    return both


def _within(number: float, schema: Schema) -> float:
    """Return the number, or one near it that the schema allows."""
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    over, under = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    stepwise = schema["type"] == "integer" or "multipleOf" in schema
    step = schema.get("multipleOf", 1) if stepwise else min(1, (min(most, under) - max(least, over)) / 2)

    def moved_inside(value: float, low: float, high: float) -> float:
        return low if value < least or value <= over else high if value > most or value >= under else value

    number = moved_inside(number, max(least, over + step), min(most, under - step))
    if stepwise:
        number = round(number / step) * step
        number = moved_inside(number, number + step, number - step)
    return int(number) if float(number).is_integer() else number


def _matching(pattern: str, candidates: Sequence[str]) -> str:
    """Return the first candidate that matches, else the first of all."""
    try:
        # Not `re`: the pattern is a client's, and must not hang us.
        expression = re2.compile(pattern, _QUIET)
    except re2.error:
        return candidates[0]
    return next((candidate for candidate in candidates if expression.search(candidate)), candidates[0])
