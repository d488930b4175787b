"""One offline evaluation: everything that can be wrong first, then ``mlflow.genai.evaluate``, then what came of it.

`prepare` reads and checks; it logs nothing. `Evaluation.run` makes one run in MLflow, with the parameters, the metrics,
a trace a case with what the scorers said, and each case as a JSON artifact.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.entities import Trace as MlflowTrace
from mlflow.exceptions import MlflowException
from mlflow.genai.datasets.evaluation_dataset import compute_records_sha256
from mlflow.tracing.constant import AssessmentMetadataKey
from mlflow.utils.mlflow_tags import MLFLOW_GENAI_EVALUATE_DATASET_IDENTITY

from gateway import __version__
from gateway.errors import ConfigurationError, RunFailed
from gateway.evaluation.applicability import root_of
from gateway.evaluation.datasets.replay import REPLAY_TAG
from gateway.evaluation.offline.cases import (
    SCORE_THRESHOLD,
    Case,
    Verdict,
    metrics_of,
    score_decides,
    score_of,
    scorers_of_score,
    state_of,
)
from gateway.evaluation.offline.conversations import conversation
from gateway.evaluation.offline.judged import Judges
from gateway.evaluation.offline.kept import log_cases, read_trace
from gateway.evaluation.offline.replay import RecordedCall, Replay, cannot_replay, recorded_calls
from gateway.evaluation.offline.rows import Dataset, ReplayKind, Row, read_dataset
from gateway.evaluation.offline.selection import Selection, select, where_it_applies
from gateway.evaluation.predict import Answer, Predictor
from gateway.evaluation.scoring import conversation_task, passed
from gateway.settings import Settings

_CASE_TAG = "gateway.case"
_WORKERS = "MLFLOW_GENAI_EVAL_MAX_WORKERS"
_TIMEOUT = "MLFLOW_GENAI_EVAL_ASYNC_TIMEOUT"
_DEFAULTS = {
    # By itself MLflow would take up to 40 threads, each with a connection to its database.
    _WORKERS: "10",
    # MLflow would ask the first question once more, to see whether it makes a trace: it does, and a model call costs.
    "MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION": "true",
}


@dataclass(frozen=True)
class Options:
    """What a person may choose."""

    agent: str
    dataset: str
    """Name of an MLflow dataset, or a CSV or JSONL file."""
    scorers: Sequence[str] = ()
    """Empty: all that are for the agent."""
    workers: int | None = None
    """Cases at once; ``None``: what ``MLFLOW_GENAI_EVAL_MAX_WORKERS`` says, else 10."""
    timeout_s: float | None = None
    """Seconds a case; ``None``: what ``MLFLOW_GENAI_EVAL_ASYNC_TIMEOUT`` says, else ``GATEWAY_RUN_TIMEOUT_S``."""
    run_name: str | None = None
    score_threshold: float | None = None
    """Least score of a case that passes; ``None``: `SCORE_THRESHOLD`, and only where the score is to decide."""


@dataclass(frozen=True)
class Result:
    """What came of it."""

    run_id: str
    params: dict[str, str]
    metrics: dict[str, float]
    cases: list[Case]
    score_from: list[str]
    """Scorers that the average score comes from; empty: there is none."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Planned:
    """A row, ready to be asked."""

    number: int
    row: Row
    key: str
    session_id: str
    inputs: dict[str, Any]
    """Redacted, as MLflow and the scorers get them."""
    expectations: dict[str, Any]
    """Redacted."""
    replay: ReplayKind
    calls: list[RecordedCall] | None = None
    recorded: MlflowTrace | None = None
    problem: str | None = None
    """Why it cannot be asked."""


