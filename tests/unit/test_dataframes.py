"""What rows MLflow's scoring formats hold, and what is said of a body that holds none."""

import copy
import json
import random

import pytest

from gateway.errors import InvalidRequest
from gateway.http.dataframes import SCORING_FIELDS, Row, rows_of

HI = {"role": "user", "content": "hi"}
NAN = float("nan")
OPTIONAL = {"agent": "b", "session_id": "s", "user": "u", "custom_inputs": {"k": 1}, "context": {"c": 2}}


def read(body: dict, max_rows: int = 4) -> list[Row]:
    return rows_of(body, max_rows=max_rows)


def split(columns: object, *data: object, **more: object) -> dict:
    return {"dataframe_split": {"columns": columns, "data": list(data), **more}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            split(["input", "user"], ["a", "ann"], ["b", None]),
            [({"input": "a", "user": "ann"}, "dataframe_split.data[0]"), ({"input": "b"}, "dataframe_split.data[1]")],
        ),
        (split(["q"], ["a"], index=[7]), [({"input": "a"}, "dataframe_split.data[0]")]),
        (
            {"dataframe_records": [{"input": "a", "agent": "math"}, {"q": "b"}]},
            [({"input": "a", "agent": "math"}, "dataframe_records[0]"), ({"input": "b"}, "dataframe_records[1]")],
        ),
        ({"instances": ["a", {"input": "b"}]}, [({"input": "a"}, "instances[0]"), ({"input": "b"}, "instances[1]")]),
        ({"inputs": ["a", {"input": "b"}]}, [({"input": "a"}, "inputs[0]"), ({"input": "b"}, "inputs[1]")]),
        (
            {"inputs": {"question": ["a", "b"], "context": [{"k": 1}, None]}},
            [({"input": "a", "context": {"k": 1}}, "inputs[0]"), ({"input": "b"}, "inputs[1]")],
        ),
        ({"inputs": {"input": ["a", "b"]}}, [({"input": "a"}, "inputs[0]"), ({"input": "b"}, "inputs[1]")]),
        ({"inputs": {"messages": [[HI], []]}}, [({"messages": [HI]}, "inputs[0]"), ({"messages": []}, "inputs[1]")]),
        ({"inputs": "a"}, [({"input": "a"}, "inputs")]),
        ({"inputs": {"question": "a"}}, [({"input": "a"}, "inputs")]),
        ({"inputs": {"input": "a", "user": "ann"}}, [({"input": "a", "user": "ann"}, "inputs")]),
        ({"inputs": {"input": [HI]}}, [({"input": [HI]}, "inputs")]),
        ({"inputs": {"messages": [HI, HI]}}, [({"messages": [HI, HI]}, "inputs")]),
        ({"inputs": "a", "stream": True}, [({"input": "a"}, "inputs")]),
    ],
)  # fmt: skip
def test_accepted_forms(body, expected):
    """Each of MLflow's formats gives its rows in their order, each named as the client sent it."""
    assert [(row.body, row.where) for row in read(body)] == expected


@pytest.mark.parametrize(
    ("row", "body", "is_text"),
    [
        ("a", {"input": "a"}, True),
        ("", {"input": ""}, True),
        ({"input": "a"}, {"input": "a"}, True),
        ({"question": "a"}, {"input": "a"}, True),
        ({"anything else": "a", "user": "ann"}, {"input": "a", "user": "ann"}, True),
        ({"input": [HI]}, {"input": [HI]}, False),
        ({"messages": [HI]}, {"messages": [HI]}, False),
        ({"input": 5}, {"input": 5}, False),
        ({"input": None, "messages": [HI]}, {"messages": [HI]}, False),
        ({"input": NAN, "messages": NAN, "query": "a"}, {"input": "a"}, True),
        ({"input": "a", "topic": None}, {"input": "a"}, True),
        ({"input": "a", **dict.fromkeys(OPTIONAL)}, {"input": "a"}, True),
        ({"input": "a", **dict.fromkeys(OPTIONAL, NAN)}, {"input": "a"}, True),
        ({"input": "a", **OPTIONAL}, {"input": "a", **OPTIONAL}, True),
        ({"messages": [HI], **OPTIONAL}, {"messages": [HI], **OPTIONAL}, False),
    ],
)  # fmt: skip
def test_row(row, body, is_text):
    """A row becomes a body without its nulls, and counts as text if its input is one."""
    assert read({"instances": [row]}) == [Row(body, "instances[0]", is_text)]


