"""MLflow's scoring formats for ``POST /invocations``: taken apart into rows, each a request body by itself.

The formats are those of ``mlflow.pyfunc.scoring_server`` (MLflow 3); ``instances`` and ``inputs`` stem from the row and
the column format of TensorFlow Serving's REST API::

    {"dataframe_split": {"columns": ["input", "user"], "data": [["Hi", "ann"], ["Hello", null]]}}
    {"dataframe_records": [{"input": "Hi", "user": "ann"}, {"input": "Hello"}]}
    {"instances": ["Hi", {"messages": [{"role": "user", "content": "Hello"}]}]}
    {"inputs": {"question": ["Hi", "Hello"]}, "params": {"agent": "math"}}

There is no model signature here that could say which columns are meant, so the names of the columns do.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from gateway.errors import InvalidRequest

SCORING_FIELDS = ("dataframe_split", "dataframe_records", "instances", "inputs")
"""Fields of a body, one of which holds the rows."""

_CONVERSATION = ("input", "messages")
_OPTIONAL = ("agent", "session_id", "user", "custom_inputs", "context")
_COLUMNS = (*_CONVERSATION, *_OPTIONAL)


class Row(NamedTuple):
    """One row of a scoring request; its values are not checked yet."""

    body: dict[str, Any]
    """A request body by itself: either ``input`` or ``messages``, and maybe ``agent``, ``session_id``, ``user``,
    ``custom_inputs``, ``context``; none of them ``None``."""
    where: str
    """How to name it to the client: ``dataframe_split.data[3]``, ``instances[0]``; ``inputs`` if that is one row."""
    is_text: bool
    """Whether the input is a bare text: then the prediction is the answer's text, else the whole answer object."""


def rows_of(body: Mapping[str, Any], *, max_rows: int) -> list[Row]:
    """Return the 1 to ``max_rows`` rows of a scoring request, in its order.

    A row is a text, or an object of columns: either ``input`` or ``messages``, or else one column of text by any name;
    and maybe the optional columns of `Row.body`. ``params`` gives those to all rows that lack them. A null or NaN means
    that the row lacks the column, since dataframes pad with them. ``inputs`` may also be one row, or columns of equal
    length; an object is columns if all of its values are lists, save that objects in ``input`` or ``messages`` are the
    conversation of one row. A ``stream`` in the body is left to the caller.

    Raises:
        InvalidRequest: the body is none of this; ``param`` names the row or the field.
    """
    field = _scoring_field(body)
    params = _params(body.get("params"))
    # One more than may be, and not all: a small body can hold millions of wrong rows.
    values = list(islice(_values(field, body[field]), max_rows + 1))
    if not values:
        raise InvalidRequest(f"{field} has no rows: send at least one.", field)
    if len(values) > max_rows:
        raise InvalidRequest(
            f"{field} has too many rows: a request may have {max_rows}. Spread them over several requests.", field
        )
    return [_row(where, value, params) for where, value in values]


def _scoring_field(body: Mapping[str, Any]) -> str:
    fields = [field for field in SCORING_FIELDS if field in body]
    if len(fields) != 1:
        there = " and ".join(fields) or "none of them"
        raise InvalidRequest(f"Send exactly one of {', '.join(SCORING_FIELDS)}; the body has {there}.")
    if others := [name for name in body if name not in (*fields, "params", "stream")]:
        raise InvalidRequest(
            f"{_listed(others)} cannot be beside {fields[0]}: remove it, or move it into params, which takes "
            f"{', '.join(_OPTIONAL)}.",
            _shortened(others[0]),
        )
    return fields[0]


def _params(params: Any) -> dict[str, Any]:
    if params is None:
        return {}
    if not isinstance(params, dict):
        raise InvalidRequest(f"params must be an object; it takes {', '.join(_OPTIONAL)}.", "params")
    if unknown := [name for name in params if name not in _OPTIONAL]:
        raise InvalidRequest(f"params takes {', '.join(_OPTIONAL)}, not {_listed(unknown)}.", "params")
    return _without_nulls(params)


