"""Records of a dataset as files, in the form that ``gateway evaluate`` takes, and rows of files as records."""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from mlflow.entities import DatasetRecord

from gateway.evaluation.datasets.replay import Replay
from gateway.evaluation.offline.rows import Row as FileRow
from gateway.tracing.redaction.redactor import PLACEHOLDER, Redactor

Source = Literal["document", "code", "human"]
"""Who made the rows of a file: they stand in a document, a program made them, or a person wrote them down."""

_FIELDS = ("inputs", "outputs", "expectations", "tags", "source")


def write(records: Iterable[DatasetRecord], form: str, to: TextIO) -> int:
    """Write records and return how many these were.

    Args:
        records: of a dataset.
        form: ``csv``, or else JSON lines.
        to: where they go; for CSV opened without translation of line ends.
    """
    fields = [_fields(each) for each in records]
    if form == "csv":
        writer = csv.DictWriter(to, _FIELDS)
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(value, ensure_ascii=False) for name, value in each.items()} for each in fields
        )
    else:
        to.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in fields)
    return len(fields)


def _fields(record: DatasetRecord) -> dict[str, Any]:
    """Return what a record holds, without what it does not."""
    source = None if record.source is None else record.source.to_dict()
    values = (record.inputs, record.outputs, record.expectations, record.tags, source)
    return {name: value for name, value in zip(_FIELDS, values, strict=True) if value}


def imported(rows: Sequence[FileRow], path: Path, source: Source, redactor: Redactor) -> list[dict[str, Any]]:
    """Return the records of a file's rows, redacted.

    The same file gives the same records again, so that importing it twice changes nothing.

    Raises:
        Unredactable: a row cannot be redacted; nothing of the file is to be imported then.
    """
    return [_record(row, path, source, redactor) for row in rows]


def _record(row: FileRow, path: Path, source: Source, redactor: Redactor) -> dict[str, Any]:
    plain = {"messages": row.messages}
    # Its placeholders are its own: nothing is known of a session, and other rows may be of other people.
    scope = "file/" + hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    inputs, outputs = redactor.value(plain, scope), redactor.value(row.outputs, scope)
    where = {"doc_uri": redactor.text(path.name), "row": row.place.rpartition(":")[2]}
    made: dict[str, Any] = {
        "inputs": inputs,
        "source": {"source_type": source.upper(), "source_data": where},
        # What the file says itself stands: a row that was exported knows better.
        "tags": _replay(inputs, outputs, plain).tags() | redactor.value(row.tags, scope),
    }
    if outputs is not None:
        made["outputs"] = outputs
    if row.expectations:
        made["expectations"] = redactor.value(row.expectations, scope)
    return made


def _replay(inputs: Mapping[str, Any], outputs: Any, plain: Mapping[str, Any]) -> Replay:
    """Return how an imported row can be replayed: no trace says whether a tool needs what redaction took out."""
    if inputs == plain:
        return Replay("live")
    before = set(PLACEHOLDER.findall(json.dumps(plain)))
    taken_out = sorted(set(PLACEHOLDER.findall(json.dumps(inputs))) - before)
    because = f"redaction took {', '.join(taken_out) or 'something'} out of the file's row"
    return Replay("live" if outputs is None else "recorded_answer", because)
