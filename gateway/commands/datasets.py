"""``gateway datasets``: look at them, take rows out and put rows in, bring in what people said."""

import asyncio
import getpass
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.commands.stored import output, use_mlflow
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError
from gateway.settings import Settings, load_settings
from gateway.storage.database import database_url, migrate, open_pool
from gateway.tracing.messages import text_of
from gateway.tracing.redaction.redactor import Redactor

if TYPE_CHECKING:  # these take seconds to import, which `--help` need not wait for
    from mlflow.entities import DatasetRecord

    from gateway.evaluation.datasets.desk import DatasetDesk, Overview

datasets = App(name="datasets", help="Look at datasets, export and import rows, bring in what people said.")

T = TypeVar("T")

_POOL_SIZE = 4
_QUESTION_CHARACTERS = 70
_NONE = ""


def register(app: App) -> None:
    """Add the commands to the application."""
    app.command(datasets)


@datasets.command(name="list")
def list_(*, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Show all datasets: how many rows, who they came from, how they can be replayed, and what was left out.

    Args:
        as_json: Print JSON instead of a table.
    """
    found = _at_desk(lambda desk, _: desk.overviews())
    if as_json:
        _print_json([_plain(each) for each in found])
        return
    table = Table(
        "dataset", "rows", "from", "expected", "replay", "waiting", "today", "similar", "over the cap", "refused"
    )
    for each in found:
        counts = each.counts
        numbers = (counts.waiting, counts.taken_today, counts.similar, counts.capped, counts.refused)
        cells = (each.name, each.records, _counted(each.sources), each.expected, _counted(each.replays), *numbers)
        table.add_row(*(Text(str(cell)) for cell in cells))
    output().print(table)


@datasets.command
def show(
    name: str,
    *,
    limit: Annotated[int, Parameter(negative="")] = 20,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show the newest rows of a dataset: what was asked, by which agent, why it is there, how it can be replayed.

    Args:
        name: The dataset.
        limit: How many rows.
        as_json: Print whole rows as JSON instead of a table.
    """
    if limit < 1:
        raise ConfigurationError(f"--limit is {limit}; give 1 or more.")
    records = _at_desk(lambda desk, _: desk.records(name))
    newest = sorted(records, key=lambda each: each.created_time, reverse=True)[:limit]
    if as_json:
        _print_json([each.to_dict() for each in newest])
        return
    table = Table("row", "from", "agent", "asked", "because of", "expected", "replay")
    for each in newest:
        table.add_row(*(Text(cell) for cell in _cells(each)))
    output().print(table)
    output().print(f"{len(newest)} of {len(records)} rows", markup=False)


@datasets.command
def export(name: str, file: Path | None = None) -> None:
    """Write a dataset's rows to a file, as `gateway evaluate` and `gateway datasets import` take them.

    Args:
        name: The dataset.
        file: Where to: .jsonl or .csv; JSON lines on standard output if left out. An erasure later does not reach it.
    """
    if file is not None and file.suffix.lower() not in {".csv", ".jsonl"}:
        raise ConfigurationError(f"{file}: a file of rows ends in .csv or .jsonl.")
    records = _at_desk(lambda desk, _: desk.records(name))
    from gateway.evaluation.datasets.files import write  # noqa: PLC0415 - see above

    with _opened(file) as to:
        count = write(records, "csv" if file and file.suffix.lower() == ".csv" else "jsonl", to)
    _note(f"{count} rows of {name}{f' are in {file}' if file else ''}.")


@datasets.command(name="import")
def import_(name: str, file: Path, *, source: Literal["document", "code", "human"] = "document") -> None:
    """Put the rows of a file into a dataset, redacted. Done twice, it changes nothing.

    Args:
        name: The dataset; it is made if it is not there.
        file: .jsonl or .csv, with `inputs` or `question`, and optionally `outputs`, `expectations`, `tags`.
        source: Who made the rows: they stand in a document, a program made them, or a person wrote them down.
    """
    from gateway.dataset_rules import DATASET_NAME  # noqa: PLC0415 - see above
    from gateway.evaluation.datasets.files import imported  # noqa: PLC0415 - see above
    from gateway.evaluation.offline.rows import read_file  # noqa: PLC0415 - see above

    if not DATASET_NAME.fullmatch(name):
        raise ConfigurationError(
            "A dataset's name has letters, digits, blanks, dots, dashes and underscores only, 200 at the most."
        )
    rows = read_file(file).rows

    async def put(desk: "DatasetDesk", redactor: Redactor) -> tuple[list[dict[str, Any]], int]:
        records = await asyncio.to_thread(imported, rows, file, source, redactor)
        return records, await desk.put(name, records)

    records, left_out = _at_desk(put)
    redacted = [each["tags"]["gateway.replay_because"] for each in records if each["tags"]["gateway.replay_because"]]
    _note(f"{len(records) - left_out} rows of {file} are in {name}.")
    if left_out:
        _note(f"{left_out} rows were left out: they came from conversations that were forgotten.")
    if redacted:
        _note(
            f"{len(redacted)} rows cannot be asked as they stand in the file, since they are redacted: "
            f"{'; '.join(sorted(set(redacted))[:3])}. Use values that nobody takes for personal, such as order numbers."
        )


@datasets.command
def annotate(
    name: str,
    row: str | None = None,
    *,
    expect: Annotated[list[str] | None, Parameter(negative="")] = None,
    by: str | None = None,
) -> None:
    """Bring what people said in MLflow into a dataset's rows, or say of one row what would have been right.

    Args:
        name: The dataset.
        row: A row, by its id or that of its trace; without one, everything that was said in MLflow is brought in.
        expect: What would have been right, as expected_response=42. Give it once for each; a value that begins with
            a bracket, a brace or a quote is JSON.
        by: Whose word it is; your account's name if left out.
    """
    if (row is None) != (not expect):
        raise ConfigurationError("Give a row together with --expect name=value, or neither of them.")
    if row is None:
        spoken_of = _at_desk(lambda desk, _: desk.annotate(name))
        _note(f"People said something of {spoken_of} traces of {name}; its rows say so too.")
        return
    expectations = dict(_expectation(each) for each in expect or ())
    _at_desk(lambda desk, _: desk.expect(name, row, expectations, by or getpass.getuser()))
    _note(f"{row} of {name} now says what is expected: {', '.join(expectations)}.")


def _expectation(given: str) -> tuple[str, Any]:
    name, equals, text = given.partition("=")
    if not (name.strip() and equals):
        raise ConfigurationError(f"--expect {given}: give a name and a value, as expected_response=42.")
    if text[:1] not in {"[", "{", '"'}:
        return name.strip(), text
    try:
        return name.strip(), json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"--expect {name}: the value is not JSON: {error}") from None


