"""The one place that touches MLflow's stores.

``GATEWAY_MLFLOW_TRACKING_URI`` decides which store it is: MLflow's database opened directly, or its server over REST.
Both have the same methods. All of them block; callers use threads.
"""

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import groupby
from operator import attrgetter
from typing import Any

import sqlalchemy.exc
import structlog
from mlflow.entities import Assessment, DatasetRecord, ExperimentTag
from mlflow.entities import Span as MlflowSpan
from mlflow.entities import Trace as MlflowTrace
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracing.constant import SpansLocation, TraceTagKey
from mlflow.tracking._tracking_service.utils import _get_store

from gateway.settings import MLFLOW_DEFAULTS, Settings, sibling_database, sqlalchemy_url

log = structlog.get_logger(__name__)

_AT_ONCE = 100  # traces that are deleted in one statement: more would keep MLflow's tables locked for long
_REST_CALLS = 4  # at once: while the server works on one, the next is made ready
# Our own retries take the outbox as it is then; the client's, up to eight minutes long, would only hold them up.
_REST_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT": "10",
}
_AWAY_CODES = frozenset(
    {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
)
_AWAY_ERRORS = (
    OSError,  # those of ``requests`` are some
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.TimeoutError,
)
_NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
_BAD_GATEWAY = "error code 502 "
# Classes of Postgres' errors that SQLAlchemy takes for outages and are none: deadlocks, and what is too large.
_NO_OUTAGE = ("40", "54")
# The database can be read and not written: read-only, a grant that is missing, no room on the disk or in memory.
_UNWRITABLE = frozenset({"25006", "42501", "53100", "53200"})
_SEEN_TAG = "gateway.seen"


def tracking_uri(settings: Settings, database_url: str) -> str:
    """Return the tracking URI: the one that is set, or the database ``mlflow`` beside the gateway's own."""
    return sqlalchemy_url(settings.mlflow_tracking_uri or sibling_database(database_url, "mlflow"))


def configure_mlflow(settings: Settings, uri: str) -> None:
    """Set what MLflow and its judges read from the environment. To be called before anything of MLflow is used."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    for name, value in (MLFLOW_DEFAULTS | _REST_DEFAULTS).items():
        os.environ.setdefault(name, value)
    configure_judges(settings)


def configure_judges(settings: Settings) -> None:
    """Set what MLflow's judges read from the environment. To be called before scorers are loaded: they keep it."""
    if settings.judge_model:
        os.environ["MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"] = settings.judge_model
    if settings.judge_base_url:
        os.environ["OPENAI_API_BASE"] = settings.judge_base_url
    if settings.judge_api_key:
        os.environ["OPENAI_API_KEY"] = settings.judge_api_key.get_secret_value()


def is_away(error: BaseException) -> bool:
    """Whether the error says that MLflow, or its database, is not there, rather than that it refuses what it got.

    A database that takes no writes from anybody is not there either.
    """
    chain = list(_chain(error))
    if any(str(getattr(each, "sqlstate", "")).startswith(_NO_OUTAGE) for each in chain):
        return False
    return any(
        isinstance(each, _AWAY_ERRORS)
        or getattr(each, "sqlstate", None) in _UNWRITABLE
        or getattr(each, "error_code", None) in _AWAY_CODES
        or _BAD_GATEWAY in str(each)
        for each in chain
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class MlflowStore:
    """Traces, assessments and datasets of one experiment."""

    def __init__(self, uri: str, experiment: str):
        """Open the store and the experiment, which is made if it is not there."""
        # Opened directly, the store would take a folder of its own for artifacts; the server's is the right one.
        self._store: AbstractStore = _get_store(uri, None if uri.startswith("http") else "mlflow-artifacts:/")
        self.experiment_id = self._experiment(experiment)

    def _experiment(self, name: str) -> str:
        found = self._store.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._store.create_experiment(name))
            except MlflowException:
                found = self._store.get_experiment_by_name(name)  # another evaluator was faster
                if found is None:
                    raise
        return str(found.experiment_id)

    def is_well(self) -> bool:
        """Whether MLflow takes writes: one that can only be read would refuse every trace."""
        tag = ExperimentTag(_SEEN_TAG, str(time.time_ns()))  # never the same: what is there already is not written
        try:
            self._store.set_experiment_tag(self.experiment_id, tag)
        except Exception:  # noqa: BLE001 - whatever it is, nothing can be written
            return False
        return True

    def write_traces(self, traces: list[MlflowTrace]) -> None:
        """Write traces with the assessments they carry. Written again, they change nothing.

        The assessments go with the trace's frame and the spans of all traces go in one batch: in that order it costs
        a third of the other way around. Raises whatever MLflow raises; see `is_away`.
        """
        if isinstance(self._store, SqlAlchemyStore):
            try:
                self._write_in_one_transaction(self._store, traces)
                return
            except MlflowException as error:
                if is_away(error):
                    raise
                # One of them is there already, or is refused: now only what is there is taken apart from the others.
                log.info("writing a batch to MLflow trace by trace", traces=len(traces), error=type(error).__name__)
            for trace in traces:
                self._store.start_trace(trace.info)
        else:
            with ThreadPoolExecutor(_REST_CALLS, thread_name_prefix="mlflow") as calls:
                list(calls.map(self._store.start_trace, [trace.info for trace in traces]))
        self._store.log_spans(self.experiment_id, _spans(traces))

    def _write_in_one_transaction(self, store: SqlAlchemyStore, traces: list[MlflowTrace]) -> None:
        """Write a batch of new traces by the store's own methods, whole or not at all.

        By itself the store takes a transaction, a look at the experiment and an insert a table for each trace, which
        is three quarters of the time. A copy of it (they share connections) works within one session here, whose
        inserts are held back until they can go together.
        """
        experiment = store.get_experiment(self.experiment_id)
        with store.ManagedSessionMaker(read_only=False) as session:
            batch = copy.copy(store)
            batch.ManagedSessionMaker = lambda **_: nullcontext(session)
            batch.get_experiment = lambda _id: experiment
            with _held_back(session):
                for trace in traces:
                    # It would be looked up for each trace, and be written, with the spans: they come together here.
                    trace.info.tags[TraceTagKey.SPANS_LOCATION] = SpansLocation.TRACKING_STORE.value
                    batch.start_trace(trace.info)
            session.flush()
            batch.log_spans(self.experiment_id, _spans(traces))

    def tag_traces(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Set tags, by trace id, on those traces that are there; where they are as they should be, nothing changes."""
        trace_ids = list(tags)
        for start in range(0, len(trace_ids), _AT_ONCE):
            for info in self._store.batch_get_trace_infos(trace_ids[start : start + _AT_ONCE]):
                for key, value in tags[info.trace_id].items():
                    if info.tags.get(key) != value:
                        self._set_tag(info.trace_id, key, value)

    def _set_tag(self, trace_id: str, key: str, value: str) -> None:
        try:
            self._store.set_trace_tag(trace_id, key, value)
        except MlflowException as error:
            if error.error_code != _NOT_THERE:  # else it was deleted this very moment
                raise

    def known(self, trace_ids: Sequence[str]) -> set[str]:
        """Return which of the traces are there."""
        return {info.trace_id for info in self._store.batch_get_trace_infos(list(trace_ids))}

    def write_assessment(self, assessment: Assessment) -> None:
        """Write an assessment that has an id; if it is there already, nothing changes."""
        try:
            self._store.create_assessment(assessment)
        except MlflowException:
            if self._has_assessment(assessment.trace_id, assessment.assessment_id):
                return
            if assessment.overrides is None or self._has_assessment(assessment.trace_id, assessment.overrides):
                raise
            assessment.overrides = None  # somebody has deleted in MLflow what this one takes the place of
            self._store.create_assessment(assessment)

    def _has_assessment(self, trace_id: str, assessment_id: str) -> bool:
        try:
            self._store.get_assessment(trace_id, assessment_id)
        except MlflowException:
            return False
        return True

    def read_traces(self, trace_ids: list[str]) -> list[MlflowTrace]:
        """Return the traces that are there, oldest first."""
        traces = self._store.batch_get_traces(trace_ids)
        return sorted(traces, key=lambda trace: trace.info.request_time)

    def delete_traces(self, trace_ids: Sequence[str]) -> int:
        """Delete the traces that are there, spans and assessments with them; return how many these were.

        They are looked for in all experiments: the setting may have changed since they were written.
        """
        deleted = 0
        for start in range(0, len(trace_ids), _AT_ONCE):
            found = self._store.batch_get_trace_infos(list(trace_ids[start : start + _AT_ONCE]))
            by_experiment = attrgetter("experiment_id")
            for experiment_id, infos in groupby(sorted(found, key=by_experiment), by_experiment):
                deleted += self._store.delete_traces(experiment_id, trace_ids=[info.trace_id for info in infos])
        return deleted

    def merge_records(self, dataset: str, records: list[dict[str, Any]]) -> None:
        """Merge records into the dataset, which is made if it is not there. One caller at a time a dataset."""
        dataset_id = self.dataset_id(dataset)
        if dataset_id is None:
            dataset_id = self._store.create_dataset(dataset, tags={}, experiment_ids=[self.experiment_id]).dataset_id
        self._store.upsert_dataset_records(dataset_id, records)

    def dataset_id(self, name: str) -> str | None:
        """Return the id of a dataset of ours; ``None`` if it was not made yet."""
        found = self._store.search_datasets(filter_string=f"name = '{name}'", max_results=1)
        return found[0].dataset_id if found else None

    def datasets(self) -> dict[str, str]:
        """Return the ids, by name, of all datasets of the experiment, those that people made included."""
        found: dict[str, str] = {}
        token = None
        while True:
            page = self._store.search_datasets(experiment_ids=[self.experiment_id], page_token=token)
            found |= {dataset.name: dataset.dataset_id for dataset in page}
            if not (token := page.token):
                return found

    def records(self, dataset_id: str) -> list[DatasetRecord]:
        """Return the records of a dataset."""
        # The dataset's own property would ask the store that the environment names.
        return list(self._store._load_dataset_records(dataset_id)[0])  # noqa: SLF001

    def replace_records(self, dataset_id: str, records: Sequence[DatasetRecord], by: list[dict[str, Any]]) -> None:
        """Delete records and merge others: a merge alone can take nothing away from a record."""
        self._store.delete_dataset_records(dataset_id, [record.dataset_record_id for record in records])
        if by:
            self._store.upsert_dataset_records(dataset_id, by)


def _spans(traces: Sequence[MlflowTrace]) -> list[MlflowSpan]:
    return [span for trace in traces for span in trace.data.spans]


@contextmanager
def _held_back(session: Any) -> Iterator[None]:
    """Let nothing of the session out to the database until the end."""
    session.flush = lambda _objects=None: None
    try:
        yield
    finally:
        del session.flush  # the class has its own