def _values(field: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Return each row's name for messages, and the row as it was sent."""
    if field == "dataframe_split":
        return _rows_of_split(content)
    if isinstance(content, list):
        return _numbered(field, content)
    if field != "inputs":
        raise InvalidRequest(f"{field} must be a list of rows.", field)
    if isinstance(content, dict) and _is_columnar(content):
        return _numbered(field, _rows_of_columns(content))
    return iter([(field, content)])


def _numbered(name: str, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}[{number}]", value) for number, value in enumerate(values))


def _rows_of_split(frame: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    columns, data = _columns_and_data(frame)
    for where, row in _numbered("dataframe_split.data", data):
        if not isinstance(row, list) or len(row) != len(columns):
            found = f"a list of {len(row)}" if isinstance(row, list) else "no list"
            raise InvalidRequest(
                f"{where} must be a list of {len(columns)} values, one for each column; it is {found}.", where
            )
        yield where, dict(zip(columns, row, strict=True))


def _columns_and_data(frame: Any) -> tuple[list[str], list[Any]]:
    if not isinstance(frame, dict):
        raise InvalidRequest('dataframe_split must be an object with "columns" and "data".', "dataframe_split")
    if unknown := [key for key in frame if key not in ("columns", "data", "index")]:
        raise InvalidRequest(
            f'dataframe_split takes "columns", "data" and "index", not {_listed(unknown)}.', "dataframe_split"
        )
    for key in ("columns", "data"):
        if not isinstance(frame.get(key), list):
            raise InvalidRequest(f"dataframe_split.{key} must be there, and be a list.", f"dataframe_split.{key}")
    columns, data = frame["columns"], frame["data"]
    index = frame.get("index", data)
    if not isinstance(index, list) or len(index) != len(data):
        raise InvalidRequest(
            f"dataframe_split.index must be a list of {len(data)} labels, one for each row of data; or leave it out.",
            "dataframe_split.index",
        )
    _check_names(columns)
    return columns, data


def _check_names(columns: list[Any]) -> None:
    where = "dataframe_split.columns"
    if not all(isinstance(name, str) for name in columns):
        raise InvalidRequest(f"{where} must be texts: give each column a name.", where)
    if repeated := [name for name, times in Counter(columns).items() if times > 1]:
        raise InvalidRequest(f"{where} repeats {_listed(repeated)}: give each column a name of its own.", where)


def _is_columnar(content: dict[str, Any]) -> bool:
    if not all(isinstance(column, list) for column in content.values()):
        return False
    # A list of objects there is a conversation, and so the whole is one row.
    return not any(isinstance(value, dict) for key in _CONVERSATION for value in content.get(key, ()))


def _rows_of_columns(columns: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) > 1:
        lengths = _shortened(", ".join(f"{name!r} has {len(column)}" for name, column in columns.items()))
        raise InvalidRequest(f"The columns of inputs differ in length: {lengths}; give each one value a row.", "inputs")
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _row(where: str, value: Any, params: dict[str, Any]) -> Row:
    if not isinstance(value, str | dict):
        raise InvalidRequest(f'{where} must be a text, or an object with "input" or "messages".', where)
    row = {"input": value} if isinstance(value, str) else _without_nulls(value)
    unknown = [name for name in row if name not in _COLUMNS]
    if len(unknown) == 1 and not row.keys() & _CONVERSATION and isinstance(row[unknown[0]], str):
        row["input"] = row.pop(unknown.pop())
    if unknown:
        raise InvalidRequest(
            f"{where} has unknown columns: {_listed(unknown)}. Use {', '.join(_COLUMNS)}; one column of any name may "
            "stand for the input if it holds a text.",
            where,
        )
    if ("input" in row) == ("messages" in row):
        raise InvalidRequest(f'{where} must have either "input" or "messages".', where)
    return Row({**params, **row}, where, is_text=isinstance(row.get("input"), str))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def _listed(names: Iterable[str]) -> str:
    return _shortened(", ".join(map(repr, names)))


def _shortened(text: str) -> str:
    return text if len(text) <= 150 else f"{text[:150]}..."