class Evaluation:
    """A checked evaluation, to be run once. Made by `prepare`."""

    def __init__(
        self, settings: Settings, options: Options, predictor: Predictor, dataset: Dataset, selection: Selection
    ):
        self.options = options
        self.dataset = dataset
        self.selection = selection
        self.predictor = predictor
        self._settings = settings
        self._live = {each.name: each for each in selection.all}
        self.notes = [*selection.notes]
        self._planned = self._plan()
        self._by_question = {_canonical(each.inputs["messages"]): each for each in self._planned}
        self.keys = [each.key for each in self._planned]
        """Keys of the cases, in order: what a baseline is compared by."""
        if dataset.passed_over:
            self.notes.append(f"{dataset.passed_over} rows of {dataset.name} are for other agents and are passed over.")

    @property
    def replays(self) -> dict[ReplayKind, int]:
        """How many cases are answered in which way."""
        kinds = [each.replay for each in self._planned]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def params(self) -> dict[str, str]:
        """Return the run's parameters, but for what a gate adds."""
        plugin, model = self.predictor.plugin, self.predictor.model
        chosen = plugin.agent.model_settings
        return {
            "agent": plugin.name,
            "agent_version": plugin.version,
            "assistant_model": model.name,
            "judge_model": ", ".join(self.selection.judge_models) or "none",
            "temperature": _shown(chosen.temperature),
            "max_tokens": _shown(chosen.max_tokens),
            "dataset": self.dataset.name,
            "dataset_version": self.dataset.version,
            "scorers": ", ".join(sorted(self._live)),
            "gateway_version": __version__,
        }

    def run(
        self,
        more_params: Mapping[str, str] | None = None,
        on_answer: Callable[[], None] = lambda: None,
        judges: Judges | None = None,
    ) -> Result:
        """Ask, score and log; return what came of it.

        Args:
            more_params: parameters that are logged as well.
            on_answer: called, in any thread, for each case that was answered or failed.
            judges: through which judges ask; ``None``: directly, and without limits.

        Raises:
            ConfigurationError: MLflow went away meanwhile.
        """
        self._set_environment()
        params = self.params() | {
            "workers": os.environ[_WORKERS],
            "timeout_s": os.environ[_TIMEOUT],
            **(more_params or {}),
        }
        name = self.options.run_name or f"{self.predictor.plugin.name} on {self.dataset.name}"
        try:
            with mlflow.start_run(run_name=name) as run:
                mlflow.log_params(params)
                return self._evaluated(run.info.run_id, params, on_answer, judges)
        except MlflowException as error:
            raise ConfigurationError(f"MLflow failed during the evaluation: {str(error).splitlines()[0]}") from None

    def _evaluated(
        self, run_id: str, params: dict[str, str], on_answer: Callable[[], None], judges: Judges | None
    ) -> Result:
        with contextlib.redirect_stdout(io.StringIO()):  # MLflow prints where its UI would be
            result = mlflow.genai.evaluate(
                data=self._data(),
                predict_fn=self._predict_fn(on_answer),
                scorers=[where_it_applies(each, judges) for each in self.selection.of_traces] or [],
            )
        found = _traces_by_case(result.result_df)
        verdicts = {number: self._verdicts(trace) for number, trace in found.items()}
        for number, more in self._score_conversations(found, run_id, judges).items():
            verdicts[number] += more
        score_from = scorers_of_score(self._live, verdicts.values())
        cases = [
            self._case(each, found.get(each.number), verdicts.get(each.number, []), score_from)
            for each in self._planned
        ]
        own = metrics_of(cases) | (judges.metrics() if judges else {})
        mlflow.log_metrics(own)
        log_cases(run_id, cases)
        has_score = "average_score" in own
        return Result(run_id, params, {**result.metrics, **own}, cases, score_from if has_score else [], self.notes)

    def _set_environment(self) -> None:
        """Say what MLflow reads from its variables; what is set there stays, unless an option says otherwise."""
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        if self.options.workers is not None:
            os.environ[_WORKERS] = str(self.options.workers)
        if self.options.timeout_s is not None:
            os.environ[_TIMEOUT] = str(math.ceil(self.options.timeout_s))
        os.environ.setdefault(_TIMEOUT, str(math.ceil(self._settings.run_timeout_s)))

    def _plan(self) -> list[_Planned]:
        redactor, salt = self.predictor.redactor, uuid.uuid4().hex[:8]
        obstacle = cannot_replay(self.predictor.plugin.agent)
        planned = []
        for number, row in enumerate(self.dataset.rows, start=1):
            # Without a scope, placeholders are the same in every run: so is the key, and it tells nothing of a person.
            key = hashlib.sha256(_canonical(redactor.value(row.messages)).encode()).hexdigest()[:16]
            session_id = f"{salt}-{key}"
            inputs = {"messages": redactor.value(row.messages, session_id)}
            each = _Planned(
                number, row, key, session_id, inputs, redactor.value(row.expectations, session_id), row.replay
            )
            planned.append(each if row.replay == "live" else self._with_recording(each, obstacle))
        return planned

    def _with_recording(self, planned: _Planned, obstacle: str | None) -> _Planned:
        """Return how a row is answered that cannot be asked of the agent and its tools as they are."""
        row, trace = planned.row, read_trace(planned.row.trace_id)
        if row.replay == "recorded_tools":
            if trace is not None and obstacle is None:
                return replace(planned, recorded=trace, calls=recorded_calls(trace))
            why = obstacle or "its trace is not in MLflow any more"
            if row.outputs is None:
                return replace(planned, problem=f"The tools of {row.place} cannot be replayed: {why}.")
            self.notes.append(f"The tools of {row.place} cannot be replayed ({why}): its recorded answer is scored.")
        return replace(planned, replay="recorded_answer", recorded=trace)

    def _data(self) -> pd.DataFrame:
        """Return the rows in MLflow's form, with the identity of the dataset that they are of."""
        data = pd.DataFrame(
            [
                {
                    "inputs": each.inputs,
                    "expectations": each.expectations,
                    "tags": {_CASE_TAG: str(each.number), REPLAY_TAG: each.replay},
                }
                for each in self._planned
            ]
        )
        data.attrs[MLFLOW_GENAI_EVALUATE_DATASET_IDENTITY] = {
            "name": self.dataset.name,
            "digest": self.dataset.version,
            "source_type": self.dataset.source_type,
            "source": self.dataset.source,
            "records_sha256": compute_records_sha256(data),
        }
        return data

    def _predict_fn(self, on_answer: Callable[[], None]) -> Callable[..., Any]:
        async def predict(messages: list[dict[str, Any]]) -> Answer:
            planned = self._by_question[_canonical(messages)]
            try:
                return await self._answer(planned)
            finally:
                on_answer()

        return predict

    async def _answer(self, planned: _Planned) -> Answer:
        row, session_id = planned.row, planned.session_id
        if planned.problem is not None:
            raise RunFailed(planned.problem)
        if planned.replay == "recorded_answer":
            return self.predictor.recall(row.messages, row.outputs, session_id=session_id, recorded=planned.recorded)
        replay = None if planned.calls is None else Replay(planned.calls)
        answer = await self.predictor.predict_async(row.messages, session_id=session_id, replay=replay)
        return dict(self.predictor.redactor.value(answer, session_id))

    def _verdicts(self, trace: MlflowTrace) -> list[Verdict]:
        return [
            self._verdict(each.name, each.feedback.value, each.rationale, each.feedback.error)
            for each in trace.info.assessments
            if each.feedback is not None and each.valid is not False
        ]

    def _verdict(self, name: str, value: Any, rationale: str | None, error: Any) -> Verdict:
        said = None if error is None else str(error.error_message or error.error_code)
        if said is not None:
            return Verdict(name, None, None, rationale, said)
        live = self._live.get(name)
        try:
            # A scorer may name what it says as it likes.
            verdict = (value if isinstance(value, bool) else None) if live is None else passed(live, value)
        except Exception as broken:  # noqa: BLE001 - a scorer's own `pass_if` is anybody's code
            return Verdict(name, value, None, rationale, f"pass_if: {type(broken).__name__}: {broken}")
        return Verdict(name, value, verdict, rationale)

    def _score_conversations(
        self, traces: Mapping[int, MlflowTrace], run_id: str, judges: Judges | None
    ) -> dict[int, list[Verdict]]:
        """Run the scorers of conversations on each case, log what they say, and return it by case."""
        scorers = self.selection.of_conversations
        planned = [each for each in self._planned if each.number in traces]
        if not scorers:
            return {}

        def score(each: _Planned) -> tuple[int, list[Verdict]]:
            last = traces[each.number]
            agent, session_id = self.predictor.plugin.name, each.session_id
            turns = conversation(each.inputs["messages"], last, agent, session_id)
            found = []
            for live in scorers:
                task = conversation_task(live, turns, session_id, agent)
                outcome = judges.run(task) if judges and live.is_judge else task.run()
                for score in outcome.scores:
                    assessment = replace(score, trace_id=last.info.trace_id).assessment(root_of(last).span_id)
                    assessment.metadata[AssessmentMetadataKey.SOURCE_RUN_ID] = run_id
                    mlflow.log_assessment(trace_id=last.info.trace_id, assessment=assessment)
                    found.append(Verdict(score.name, score.value, score.passed, score.rationale, score.error))
            return each.number, found

        with ThreadPoolExecutor(int(os.environ[_WORKERS]), "score-conversations") as threads:
            return dict(threads.map(score, planned))

    def _case(
        self, planned: _Planned, trace: MlflowTrace | None, verdicts: list[Verdict], score_from: Sequence[str]
    ) -> Case:
        error = "MLflow has no trace of it" if trace is None else _failure(trace)
        score = None if error else score_of(verdicts, score_from)
        asked = self.options.score_threshold
        decides = score_decides(score_from, verdicts, is_asked_for=asked is not None)
        threshold = SCORE_THRESHOLD if asked is None else asked
        state, reasons = state_of(error, verdicts, score if decides else None, threshold)
        usage = trace.info.token_usage if trace is not None else None
        return Case(
            number=planned.number,
            key=planned.key,
            place=planned.row.place,
            replay=planned.replay,
            inputs=planned.inputs,
            outputs=None if trace is None else root_of(trace).outputs,
            expectations=planned.expectations,
            state=state,
            reasons=reasons,
            score=score,
            verdicts=sorted(verdicts, key=lambda each: each.name),
            trace_id=None if trace is None else trace.info.trace_id,
            duration_s=None if trace is None else (trace.info.execution_duration or 0) / 1000,
            tokens=(usage or {}).get("total_tokens"),
        )


