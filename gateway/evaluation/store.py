"""The one place that touches MLflow's stores.

``GATEWAY_MLFLOW_TRACKING_URI`` decides which store it is: MLflow's database opened directly, or its server over REST.
Both have the same methods. All of them block; callers use threads.
"""

import os
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import structlog
from mlflow.entities import Assessment, DatasetRecord
from mlflow.entities import Trace as MlflowTrace
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.tracking._tracking_service.utils import _get_store

from gateway.settings import MLFLOW_DEFAULTS, Settings, sibling_database, sqlalchemy_url

log = structlog.get_logger(__name__)

_AT_ONCE = 100  # traces that are deleted in one statement: more would keep MLflow's tables locked for long


def tracking_uri(settings: Settings, database_url: str) -> str:
    """Return the tracking URI: the one that is set, or the database ``mlflow`` beside the gateway's own."""
    return sqlalchemy_url(settings.mlflow_tracking_uri or sibling_database(database_url, "mlflow"))


def configure_mlflow(settings: Settings, uri: str) -> None:
    """Set what MLflow and its judges read from the environment. To be called before anything of MLflow is used."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if settings.judge_model:
        os.environ["MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"] = settings.judge_model
    if settings.judge_base_url:
        os.environ["OPENAI_API_BASE"] = settings.judge_base_url
    if settings.judge_api_key:
        os.environ["OPENAI_API_KEY"] = settings.judge_api_key.get_secret_value()


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
        """Whether MLflow answers at all."""
        try:
            self._store.get_experiment(self.experiment_id)
        except Exception:  # noqa: BLE001 - whatever it is, it does not answer
            return False
        return True

    def write_traces(self, traces: list[MlflowTrace]) -> None:
        """Write traces with the assessments they carry. Written again, they change nothing.

        The assessments go with the trace's frame and the spans of all traces go in one batch: in that order it costs
        a third of the other way around.
        """
        for trace in traces:
            self._store.start_trace(trace.info)
        self._store.log_spans(self.experiment_id, [span for trace in traces for span in trace.data.spans])

    def write_assessment(self, assessment: Assessment) -> None:
        """Write an assessment that has an id; if it is there already, nothing changes."""
        try:
            self._store.create_assessment(assessment)
        except MlflowException:
            if not self._has_assessment(assessment):
                raise

    def _has_assessment(self, assessment: Assessment) -> bool:
        try:
            self._store.get_assessment(assessment.trace_id, assessment.assessment_id)
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
