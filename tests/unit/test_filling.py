"""Filling JSON schemas from texts: the arguments of a client's tool, and structured answers."""

from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pytest
from pydantic import BaseModel, Field, PositiveInt

from gateway.runs.offline.filling import answer_from, arguments_from

STRING = {"type": "string"}
NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}
BOOLEAN = {"type": "boolean"}
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
ANSWER = "Yes: order A-1007 (stoneware bowls, 57.20 USD) was placed on 2026-03-15 and is in_progress."


class Status(StrEnum):
    IN_PROGRESS = "in progress"
    DONE = "done"


class Place(BaseModel):
    city: str
    country: str | None


class Node(BaseModel):
    label: str
    children: list["Node"]
    following: "Node | None"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Everything(BaseModel):
    """One property for each kind of schema that a client is likely to send."""

    text: str
    short: str = Field(max_length=5)
    long: str = Field(min_length=200)
    currency: str = Field(pattern="^[A-Z]{3}$")
    amount: float
    count: PositiveInt
    stars: int = Field(ge=1, le=5)
    share: float = Field(gt=0, lt=1)
    dozens: int = Field(multiple_of=12, gt=60)
    confirmed: bool
    status: Status
    statuses: set[Status]
    maybe: Status | None = None
    version: Literal[2]
    day: date
    moment: datetime
    key: UUID
    lines: list[str]
    pair: tuple[int, str]
    place: Place
    places: list[Place]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    tree: Node
    either: int | str
    extra: dict[str, int]


def filled(text: str, *required: str, **properties: Any) -> dict[str, Any]:
    """Fill properties of which the named ones are required, and hold the result against the schema."""
    schema = {"type": "object", "properties": properties, "required": list(required)}
    arguments = arguments_from(text, schema)
    jsonschema.validate(arguments, schema)
    return arguments


@pytest.mark.parametrize(
    ("text", "city"),
    [
        ("What is the weather in San Francisco?", "San Francisco"),
        ("Berlin is nice. What's the weather of São Paulo?", "São Paulo"),
        ("I wonder how warm I'd find Oslo's harbour", "Oslo"),
        ('weather for the place called "the end of the world", please', "the end of the world"),
        ("what's the weather in paris?", "paris"),
        ("weather for paris", "paris"),
        ("the weather of paris, please", "paris"),
        ("Paris weather", "Paris weather"),
        ("", ""),
    ],
)
def test_a_string_is_the_best_guess(text: str, city: str) -> None:
    """A string is a capitalised phrase, else a quotation, else what follows a preposition, else the whole text."""
    assert filled(text, "city", city=STRING) == {"city": city}


def test_every_piece_of_the_text_is_used_once() -> None:
    """Names, quotations and numbers go to the properties in the order of the text."""
    text = 'Book 2 seats from Paris to New York for 1,250.50 dollars with the note "by the window"'
    properties = {"origin": STRING, "destination": STRING, "note": STRING, "seats": INTEGER, "price": NUMBER}

    assert filled(text, *properties, **properties) == {
        "origin": "Paris",
        "destination": "New York",
        "note": "by the window",
        "seats": 2,
        "price": 1250.5,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Turn the light on", True), ("Don't turn the light on", False), ("Don\u2019t turn on the light", False)],
)
def test_a_boolean_is_true_unless_negated(text: str, expected: bool) -> None:
    """A boolean is true, unless the text says no."""
    assert filled(text, "on", on=BOOLEAN) == {"on": expected}


@pytest.mark.parametrize(
    ("text", "unit"), [("Oslo in Fahrenheit", "fahrenheit"), ("Oslo", "celsius"), ("fahrenheits!", "fahrenheit")]
)
def test_an_enum_is_the_member_that_occurs(text: str, unit: str) -> None:
    """An enum is the member that the text has, whatever its case and number, else the first."""
    assert filled(text, "unit", unit=UNIT) == {"unit": unit}


def test_optional_properties_need_something_in_the_text() -> None:
    """An optional property is left out unless the text has something for it beyond what the required ones take."""
    address = {**STRING, "format": "email"}
    optional = {"unit": UNIT, "days": INTEGER, "detailed": BOOLEAN, "note": STRING, "email": address}

    assert filled("Weather in Oslo", "city", city=STRING, **optional) == {"city": "Oslo"}
    text = "A detailed forecast of 3 days in celsius for Oslo to Ann at ann@example.com"
    assert filled(text, "city", city=STRING, **optional) == {
        "city": "Oslo",
        "unit": "celsius",
        "days": 3,
        "detailed": True,
        "note": "Ann",
        "email": "ann@example.com",
    }


