"""What people do with datasets: look at them, take rows out and put rows in, say what would have been right."""

import asyncio
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlflow.entities import AssessmentSource, DatasetRecord, Expectation

from gateway.errors import ConfigurationError
from gateway.evaluation.datasets import rows
from gateway.evaluation.datasets.conversion import EXPECTATION, HUMAN, as_human, origins
from gateway.evaluation.datasets.feeder import DatasetFeeder, unsupported
from gateway.evaluation.datasets.rows import Counts
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool
from gateway.tracing.redaction.redactor import Redactor

T = TypeVar("T")

_ATTEMPTS = 5  # merges that somebody else's, at the same moment, can spoil
_BATCH = 100
_NONE = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Overview:
    """A dataset at a glance."""

    name: str
    records: int
    """In MLflow; less than the traces that were taken, where several had equal inputs."""
    sources: dict[str, int]
    """Records by who they came from: TRACE, HUMAN, DOCUMENT, CODE."""
    expected: int
    """Records with expectations."""
    replays: dict[str, int]
    """Records by how they can be replayed."""
    counts: Counts
    """What became of what the rules wanted in it."""


class DatasetDesk:
    """Works on datasets for a person, beside evaluators that may feed them meanwhile."""

    def __init__(self, pool: Pool, store: MlflowStore, redactor: Redactor, rules: Callable[[], Rules]):
        """Take the parts; ``rules`` gives those that count now."""
        self._pool = pool
        self._store = store
        self._redactor = redactor
        self._feeder = DatasetFeeder(pool, store, redactor, rules)

    async def overviews(self) -> list[Overview]:
        """Return all datasets, and those that rules want something in, by name.

        Raises:
            ConfigurationError: this MLflow has no datasets; so all methods.
        """
        async with self._pool.connection() as connection:
            counts = {each.dataset: each for each in await rows.counts(connection)}
        known = await self._asked(self._store.datasets)
        found = []
        for name in sorted(known.keys() | counts.keys()):
            records = await self._asked(self._store.records, known[name]) if name in known else []
            found.append(_overview(name, records, counts.get(name, Counts(name, *_NONE))))
        return found

    async def records(self, dataset: str) -> list[DatasetRecord]:
        """Return the records of a dataset; raise `ConfigurationError` if there is none of the name."""
        return await self._asked(self._store.records, await self._id(dataset))

    async def put(self, dataset: str, records: Sequence[dict[str, Any]]) -> int:
        """Merge records that are redacted into a dataset, which is made if it is not there.

        What came from a trace that was forgotten since stays out.

        Returns:
            How many were left out.
        """
        left_out = 0
        for start in range(0, len(records), _BATCH):
            some = records[start : start + _BATCH]
            async with self._pool.connection() as connection, connection.transaction():
                await rows.beside_no_erasure(connection)
                await rows.lock(connection, dataset)
                traces = {trace_id for each in some for trace_id in _origins(each)}
                gone = await rows.erased(connection, sorted(traces))
                fit = [each for each in some if not _origins(each) & gone]
                await self._merge(dataset, fit)
            left_out += len(some) - len(fit)
        return left_out

    async def annotate(self, dataset: str) -> int:
        """Bring what people said in MLflow into the dataset; return of how many traces they said anything."""
        await self._id(dataset)
        return await self._feeder.annotate(dataset)

    async def expect(self, dataset: str, row: str, expectations: Mapping[str, Any], by: str) -> None:
        """Say what would have been right.

        Args:
            dataset: its name.
            row: id of a record, or of a trace that one came from.
            expectations: value by name; redacted here.
            by: whose word it is.

        Raises:
            ConfigurationError: there is no such dataset or row.
        """
        found = [each for each in await self.records(dataset) if each.dataset_record_id == row or row in origins(each)]
        if not found:
            raise ConfigurationError(f"The dataset {dataset} has no row {row}; `gateway datasets show` lists them.")
        trace_id = row if row in origins(found[0]) else (found[0].tags or {}).get("trace_id")
        async with self._pool.connection() as connection:
            is_ours = bool(trace_id and await rows.among(connection, dataset, [trace_id]))
        scope = (found[0].tags or {}).get("session_id") or trace_id or found[0].dataset_record_id
        fit = {self._redactor.text(name): self._redactor.value(value, scope) for name, value in expectations.items()}
        if not is_ours:
            await self._write_into(dataset, found[0], fit, by)
            return
        # On the trace, in MLflow's own form: so it stays whatever becomes of the row.
        for name, value in fit.items():
            await self._asked(self._store.write_assessment, _expectation(str(trace_id), name, value, by))
        await self._feeder.annotate(dataset)

    async def _write_into(self, dataset: str, record: DatasetRecord, expectations: dict[str, Any], by: str) -> None:
        about = json.dumps({"source": HUMAN, "by": self._redactor.identifier(by, "person")})
        new = {
            "outputs": record.outputs,
            "expectations": expectations,
            "tags": {f"{EXPECTATION}{name}": about for name in expectations},
            "source": {"source_type": HUMAN, "source_data": dict(record.source.source_data) if record.source else {}},
        }
        async with self._pool.connection() as connection, connection.transaction():
            await rows.lock(connection, dataset)
            dataset_id = await self._id(dataset)
            await self._asked(self._store.replace_records, dataset_id, [record], [as_human(record, new)])

    async def _merge(self, dataset: str, records: list[dict[str, Any]]) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                await self._asked(self._store.merge_records, dataset, records)
                return
            except ConfigurationError:
                raise
            except Exception:
                if attempt == _ATTEMPTS - 1:
                    raise

    async def _id(self, dataset: str) -> str:
        found = await self._asked(self._store.datasets)
        if dataset not in found:
            near = difflib.get_close_matches(dataset, found, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(sorted(found)) or 'none yet'}."
            raise ConfigurationError(f"MLflow has no dataset {dataset}. {hint}")
        return found[dataset]

    async def _asked(self, call: Callable[..., T], *given: Any) -> T:
        """Call MLflow in a thread; where it has no datasets, say so."""
        try:
            return await asyncio.to_thread(call, *given)
        except Exception as error:
            if problem := unsupported(error):
                raise problem from None
            raise


def _overview(name: str, records: Sequence[DatasetRecord], counts: Counts) -> Overview:
    sources = Counter(str(each.source_type or "UNSPECIFIED") for each in records)
    replays = Counter((each.tags or {}).get("gateway.replay", "live") for each in records)
    expected = sum(bool(each.expectations) for each in records)
    return Overview(name, len(records), dict(sources), expected, dict(replays), counts)


def _origins(record: Mapping[str, Any]) -> set[str]:
    """Return the traces that a record of a file says it came from."""
    tags = record.get("tags", {})
    named = {tag.removeprefix("from.") for tag in tags if tag.startswith("from.")}
    return named | ({tags["trace_id"]} if tags.get("trace_id") else set())


def _expectation(trace_id: str, name: str, value: Any, by: str) -> Expectation:
    made = Expectation(
        name=name, value=value, trace_id=trace_id, source=AssessmentSource(source_type=HUMAN, source_id=by)
    )
    # Said once more it is the same: so it is no second one.
    said = json.dumps([trace_id, name, value, by], sort_keys=True)
    made.assessment_id = f"a-{hashlib.sha256(said.encode()).hexdigest()[:40]}"
    return made