def _at_desk(work: Callable[["DatasetDesk", Redactor], Awaitable[T]]) -> T:
    """Return what ``work`` returns of a desk on the database and the MLflow of the settings."""
    settings = load_settings()
    use_mlflow(settings)
    url = database_url(settings)
    migrate(url)
    return asyncio.run(_work(settings, url, work))


async def _work(settings: Settings, url: str, work: Callable[["DatasetDesk", Redactor], Awaitable[T]]) -> T:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - see above

    from gateway.evaluation.datasets.desk import DatasetDesk  # noqa: PLC0415 - see above
    from gateway.evaluation.datasets.feeder import unsupported  # noqa: PLC0415 - see above
    from gateway.evaluation.store import MlflowStore, tracking_uri  # noqa: PLC0415 - see above

    redactor = Redactor(load_keys(settings).derive("redaction"), settings.redact_patterns)
    try:
        store = await asyncio.to_thread(MlflowStore, tracking_uri(settings, url), settings.mlflow_experiment)
    except MlflowException as error:
        problem = f"MLflow cannot be used: {error.message.splitlines()[0]}"
        raise unsupported(error) or ConfigurationError(problem) from None
    async with open_pool(url, max_size=_POOL_SIZE, name="datasets") as pool:
        return await work(DatasetDesk(pool, store, redactor, lambda: settings.datasets), redactor)


def _cells(record: "DatasetRecord") -> Iterator[str]:
    tags: Mapping[str, str] = record.tags or {}
    messages = record.inputs.get("messages") or []
    asked = next((text_of(each.get("content")) for each in reversed(messages) if each.get("role") == "user"), "")
    yield record.dataset_record_id
    yield str(record.source_type or _NONE)
    yield tags.get("agent", _NONE)
    yield asked if len(asked) <= _QUESTION_CHARACTERS else f"{asked[:_QUESTION_CHARACTERS]}…"
    yield tags.get("scorers") or tags.get("rule", _NONE)
    yield ", ".join(sorted(record.expectations or ()))
    yield tags.get("gateway.replay", "live")


def _plain(overview: "Overview") -> dict[str, Any]:
    return {**vars(overview), "counts": {k: v for k, v in overview.counts._asdict().items() if k != "dataset"}}


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


@contextmanager
def _opened(file: Path | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    try:
        with file.open("w", encoding="utf-8", newline="") as to:
            yield to
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}.") from None


def _print_json(value: Iterable[Any]) -> None:
    sys.stdout.write(json.dumps(list(value), indent=2, ensure_ascii=False, default=str) + "\n")


def _note(text: str) -> None:
    Console(stderr=True).print(text, markup=False, soft_wrap=True)