def prepare(settings: Settings, options: Options) -> Evaluation:
    """Return a checked evaluation on the MLflow that is open (`mlflows.open_experiment`). Nothing is logged.

    Raises:
        ConfigurationError: the agent, the dataset or a scorer is not there, or something in it is wrong.
        AgentNotFound: there is no such agent.
    """
    dataset = read_dataset(options.dataset, options.agent)
    predictor = Predictor(settings, options.agent)
    return Evaluation(settings, options, predictor, dataset, select(settings, options.agent, options.scorers))


def _traces_by_case(results: pd.DataFrame | None) -> dict[int, MlflowTrace]:
    """Return the traces, with all that was said of them, by the number of their case."""
    if results is None:
        return {}
    traces: Iterator[MlflowTrace] = (MlflowTrace.from_json(text) for text in results["trace"])
    return {int(trace.info.tags[_CASE_TAG]): trace for trace in traces if _CASE_TAG in trace.info.tags}


def _failure(trace: MlflowTrace) -> str | None:
    """Return why the run gave no answer; ``None`` if it gave one."""
    root = root_of(trace)
    if str(trace.info.state.value) != "ERROR":
        return None
    for event in root.events:
        if event.name == "exception":
            return f"{event.attributes.get('exception.type')}: {event.attributes.get('exception.message')}"
    return "the run failed"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)
