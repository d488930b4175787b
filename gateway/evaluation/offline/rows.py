"""What is to be asked: the rows of an MLflow dataset, or of a CSV or JSONL file.

Everything that can be wrong with them is said before anything runs, with the place: a line of the file, or the id of a
record.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from gateway.errors import ConfigurationError
from gateway.evaluation.datasets.replay import REPLAY_TAG

ReplayKind = Literal["live", "recorded_tools", "recorded_answer"]
"""How a row is answered: by the agent with its tools, by the agent with recorded results, or by the answer of then."""

FILE_SUFFIXES = (".csv", ".jsonl")

_REPLAYS: tuple[str, ...] = get_args(ReplayKind)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_FIELDS = frozenset({"inputs", "outputs", "expectations", "tags", "source"})
_QUESTIONS = ("question", "query", "input", "prompt")
_EXPECTATIONS = ("rubric", "guidelines")
_EXPECTED = "expected_"
_VERSION_DIGITS = 12
_LONGEST_FIELD = 10_000_000  # characters of a CSV cell: a whole conversation fits


@dataclass(frozen=True)
class Row:
    """One question, with what is known of its answer."""

    place: str
    """Where it stands, for messages: ``golden.jsonl:3``, or ``record d-…``."""
    messages: list[dict[str, Any]]
    """The conversation that is asked, as chat messages."""
    expectations: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None
    """The answer of then; ``None``: there is none."""
    tags: dict[str, str] = field(default_factory=dict)
    trace_id: str | None = None
    """Trace that it came from; ``None``: a person or a program made it."""

    @property
    def replay(self) -> ReplayKind:
        """How it is to be answered."""
        return cast("ReplayKind", self.tags.get(REPLAY_TAG, "live"))

    @property
    def agent(self) -> str | None:
        """The agent that it was asked; ``None``: it may be asked of any."""
        return self.tags.get("agent") or None


@dataclass(frozen=True)
class Dataset:
    """The rows that one agent is asked."""

    name: str
    version: str
    """Digest of all its content, rows for other agents included."""
    source_type: str
    """``evaluation_dataset``, as MLflow calls its own, or ``local``."""
    source: str
    """JSON, as MLflow keeps it beside a run."""
    rows: list[Row]
    passed_over: int = 0
    """Rows that belong to other agents."""


def read_dataset(name: str, agent: str) -> Dataset:
    """Return the rows for an agent, of a file if ``name`` looks like one or is one, else of the MLflow dataset.

    Raises:
        ConfigurationError: there is no such dataset or file, something in it is malformed, or nothing is for the agent.
    """
    path = Path(name)
    whole = read_file(path) if path.suffix.lower() in FILE_SUFFIXES or path.is_file() else _of_mlflow(name)
    rows = [row for row in whole.rows if row.agent in {None, agent}]
    if not whole.rows:
        raise ConfigurationError(f"The dataset {name} is empty.")
    if not rows:
        others = sorted({row.agent for row in whole.rows if row.agent})
        raise ConfigurationError(f"No row of {name} is for agent {agent}; they are for {', '.join(others)}.")
    passed_over = len(whole.rows) - len(rows)
    return Dataset(whole.name, whole.version, whole.source_type, whole.source, rows, passed_over)


def read_file(path: Path) -> Dataset:
    """Return the rows of a CSV or JSONL file; raise `ConfigurationError` with file and line."""
    readers: dict[str, Callable[[Path, str], Iterator[Row]]] = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigurationError(f"{path}: a file of rows ends in {' or '.join(FILE_SUFFIXES)}.")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line}: this is not UTF-8 text.") from None
    version = hashlib.sha256(data).hexdigest()[:_VERSION_DIGITS]
    source = json.dumps({"uri": str(path)})
    return Dataset(path.name, version, "local", source, list(reader(path, text)))


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            _refuse(place, f"this is not JSON: {error}")
        if not isinstance(fields, dict):
            _refuse(place, "a row is a JSON object with `inputs`")
        yield _row(place, fields)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            place, begins = f"{path}:{begins}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(place, cells)
                continue
            if len(cells) != len(header):
                _refuse(place, f"the row has {len(cells)} cells, the header {len(header)}")
            given = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            yield _row(place, {name: _cell(place, name, cell) for name, cell in given.items()})
    except csv.Error as error:
        raise ConfigurationError(f"{path}:{reader.line_num}: this is not CSV: {error}.") from None


def _header(place: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        _refuse(place, f"the header has {', '.join(twice)} twice")
    if "inputs" not in names and not set(names) & set(_QUESTIONS):
        _refuse(place, "the header has neither `question` nor `inputs`; the first line names the columns")
    return names


def _cell(place: str, name: str, cell: str) -> Any:
    """Return a cell as JSON where its column holds JSON, and where it looks like JSON; else as text."""
    looks_like = cell.lstrip()[:1] in ({"{", "[", '"'} if name == "outputs" else {"{", "["})
    if name in _FIELDS - {"outputs"} or looks_like:
        try:
            return json.loads(cell)
        except ValueError as error:
            if name in _FIELDS - {"outputs"}:
                _refuse(place, f"the cell of {name} is not JSON: {error}")
    return cell


def _row(place: str, fields: Mapping[str, Any]) -> Row:
    """Return a row of a file: ``inputs`` or a question, and what is expected, together or a field each."""
    question = [name for name in _QUESTIONS if name in fields]
    expected = {name for name in fields if name in _EXPECTATIONS or name.startswith(_EXPECTED)}
    if unknown := sorted(set(fields) - _FIELDS - set(question) - expected):
        _refuse(
            place,
            f"there is no field {', '.join(unknown)}; a row has `inputs` or `question`, and may have `outputs`, "
            "`expectations` or fields that begin with `expected_`, `rubric`, `guidelines`, `tags`",
        )
    if ("inputs" in fields) + len(question) != 1:
        _refuse(place, "a row needs either `inputs` or one `question`")
    inputs = fields["inputs"] if "inputs" in fields else {question[0]: fields[question[0]]}
    expectations = _mapping(place, fields, "expectations") | {name: fields[name] for name in sorted(expected)}
    tags, source = _mapping(place, fields, "tags"), _mapping(place, fields, "source")
    trace_id = (source.get("source_data") or {}).get("trace_id") or tags.get("trace_id")
    return _checked(place, inputs, fields.get("outputs"), expectations, tags, trace_id)


def _of_mlflow(name: str) -> Dataset:
    """Return the rows of an MLflow dataset, as the tracking server has them now."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - a file needs none of this
    from mlflow.genai import datasets  # noqa: PLC0415 - as above

    try:
        found = datasets.search_datasets(filter_string=f"name = '{name}'", max_results=1) if "'" not in name else []
        known = [] if found else sorted({each.name for each in datasets.search_datasets(max_results=50)})
    except (MlflowException, NotImplementedError) as error:
        raise ConfigurationError(f"MLflow cannot be asked for the dataset {name}: {error}") from None
    if not found:
        listed = f"there are {', '.join(known)}" if known else "there is none yet"
        raise ConfigurationError(f"There is no dataset {name} in MLflow, and no file of that name; in MLflow {listed}.")
    dataset = datasets.get_dataset(dataset_id=found[0].dataset_id)
    frame = dataset.to_df()
    # What a record does not have, a frame may have as NaN.
    rows = [_of_record(record) for record in frame.astype(object).where(frame.notna(), None).to_dict(orient="records")]
    source = json.dumps({"dataset_id": dataset.dataset_id})
    return Dataset(dataset.name, str(dataset.digest), "evaluation_dataset", source, rows)