@pytest.mark.parametrize(
    "nullable",
    [
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "null"}, STRING], "description": "optional"},
        {"type": ["string", "null"], "enum": ["celsius", None]},
    ],
)
def test_null_where_the_text_has_nothing(nullable: dict[str, Any]) -> None:
    """A required property that may be null, as strict schemas have them, is null without anything in the text."""
    assert filled("Weather in Oslo", "city", "other", city=STRING, other=nullable) == {"city": "Oslo", "other": None}


def test_arrays_take_all_there_is() -> None:
    """An array has all the values that the text has for its items, within the bounds of its length."""
    arrays = {
        "values": {"type": "array", "items": NUMBER},
        "names": {"type": "array", "items": STRING, "maxItems": 1},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "uniqueItems": True},
        "nothing": {"type": "array", "items": BOOLEAN},
    }

    assert filled("Paint 3, 4.5 and -2 blue for Ann and Bob", *arrays, **arrays) == {
        "values": [3, 4.5, -2],
        "names": ["Ann"],
        "colours": ["blue", "red", "green"],
        "nothing": [],
    }


@pytest.mark.parametrize("parameters", [{}, {"type": "object"}, {"type": "object", "properties": {}}])
def test_a_tool_without_parameters(parameters: dict[str, Any]) -> None:
    """A tool that takes nothing is called with nothing."""
    assert arguments_from("What time is it in Oslo at 3?", parameters) == {}


@pytest.mark.parametrize("fill", [arguments_from, answer_from])
def test_every_kind_of_schema(fill: Any) -> None:
    """What is filled in is valid, by the schema and by the model class that it came from."""
    schema = Everything.model_json_schema()

    value = fill(ANSWER, schema)

    jsonschema.validate(value, schema)
    Everything.model_validate(value)


def test_an_answer_is_repeated_everywhere() -> None:
    """Of an answer, strings are the text, numbers its last number and booleans its consent; nothing is left out."""
    value = answer_from(ANSWER, Everything.model_json_schema())

    assert value.keys() == Everything.model_fields.keys()
    assert (value["text"], value["lines"], value["either"]) == (ANSWER, [ANSWER], 57)
    assert (value["currency"], value["amount"], value["count"], value["confirmed"]) == ("USD", 57.2, 57, True)
    assert (value["status"], value["statuses"], value["maybe"]) == ("in progress", ["in progress"], "in progress")
    assert (value["day"], value["place"]) == ("2026-03-15", {"city": ANSWER, "country": ANSWER})


def test_numbers_stay_within_their_bounds() -> None:
    """A number that the schema does not allow is replaced by one near it."""
    value = answer_from("57.2", Everything.model_json_schema())

    assert (value["stars"], value["share"], value["dozens"]) == (5, 0.5, 72)


@pytest.mark.parametrize(
    ("text", "expected"), [("Yes.", True), ("No.", False), ("It is not right", False), ("", False)]
)
def test_an_answer_affirms_or_not(text: str, expected: bool) -> None:
    """A boolean of an answer is true only if the answer says yes."""
    assert answer_from(text, BOOLEAN) is expected


def test_a_schema_that_holds_itself_ends() -> None:
    """A tree is filled with its root alone."""
    assert answer_from("hi", Node.model_json_schema()) == {"label": "hi", "children": [], "following": None}


def test_any_object_will_do() -> None:
    """Where no more is asked for than some object, the answer stands in it."""
    assert answer_from("hi", {"type": "object"}) == {"answer": "hi"}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "object", "properties": {"again": {"$ref": "#"}}, "required": ["again"]},
        {"type": "array", "minItems": 10**9},
        {
            "$ref": "#/$defs/0",
            "$defs": {
                str(level): {
                    "properties": {key: {"$ref": f"#/$defs/{level + 1}"} for key in "ab"},
                    "required": ["a", "b"],
                }
                for level in range(40)
            },
        },
    ],
)
@pytest.mark.parametrize("fill", [arguments_from, answer_from])
def test_traps_are_given_up(fill: Any, schema: dict[str, Any]) -> None:
    """A schema that no value meets, or only an enormous one, is refused before long."""
    with pytest.raises((ValueError, RecursionError)):
        fill("hi", schema)


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(?=x)", "["])
def test_patterns_cannot_hang_it(pattern: str) -> None:
    """A pattern that is a trap, or that cannot be used, costs nothing: the text stands as it is."""
    text = "a" * 50_000 + "!"

    assert answer_from(text, {"type": "string", "pattern": pattern}) == text