@pytest.mark.parametrize(
    ("params", "bodies"),
    [
        ({}, [{"input": "a"}, {"input": "b", "user": "bob"}]),
        (None, [{"input": "a"}, {"input": "b", "user": "bob"}]),
        ({"user": None, "agent": NAN}, [{"input": "a"}, {"input": "b", "user": "bob"}]),
        ({"user": "ann"}, [{"input": "a", "user": "ann"}, {"input": "b", "user": "bob"}]),
        (
            {"agent": "math", "session_id": "s", "custom_inputs": {}, "context": {}},
            [
                {"input": "a", "agent": "math", "session_id": "s", "custom_inputs": {}, "context": {}},
                {"input": "b", "user": "bob", "agent": "math", "session_id": "s", "custom_inputs": {}, "context": {}},
            ],
        ),
    ],
)
def test_params(params, bodies):
    """Params reach the rows that do not have their own."""
    rows = read({"instances": [{"input": "a", "user": None}, {"input": "b", "user": "bob"}], "params": params})
    assert [row.body for row in rows] == bodies


REFUSED = [
    ({}, None, ["exactly one of", *SCORING_FIELDS]),
    ({"input": "a"}, None, ["exactly one of"]),
    ({"inputs": "a", "instances": ["a"]}, None, ["instances and inputs"]),
    ({"inputs": "a", "dataframe_split": None}, None, ["dataframe_split and inputs"]),
    ({"inputs": "a", "input": "a"}, "input", ["'input'", "beside inputs"]),
    ({"inputs": "a", "user": "ann", "x": 1}, "user", ["'user', 'x'", "params"]),
    ({"inputs": "a", "params": "math"}, "params", ["must be an object"]),
    ({"inputs": "a", "params": {"agent": "math", "temperature": 0, "top_p": 1}}, "params", ["'temperature', 'top_p'"]),
    ({"inputs": "a", "params": {"input": "b"}}, "params", ["'input'"]),
    # the rows as a whole
    ({"instances": []}, "instances", ["no rows"]),
    ({"inputs": []}, "inputs", ["no rows"]),
    ({"inputs": {}}, "inputs", ["no rows"]),
    ({"inputs": {"input": []}}, "inputs", ["no rows"]),
    ({"dataframe_records": []}, "dataframe_records", ["no rows"]),
    (split(["input"]), "dataframe_split", ["no rows"]),
    ({"instances": ["a"] * 5}, "instances", ["too many", "may have 4"]),
    ({"inputs": {"q": ["a"] * 5}}, "inputs", ["too many", "may have 4"]),
    ({"dataframe_records": [{"q": "a"}] * 5}, "dataframe_records", ["too many", "may have 4"]),
    (split(["q"], *[["a"]] * 5), "dataframe_split", ["too many", "may have 4"]),
    ({"instances": "a"}, "instances", ["list of rows"]),
    ({"instances": {"input": ["a"]}}, "instances", ["list of rows"]),
    ({"dataframe_records": {"input": "a"}}, "dataframe_records", ["list of rows"]),
    ({"dataframe_records": None}, "dataframe_records", ["list of rows"]),
    ({"inputs": 5}, "inputs", ["a text, or an object"]),
    ({"inputs": None}, "inputs", ["a text, or an object"]),
    ({"inputs": {"a": ["x", "y"], "b": ["z"]}}, "inputs", ["'a' has 2, 'b' has 1"]),
    # dataframe_split
    ({"dataframe_split": [["a"]]}, "dataframe_split", ["must be an object"]),
    ({"dataframe_split": {"data": [["a"]]}}, "dataframe_split.columns", ["must be there"]),
    ({"dataframe_split": {"columns": ["q"]}}, "dataframe_split.data", ["must be there"]),
    ({"dataframe_split": {"columns": "q", "data": [["a"]]}}, "dataframe_split.columns", ["list"]),
    ({"dataframe_split": {"columns": ["q"], "data": "a"}}, "dataframe_split.data", ["list"]),
    (split(["q"], ["a"], rows=1), "dataframe_split", ["'rows'"]),
    (split([0], ["a"]), "dataframe_split.columns", ["texts"]),
    (split([["q"]], ["a"]), "dataframe_split.columns", ["texts"]),
    (split(["q", "user", "q"], ["a", "ann", "b"]), "dataframe_split.columns", ["repeats 'q':"]),
    (split(["q"], ["a"], ["b"], ["c", "d"]), "dataframe_split.data[2]", ["list of 1", "list of 2"]),
    (split(["q", "user"], ["a"]), "dataframe_split.data[0]", ["list of 2", "list of 1"]),
    (split(["q"], "a"), "dataframe_split.data[0]", ["list of 1", "no list"]),
    (split(["q"], ["a"], index=[0, 1]), "dataframe_split.index", ["list of 1 labels"]),
    (split(["q"], ["a"], index=0), "dataframe_split.index", ["list of 1 labels"]),
    (split(["q"], ["a"], index=None), "dataframe_split.index", ["leave it out"]),
    (split([], []), "dataframe_split.data[0]", ['"input" or "messages"']),
    (split(["q"], ["a"], [None]), "dataframe_split.data[1]", ['"input" or "messages"']),
    (split(["q", "topic"], ["a", "b"]), "dataframe_split.data[0]", ["'q', 'topic'"]),
    # one row
    ({"instances": ["a", 5]}, "instances[1]", ["a text, or an object"]),
    ({"instances": [True]}, "instances[0]", ["a text, or an object"]),
    ({"instances": [None]}, "instances[0]", ["a text, or an object"]),
    ({"instances": [["a"]]}, "instances[0]", ["a text, or an object"]),
    ({"dataframe_records": [0.5]}, "dataframe_records[0]", ["a text, or an object"]),
    ({"instances": [{}]}, "instances[0]", ['either "input" or "messages"']),
    ({"instances": [{"user": "ann"}]}, "instances[0]", ['either "input" or "messages"']),
    ({"instances": [{"input": "a", "messages": [HI]}]}, "instances[0]", ['either "input" or "messages"']),
    ({"instances": [{"input": "a", "question": "b"}]}, "instances[0]", ["unknown columns: 'question'"]),
    ({"instances": [{"messages": [HI], "x": 1, "y": 2}]}, "instances[0]", ["unknown columns: 'x', 'y'"]),
    ({"instances": [{"question": 5}]}, "instances[0]", ["unknown columns: 'question'", "holds a text"]),
    ({"instances": [{"question": "a", "topic": "b"}]}, "instances[0]", ["unknown columns: 'question', 'topic'"]),
    ({"inputs": [HI]}, "inputs[0]", ["unknown columns: 'role', 'content'"]),
    ({"inputs": {"question": ["a"], "user": "ann"}}, "inputs", ["unknown columns: 'question'"]),
    ({"inputs": {"a": ["x"], "b": ["y"]}}, "inputs[0]", ["unknown columns: 'a', 'b'"]),
    ({"inputs": {f"column {number}": "a" for number in range(1000)}}, "inputs", ["'column 0'", "..."]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "named"), REFUSED, ids=range(len(REFUSED)))