def _of_record(record: Mapping[str, Any]) -> Row:
    tags = {str(key): str(value) for key, value in (record.get("tags") or {}).items()}
    source = record.get("source")
    told = getattr(source, "source_data", None) or {}
    trace_id = told.get("trace_id") or tags.get("trace_id")
    place = f"record {record.get('dataset_record_id')}"
    return _checked(place, record["inputs"], record.get("outputs"), record.get("expectations") or {}, tags, trace_id)


def _checked(
    place: str, inputs: Any, outputs: Any, expectations: dict[str, Any], tags: dict[str, Any], trace_id: str | None
) -> Row:
    if (kind := tags.get(REPLAY_TAG, "live")) not in _REPLAYS:
        _refuse(place, f"the tag {REPLAY_TAG} is {kind!r}; it is one of {', '.join(_REPLAYS)}")
    if kind == "recorded_answer" and outputs is None:
        _refuse(place, f"the tag {REPLAY_TAG} says recorded_answer, and the row has no `outputs`")
    texts = {str(key): str(value) for key, value in tags.items()}
    return Row(place, _messages(place, inputs), expectations, outputs, texts, trace_id)


def _messages(place: str, inputs: Any) -> list[dict[str, Any]]:
    """Return the conversation of a row's inputs: ``messages``, or one text under any name."""
    if not isinstance(inputs, dict):
        _refuse(place, '`inputs` is a JSON object: {"messages": [...]}, or one text such as {"question": "..."}')
    if set(inputs) != {"messages"}:
        texts = list(inputs.values())
        if len(texts) == 1 and isinstance(texts[0], str) and texts[0].strip():
            return [{"role": "user", "content": texts[0]}]
        _refuse(place, f"`inputs` has {', '.join(inputs) or 'nothing'}; an agent takes `messages`, or one text")
    messages = inputs["messages"]
    if not isinstance(messages, list) or not messages:
        _refuse(place, "`messages` is a list of one chat message or more")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            _refuse(place, f"messages[{number}] needs a role, one of {', '.join(sorted(_ROLES))}")
        if message.get("content") is None and not message.get("tool_calls"):
            _refuse(place, f"messages[{number}] has no content")
    return messages


def _mapping(place: str, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(place, f"`{name}` is a JSON object")
    return value


def _refuse(place: str, what: str) -> NoReturn:
    raise ConfigurationError(f"{place}: {what}.")