def test_refused(body, param, named):
    """A malformed body is refused with one line that names the field or row, and what it may be."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.param == param
    assert all(part in str(caught.value) for part in [*named, *([param.partition("[")[0]] if param else [])])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_as_many_rows_as_allowed():
    """A request may have exactly as many rows as the limit says."""
    assert len(read({"instances": ["a"] * 3}, max_rows=3)) == 3


def test_the_body_is_left_as_it_was():
    """Taking a body apart does not change it."""
    body = {"instances": [{"question": "a", "user": None}], "params": {"agent": "math", "user": None}}
    before = copy.deepcopy(body)
    read(body)
    assert body == before


SEEDS = [
    split(["input", "user"], ["a", "ann"], ["b", None], index=[0, 1]),
    {"dataframe_records": [{"messages": [HI]}, {"question": "a", "context": {"k": 1}}], "params": {"agent": "math"}},
    {"instances": ["a", {"input": [HI]}], "stream": False},
    {"inputs": {"question": ["a", "b"], "session_id": ["s", "t"]}, "params": {"custom_inputs": {"k": 1}}},
    {"inputs": {"messages": [HI]}},
]
NAMES = [*SCORING_FIELDS, "params", "columns", "data", "index", "input", "messages", "user", "question", ""]
JUNK = [None, True, 0, NAN, 2**70, "", "a\nb", "🙂", [], {}, [[]], [{}], [None], ["a", "b"], {"input": {}}, {"": ["a"]}]


def places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) below a value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(rng: random.Random) -> dict:
    """One of the seeds with some of its values removed, repeated, renamed or replaced."""
    body = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 4)):
        if not (found := places(body)):
            break
        container, key = rng.choice(found)
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]] * rng.randint(0, 6)
            case 2 if isinstance(container, dict):
                container[rng.choice(NAMES)] = container.pop(key)
            case _:
                container[key] = copy.deepcopy(rng.choice(JUNK))
    return json.loads(json.dumps(body))


def test_fuzz():
    """Any mutation of a body is either refused in words or gives rows of the promised form."""
    rng = random.Random(7)
    accepted = refused = 0
    for _ in range(2_000):
        body = mutated(rng)
        try:
            rows = read(body)
        except InvalidRequest as error:
            refused += 20 < len(str(error)) < 500 and "\n" not in str(error)
            continue
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} for {body!r}")
        accepted += 1
        assert 1 <= len(rows) <= 4, body
        for row in rows:
            assert row.body.keys() <= {"input", "messages", *OPTIONAL}, body
            assert ("input" in row.body) != ("messages" in row.body), body
            assert None not in row.body.values(), body
            assert row.is_text == isinstance(row.body.get("input"), str), body
            assert row.where.startswith(SCORING_FIELDS), body
    assert accepted + refused == 2_000
    assert min(accepted, refused) > 200
