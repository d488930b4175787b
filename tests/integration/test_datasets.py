"""What rules put into MLflow's datasets: a real Postgres, a real MLflow, traces as the web process hands them over."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from mlflow.entities import AssessmentSource, DatasetRecord, Expectation, Feedback
from mlflow.exceptions import MlflowException

from gateway.commands.datasets import datasets as command
from gateway.crypto import load_keys
from gateway.dataset_rules import DatasetRule
from gateway.errors import ConfigurationError
from gateway.evaluation.datasets import DatasetFeeder
from gateway.evaluation.datasets.conversion import conversation_so_far
from gateway.evaluation.datasets.desk import DatasetDesk
from gateway.evaluation.datasets.replay import replay_of
from gateway.evaluation.datasets.rows import lock
from gateway.evaluation.export import to_mlflow
from gateway.evaluation.records import collect_failed, erased, save_scores
from gateway.evaluation.scoring import Score
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.settings import Settings, sibling_database
from gateway.storage.database import Pool, open_pool
from gateway.storage.erasure import Subject, forget
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Trace, decode

from .evaluating import fill, made, url_of

QUESTIONS = [
    "Where is my parcel for order A-1001?",
    "Can I return a kettle that I have used twice already?",
    "Please send the invoice of last month to my accountant",
    "Do you ship to Norway, and what does it cost?",
    "My grinder makes a strange noise since yesterday",
]
TALKING = """
    INSERT INTO conversations (session_id, agent, last_turn_at, due_at)
    VALUES (%s, 'math', now(), now() + interval '1 hour') RETURNING 1
"""
PERSON = AssessmentSource(source_type="HUMAN", source_id="ann@example.com")


class Bench:
    """An evaluator's datasets on the test's database, with rules that a test may change."""

    def __init__(self, settings: Settings, pool: Pool, store: MlflowStore, rules: dict[str, dict[str, Any]]):
        self.settings = settings
        self.pool = pool
        self.store = store
        self.rules = {name: DatasetRule.model_validate(rule) for name, rule in rules.items()}
        self.redactor = Redactor(load_keys(settings).derive("redaction"))
        self.feeder = self.another_feeder()
        self.desk = DatasetDesk(pool, store, self.redactor, lambda: self.rules)

    def another_feeder(self) -> DatasetFeeder:
        """Return what another evaluator has."""
        return DatasetFeeder(self.pool, self.store, self.redactor, lambda: self.rules)

    async def serve(self, *traces: Trace) -> list[str]:
        """Have the traces in the ledger and in MLflow, redacted, as they are once they were taken in."""
        traces = tuple(self.redactor.trace(trace) for trace in traces)
        trace_ids = await asyncio.to_thread(fill, self.settings, *traces)
        entities = [to_mlflow(trace, self.store.experiment_id, {}) for trace in traces]
        await asyncio.to_thread(self.store.write_traces, entities)
        async with self.pool.connection() as connection:
            await connection.execute("DELETE FROM outbox")
        return trace_ids

    async def score(self, trace_id: str, agent: str = "math", probability: float = 1.0, **said: Any) -> None:
        """Store scores of a trace, and collect what they put into datasets."""
        scores = [_score(trace_id, agent, name, value) for name, value in said.items()]
        async with self.pool.connection() as connection, connection.transaction():
            await erased(connection, [trace_id])
            stored = await save_scores(connection, self.redactor, [("", scores)])
            exists = "UPDATE scores SET inclusion_probability = %s WHERE score_id = ANY(%s)"
            await connection.execute(exists, [probability, [each.score_id for each in stored]])
            await collect_failed(connection, stored, [], trace_id, self.rules)

    async def fail(self, *trace_ids: str) -> None:
        """Have the scorer `good` fail these traces, and merge."""
        for trace_id in trace_ids:
            await self.score(trace_id, good=False)
        await self.feeder.merge_waiting()

    async def look(self) -> None:
        """Look what happened in MLflow, and merge."""
        await self.feeder.look()
        await self.feeder.merge_waiting()

    async def said(self, trace_id: str, assessment: Any) -> None:
        """Have somebody say something of a trace, as MLflow's UI writes it."""
        assessment.trace_id = trace_id
        await asyncio.to_thread(self.store._store.create_assessment, assessment)

    async def forget(self, session: str) -> int:
        """Forget a session, and return how many records went with it."""
        erasure = await forget(self.pool, Subject(session))
        async with self.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT trace_ids FROM erasures WHERE erasure_id = %s", [erasure.erasure_id if erasure else ""]
            )
            [trace_ids] = await cursor.fetchone() or [[]]
        await asyncio.to_thread(self.store.delete_traces, trace_ids)
        return await self.feeder.forget(trace_ids)

    def records(self, dataset: str) -> list[DatasetRecord]:
        """Return the records of a dataset, oldest first."""
        dataset_id = self.store.dataset_id(dataset)
        return self.store.records(dataset_id) if dataset_id else []

    def asked(self, dataset: str) -> list[str]:
        """Return what the user asked last in each record."""
        return sorted(record.inputs["messages"][-1]["content"] for record in self.records(dataset))


def _score(trace_id: str, agent: str, name: str, value: Any) -> Score:
    passed = value if isinstance(value, bool) else None
    return Score(
        score_id=uuid.uuid4().hex, trace_id=trace_id, session_id=None, agent=agent, scorer=name, scorer_version="v7",
        name=name, value=value, passed=passed, rationale=None, error=None, source_type="CODE", source_id=name,
    )  # fmt: skip


def asked(*texts: str, session: str | None = None, **fields: Any) -> Trace:
    """Return the last turn of a conversation in which the user said these."""
    trace = made(session or f"s-{uuid.uuid4().hex[:8]}", texts[-1], **fields)
    history: list[dict[str, Any]] = []
    for text in texts[:-1]:
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": "Let me see."}]
    messages = trace.spans[1].inputs["messages"]
    trace.spans[1].inputs = {"messages": [messages[0], *history, *messages[1:]]}
    return trace


@pytest.fixture
def dataset() -> str:
    """The name of a dataset that no other test has: they share an MLflow."""
    return f"set-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def bench(make_settings: Callable[..., Settings], mlflow_uri: str) -> Callable[..., Any]:
    """Open a bench with rules by name."""

    @asynccontextmanager
    async def opened(rules: dict[str, dict[str, Any]], store: MlflowStore | None = None) -> AsyncIterator[Bench]:
        settings = make_settings(mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}")
        configure_mlflow(settings, mlflow_uri)
        store = store or await asyncio.to_thread(MlflowStore, mlflow_uri, settings.mlflow_experiment)
        async with open_pool(url_of(settings), max_size=8, name="test") as pool:
            yield Bench(settings, pool, store, rules)

    return opened


async def test_a_row_says_where_it_came_from(bench, dataset, rows) -> None:
    """Trace, session, agent and version, scorer and version, value, probabilities and replay stand in its tags."""
    async with bench({dataset: {"scorers": ["good"]}}) as parts:
        [trace_id] = await parts.serve(asked(QUESTIONS[0], session="s-7"))
        rows("UPDATE runs SET inclusion_probability = 0.5 RETURNING 1")
        await parts.score(trace_id, good=False, other=False, probability=0.25)
        await parts.feeder.merge_waiting()
        [record] = parts.records(dataset)
    assert record.inputs == {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
    told = {key: record.tags[key] for key in ("trace_id", "session_id", "agent", "agent_version", "rule", "scorers")}
    assert told == {
        "trace_id": trace_id, "session_id": "s-7", "agent": "math", "agent_version": "v1", "rule": dataset,
        "scorers": "good",
    }  # fmt: skip
    assert (record.tags["score.good"], record.tags["inclusion_probability"]) == ("false", "0.5")
    reason = json.loads(record.tags[f"from.{trace_id}"])["good"]
    assert (reason["scorer"], reason["version"], reason["value"]) == ("good", "v7", False)
    assert reason["probability"] == 0.25
    assert record.tags["gateway.replay"] == "live"
    assert (record.source.source_type.value, record.source.source_data["trace_id"]) == ("TRACE", trace_id)


async def test_a_golden_set_takes_what_passed_everything_named(bench, dataset) -> None:
    """A trace gets in once the last of the named scorers has passed it, and never if one of them failed it."""
    golden = {dataset: {"when": "passed", "scorers": ["good", "quality"], "agents": ["math"]}}
    async with bench(golden) as parts:
        best, worse = await parts.serve(asked(QUESTIONS[0]), asked(QUESTIONS[1]))
        await parts.score(best, good=True, tidy=False)
        await parts.score(worse, good=False)
        await parts.feeder.merge_waiting()
        assert parts.records(dataset) == []
        await parts.score(best, quality=True)
        await parts.score(worse, quality=True)
        await parts.feeder.merge_waiting()
        assert parts.asked(dataset) == [QUESTIONS[0]]


async def test_a_day_takes_no_more_than_its_cap_and_counts_the_rest(bench, dataset, rows) -> None:
    """Beyond the daily cap rows are left out, seen in the overview, and do not come back the next day."""
    async with bench({dataset: {"max_per_day": 2}}) as parts:
        await parts.fail(*await parts.serve(*(asked(text) for text in QUESTIONS)))
        assert len(parts.records(dataset)) == 2
        [overview] = await parts.desk.overviews()
        assert (overview.records, overview.counts.taken_today, overview.counts.capped) == (2, 2, 3)
        rows("UPDATE dataset_rows SET taken_at = taken_at - interval '1 day' RETURNING 1")
        await parts.fail(*await parts.serve(asked("And something else that nobody has asked before")))
        assert len(parts.records(dataset)) == 3


async def test_the_same_question_is_no_second_row(bench, dataset, rows) -> None:
    """Growing history and other punctuation make no new row; another order, another agent and more answers do."""
    question = QUESTIONS[0]
    async with bench({dataset: {}}) as parts:
        first, *others = await parts.serve(
            asked(question, session="s-1"),
            asked(question, question, session="s-1"),
            asked("where is my parcel for order A-1001"),
            asked("Where is my parcel for order A-1002?"),
            asked(question, agent="support"),
            asked(question, session="s-2"),
            asked(f"{question}!", agent="clerk"),
        )
        await parts.fail(first, *others)
        assert parts.asked(dataset) == sorted([question, f"{question}!", "Where is my parcel for order A-1002?"])
        [record] = [each for each in parts.records(dataset) if each.inputs["messages"][-1]["content"] == question]
        assert {f"from.{first}", f"from.{others[3]}", f"from.{others[4]}"} <= set(record.tags)
        assert rows("SELECT trace_id, similar_to FROM dataset_rows WHERE skipped = 'similar' ORDER BY created_at") == [
            (others[0], first), (others[1], first)
        ]  # fmt: skip


async def test_a_repeated_failure_is_written_once(bench, dataset) -> None:
    """Of one question that fails again and again in the same words, a row tells of some traces, not of all."""
    async with bench({dataset: {}}) as parts:
        await parts.fail(*await parts.serve(*(asked(QUESTIONS[0]) for _ in range(25))))
        [record] = parts.records(dataset)
        assert len([tag for tag in record.tags if tag.startswith("from.")]) == 20
        [overview] = await parts.desk.overviews()
        assert (overview.counts.taken, overview.counts.similar) == (20, 5)


async def test_what_was_like_a_forgotten_row_takes_its_place(bench, dataset) -> None:
    """With the row that it was left out for, a near-duplicate of somebody else is no duplicate any more."""
    async with bench({dataset: {}}) as parts:
        first, second = await parts.serve(asked(QUESTIONS[0], session="s-1"), asked(QUESTIONS[0] + "!!", session="s-2"))
        await parts.fail(first, second)
        assert parts.asked(dataset) == [QUESTIONS[0]]
        assert await parts.forget("s-1") == 1
        await parts.feeder.merge_waiting()
        [record] = parts.records(dataset)
        assert record.inputs["messages"][-1]["content"] == QUESTIONS[0] + "!!"
        assert record.tags["trace_id"] == second
        assert await parts.forget("s-2") == 1
        assert parts.records(dataset) == []


async def test_a_whole_session_comes_when_it_is_over(bench, dataset, rows) -> None:
    """Every turn becomes a row that belongs to the others, but not before the conversation has ended."""
    async with bench({dataset: {"whole_session": True}}) as parts:
        turns = [QUESTIONS[:1], QUESTIONS[:2], QUESTIONS[:3]]
        traces = await parts.serve(*(asked(*turn, session="s-1") for turn in turns))
        rows(TALKING, "s-1")
        await parts.fail(traces[1])
        assert parts.records(dataset) == []
        rows("UPDATE conversations SET due_at = NULL RETURNING 1")
        await parts.feeder.merge_waiting()
        records = {record.tags["trace_id"]: record for record in parts.records(dataset)}
        assert set(records) == set(traces)
        assert [records[each].tags.get("whole_session_of") for each in traces] == [traces[1], None, traces[1]]
        assert [len(records[each].inputs["messages"]) for each in traces] == [1, 3, 5]
        assert await parts.forget("s-1") == 3
        assert parts.records(dataset) == []


async def test_a_golden_session_is_golden_to_the_end(bench, dataset, rows) -> None:
    """A conversation that began well and failed later is in no golden set."""
    golden = {dataset: {"when": "passed", "scorers": ["good"], "whole_session": True}}
    async with bench(golden) as parts:
        traces = await parts.serve(
            asked(QUESTIONS[0], session="s-1"), asked(*QUESTIONS[:2], session="s-1"), asked(QUESTIONS[3], session="s-2")
        )
        rows(TALKING, "s-1")
        await parts.score(traces[0], good=True)
        await parts.score(traces[1], good=False)
        await parts.score(traces[2], good=True)
        rows("UPDATE conversations SET due_at = NULL RETURNING 1")
        await parts.feeder.merge_waiting()
        assert parts.asked(dataset) == [QUESTIONS[3]]


async def test_what_people_say_puts_traces_in_and_comes_along(bench, dataset) -> None:
    """A thumb down is taken, and no program's word is; what a person expected stands in the row, redacted, as HUMAN."""
    corrected = f"{dataset} corrected"
    rules = {dataset: {"from": "feedback", "names": ["thumbs"]}, corrected: {"from": "feedback", "when": "corrected"}}
    async with bench(rules) as parts:
        bad, good, judged = await parts.serve(*(asked(text) for text in QUESTIONS[:3]))
        wish = "Write to ann@example.com"
        await parts.said(bad, Feedback("thumbs", value=False, source=PERSON, rationale=f"{wish}, please"))
        await parts.said(bad, Expectation("expected_response", wish, source=PERSON))
        await parts.said(good, Feedback("thumbs", value=True, source=PERSON))
        judge = AssessmentSource(source_type="LLM_JUDGE", source_id="gpt")
        await parts.said(judged, Feedback("thumbs", value=False, source=judge))
        program = AssessmentSource(source_type="CODE", source_id="nightly")
        await parts.said(good, Expectation("expected_response", "Yes.", source=program))
        await parts.look()
        [record] = parts.records(dataset)
        assert parts.asked(corrected) == [QUESTIONS[0]]
    assert record.tags["trace_id"] == bad
    assert record.source.source_type.value == "HUMAN"
    assert record.expectations["expected_response"].startswith("Write to <EMAIL:")
    feedback, expectation = (
        json.loads(record.tags[tag]) for tag in ("feedback.thumbs", "expectation.expected_response")
    )
    assert (feedback["value"], feedback["source"], feedback["trace_id"]) == (False, "HUMAN", bad)
    assert expectation["source"] == "HUMAN"
    assert "ann@" not in str(record)


async def test_a_row_that_is_there_learns_what_a_person_expected(bench, dataset) -> None:
    """Said later, an expectation comes into the row that a score had put there, and what is in the row stays."""
    async with bench({dataset: {}}) as parts:
        [trace_id] = await parts.serve(asked(QUESTIONS[0]))
        await parts.fail(trace_id)
        [before] = parts.records(dataset)
        parts.store.merge_records(dataset, [{"inputs": before.inputs, "tags": {"reviewed": "yes"}}])
        await parts.said(trace_id, Expectation("expected_response", "Tomorrow.", source=PERSON))
        await parts.look()
        [record] = parts.records(dataset)
        await parts.look()
        assert [each.dataset_record_id for each in parts.records(dataset)] == [record.dataset_record_id]
    assert record.source.source_type.value == "HUMAN"
    assert record.expectations == {"expected_response": "Tomorrow."}
    assert (record.tags["reviewed"], record.tags["score.good"]) == ("yes", "false")


class OnlySearch:
    """A tracking store that can be asked as one behind a server can: by its public methods alone."""

    def __init__(self, store: Any):
        self._of = store

    def __getattr__(self, name: str) -> Any:
        """Pass everything on but what is no method of every store."""
        if name == "ManagedSessionMaker":
            raise AttributeError(name)
        return getattr(self._of, name)


@pytest.mark.parametrize("names", [["thumbs"], None])
async def test_what_people_say_is_found_without_the_database(bench, dataset, mlflow_uri, names) -> None:
    """Where MLflow can only be searched, named feedback is searched for; without names the newest traces are read."""
    async with bench({dataset: {"from": "feedback"} | ({"names": names} if names else {})}) as parts:
        parts.store._store = OnlySearch(parts.store._store)
        bad, _ = await parts.serve(asked(QUESTIONS[0]), asked(QUESTIONS[1]))
        await parts.said(bad, Feedback("thumbs", value=False, source=PERSON))
        await parts.look()
        assert parts.asked(dataset) == [QUESTIONS[0]]
        parts.rules = {}
        await parts.said(bad, Expectation("expected_response", "Here.", source=PERSON))
        await parts.look()
        assert parts.records(dataset)[0].expectations == {"expected_response": "Here."}


async def test_tags_put_traces_in_and_narrow_other_rules(bench, dataset) -> None:
    """A tag that somebody set in MLflow is enough for a rule about tags, and a rule about scores may want it, too."""
    wanted = {"review": "yes"}
    rules = {f"{dataset} tagged": {"from": "tags", "tags": wanted}, dataset: {"tags": wanted}}
    async with bench(rules) as parts:
        traces = await parts.serve(*(asked(text) for text in QUESTIONS[:3]))
        await asyncio.to_thread(parts.store.tag_traces, {traces[0]: wanted, traces[1]: wanted})
        await parts.fail(traces[0], traces[2])
        await parts.look()
        assert parts.asked(f"{dataset} tagged") == sorted(QUESTIONS[:2])
        assert parts.asked(dataset) == QUESTIONS[:1]


async def test_merges_at_the_same_moment_lose_nothing(bench, dataset) -> None:
    """One at a time merges; with somebody who writes equal rows by himself, every row and all provenance is there."""
    async with bench({dataset: {"similar_at_least": False, "max_per_day": False}}) as parts:
        texts = [f"Question number {number}" for number in range(30)]
        traces = await parts.serve(*(asked(text) for text in texts))
        for trace_id in traces:
            await parts.score(trace_id, good=False)
        parts.store.merge_records(dataset, [{"inputs": {"messages": []}}])
        async with parts.pool.connection() as other, other.transaction():
            await lock(other, dataset)
            await parts.feeder.merge_waiting()
            assert len(parts.records(dataset)) == 1
        stopped = asyncio.Event()

        async def meddle() -> None:
            while not stopped.is_set():
                for text in texts:
                    row = {"inputs": {"messages": [{"role": "user", "content": text}]}, "tags": {"mine": "yes"}}
                    with suppress(MlflowException):  # a batch of his that is lost, not ours
                        await asyncio.to_thread(parts.store.merge_records, dataset, [row])

        meddling = asyncio.create_task(meddle())
        others = [parts.another_feeder() for _ in range(2)]
        await asyncio.gather(parts.feeder.merge_waiting(), *(each.merge_waiting() for each in others))
        stopped.set()
        await meddling
        await parts.feeder.merge_waiting()
        origins = {tag for record in parts.records(dataset) for tag in record.tags or {} if tag.startswith("from.")}
        assert origins == {f"from.{trace_id}" for trace_id in traces}


class Interrupted(MlflowStore):
    """The real store, during whose next merge something else happens."""

    meanwhile: Callable[[], None] | None = None

    def merge_records(self, dataset: str, records: list[dict[str, Any]]) -> None:
        """Merge, after what happens meanwhile."""
        happens, self.meanwhile = self.meanwhile, None
        if happens:
            happens()
        super().merge_records(dataset, records)


async def test_a_reason_that_comes_during_a_merge_is_not_lost(bench, dataset) -> None:
    """A judge's verdict that is noted while MLflow takes its time waits for nobody, and is merged after."""
    async with bench({dataset: {}}) as parts:
        parts.store.__class__ = Interrupted
        [trace_id] = await parts.serve(asked(QUESTIONS[0]))
        loop = asyncio.get_running_loop()
        judged = parts.score(trace_id, judge=False)
        parts.store.meanwhile = lambda: asyncio.run_coroutine_threadsafe(judged, loop).result(30)
        await parts.fail(trace_id)
        await parts.feeder.merge_waiting()
        [record] = parts.records(dataset)
        assert record.tags["scorers"] == "good, judge"


class Refusing(MlflowStore):
    """The real store, which refuses one trace's record, with an error of the test's."""

    refused = ""
    error = ""

    def merge_records(self, dataset: str, records: list[dict[str, Any]]) -> None:
        """Merge, unless the one is among them."""
        if any(self.refused == each["tags"]["trace_id"] for each in records):
            raise MlflowException(self.error)
        super().merge_records(dataset, records)


@pytest.mark.parametrize(
    ("error", "waits"), [("not valid", False), ('duplicate key value violates unique constraint "x"', True)]
)
async def test_one_row_that_mlflow_refuses_holds_up_no_other(bench, dataset, rows, error, waits) -> None:
    """A batch that is refused goes in row by row; a refused row is counted, one that met another writer waits."""
    async with bench({dataset: {}}) as parts:
        parts.store.__class__ = Refusing
        traces = await parts.serve(*(asked(text) for text in QUESTIONS[:3]))
        parts.store.refused, parts.store.error = traces[1], error
        await parts.fail(*traces)
        assert parts.asked(dataset) == sorted([QUESTIONS[0], QUESTIONS[2]])
        [skipped] = rows("SELECT skipped, merged_at IS NULL FROM dataset_rows WHERE trace_id = %s", traces[1])
        assert skipped == ((None, True) if waits else ("refused by MLflow", False))
        parts.store.refused = ""
        await parts.feeder.merge_waiting()
        assert len(parts.records(dataset)) == 2 + waits


async def test_what_a_forgotten_person_wanted_goes_too(bench, dataset, rows, mlflow_uri) -> None:
    """Of a row of two traces, what people said of the forgotten one is taken out; what was written into it stays."""
    async with bench({dataset: {}}) as parts:
        gone, kept = await parts.serve(asked(QUESTIONS[0], session="s-1"), asked(QUESTIONS[0], session="s-2"))
        await parts.said(gone, Expectation("expected_response", "zanzibarine", source=PERSON))
        await parts.said(gone, Feedback("thumbs", value=False, source=PERSON, rationale="zanzibarine"))
        await parts.fail(gone, kept)
        [record] = parts.records(dataset)
        assert str(record).count("zanzibarine") == 2
        parts.store.merge_records(dataset, [{"inputs": record.inputs, "expectations": {"guidelines": ["Be kind"]}}])
        assert await parts.forget("s-1") == 0
        await parts.feeder.merge_waiting()
        [record] = parts.records(dataset)
    assert record.expectations == {"guidelines": ["Be kind"]}
    assert "zanzibarine" not in str(record)
    assert gone not in str(record)
    assert record.tags["trace_id"] == kept
    assert rows("SELECT count(*) FROM dataset_rows WHERE trace_id = %s", gone) == [(0,)]


async def test_a_store_of_files_is_told_once_and_holds_up_no_erasure(bench, dataset, tmp_path, monkeypatch) -> None:
    """Where MLflow keeps files there are no datasets: rows wait, the log says once what to do, and forgetting works."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    async with bench({dataset: {}}) as parts:
        [trace_id] = await parts.serve(asked(QUESTIONS[0], session="s-1"))
        await parts.score(trace_id, good=False)
        files = MlflowStore((tmp_path / "mlruns").as_uri(), "test")
        files.read_traces = parts.store.read_traces  # type: ignore[method-assign]
        feeder = DatasetFeeder(parts.pool, files, None, lambda: parts.rules)
        with structlog.testing.capture_logs() as logs:
            await feeder.merge_waiting()
            await feeder.merge_waiting()
        [problem] = [log["problem"] for log in logs if "problem" in log]
        assert "backend-store-uri sqlite" in problem
        [overview] = [each for each in await parts.desk.overviews() if each.name == dataset]
        assert overview.counts.waiting == 1
        assert await feeder.forget([trace_id]) == 0
        assert await parts.desk.overviews() == []


@pytest.fixture
def gateway(
    make_settings: Callable[..., Settings], mlflow_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., None]:
    """Run `gateway datasets` in this process, on the test's database."""
    (tmp_path / "empty.toml").touch()
    settings = make_settings()
    for name, value in {
        "GATEWAY_CONFIG": tmp_path / "empty.toml",
        "GATEWAY_DATABASE_URL": url_of(settings),
        "GATEWAY_HOME": settings.home,
        "GATEWAY_SECRET_KEY": "a secret key for tests only",
        "GATEWAY_MLFLOW_TRACKING_URI": mlflow_uri,
        "GATEWAY_MLFLOW_EXPERIMENT": f"test-{uuid.uuid4().hex[:8]}",
    }.items():
        monkeypatch.setenv(name, str(value))

    def run(*arguments: str) -> None:
        command(arguments, exit_on_error=False, print_error=False, result_action="return_value")

    return run


async def test_a_customer_that_a_tool_looked_up_cannot_be_asked_for_again(serve, bench, make_settings, rows) -> None:
    """In a real conversation, the turn in which an address went into a tool wants recorded results; no other does."""
    session = f"s-{uuid.uuid4().hex[:8]}"
    async with serve(make_settings()) as client:
        for text in ("Can you list my orders?", "I ordered with leila.marchetti@example.com", "Where is A-1009?"):
            body = {"agent": "support", "input": text, "session_id": session}
            assert (await client.post("/invocations", json=body)).status_code == 200
    async with bench({}) as parts:
        cipher = load_keys(parts.settings).outbox
        stored = rows("SELECT payload, trace_id FROM outbox JOIN runs USING (trace_id) ORDER BY started_at")
        traces = [decode(cipher.decrypt(payload, trace_id)) for payload, trace_id in stored]
        entities = [to_mlflow(trace, parts.store.experiment_id, {}) for trace in traces]
    found = [replay_of(each, {"messages": conversation_so_far(each)}) for each in entities]
    assert [each.mode for each in found] == ["live", "recorded_tools", "live"]
    assert str(found[1].because).startswith("list_orders was called with <EMAIL:")


def test_rows_go_out_and_come_in_again(gateway, dataset, tmp_path, capsys, rows) -> None:
    """What is imported is redacted, of the kind that was said, the same once more, and the same when exported."""
    golden = tmp_path / "golden.jsonl"
    lines: Sequence[dict[str, Any]] = [
        {"question": "What is 2 + 3?", "expected_response": "5"},
        {"question": "List my orders, I am ann@example.com", "outputs": "None.", "tags": {"kind": "orders"}},
    ]
    golden.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        gateway("import", dataset, str(golden))
    told = capsys.readouterr().err
    assert "2 rows" in told
    assert "1 rows cannot be asked as they stand" in told
    gateway("list", "--json")
    [overview] = json.loads(capsys.readouterr().out)
    assert (overview["name"], overview["records"], overview["expected"]) == (dataset, 2, 1)
    assert (overview["sources"], overview["replays"]) == ({"DOCUMENT": 2}, {"live": 1, "recorded_answer": 1})
    exported = tmp_path / "out.csv"
    gateway("export", dataset, str(exported))
    gateway("import", f"{dataset} again", str(exported), "--source", "code")
    gateway("export", f"{dataset} again")
    [first, second] = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda row: "outputs" in row)
    assert (first["expectations"], first["source"]["source_type"]) == ({"expected_response": "5"}, "CODE")
    assert second["inputs"]["messages"][0]["content"].startswith("List my orders, I am <EMAIL:")
    assert (second["tags"]["kind"], second["tags"]["gateway.replay"]) == ("orders", "recorded_answer")
    gateway("annotate", dataset, _row(gateway, capsys, dataset), "--expect", 'expected_facts=["5"]', "--by", "ann")
    gateway("show", dataset, "--json")
    assert '"expected_facts"' in capsys.readouterr().out


def _row(gateway: Callable[..., None], capsys: Any, dataset: str) -> str:
    gateway("show", dataset, "--json")
    return str(json.loads(capsys.readouterr().out)[0]["dataset_record_id"])


def test_wrong_usage_is_told_plainly(gateway, tmp_path, monkeypatch) -> None:
    """Each mistake is one message that says what is wanted; so is an MLflow that has no datasets."""
    for arguments, said in [
        (["show", "nothing like it"], "MLflow has no dataset"),
        (["show", "x", "--limit", "0"], "give 1 or more"),
        (["export", "x", "rows.txt"], "ends in .csv or .jsonl"),
        (["annotate", "x", "dr-1"], "Give a row together with --expect"),
        (["annotate", "x", "dr-1", "--expect", "42"], "give a name and a value"),
        (["annotate", "x", "dr-1", "--expect", "a=[4"], "not JSON"),
        (["import", "it's", "rows.jsonl"], "letters, digits"),
    ]:
        with pytest.raises(ConfigurationError, match=said):
            gateway(*arguments)
    monkeypatch.setenv("GATEWAY_MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for allowed in ("false", "true"):
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", allowed)
        with pytest.raises(ConfigurationError, match="backend-store-uri sqlite"):
            gateway("list")


async def test_a_person_says_of_a_live_row_what_was_right(bench, dataset, rows) -> None:
    """An expectation given at the command line is on the trace in MLflow, and in the row, as that person's."""
    async with bench({dataset: {}}) as parts:
        [trace_id] = await parts.serve(asked(QUESTIONS[0]))
        await parts.fail(trace_id)
        for _ in range(2):
            await parts.desk.expect(dataset, trace_id, {"expected_response": "Call +49 30 1234567"}, "ann")
        [record] = parts.records(dataset)
        [trace] = parts.store.read_traces([trace_id])
        with pytest.raises(ConfigurationError, match="no row"):
            await parts.desk.expect(dataset, "dr-1", {"a": "b"}, "ann")
    [expectation] = [each for each in trace.info.assessments if each.expectation]
    assert (expectation.source.source_type, expectation.source.source_id) == ("HUMAN", "ann")
    assert record.expectations == {"expected_response": expectation.value}
    assert "1234567" not in str(record)
    assert record.source.source_type.value == "HUMAN"


async def test_nothing_forgotten_comes_back_from_a_file(bench, dataset) -> None:
    """A row that was exported before its conversation was forgotten is not taken in again."""
    async with bench({dataset: {}}) as parts:
        gone, kept = await parts.serve(asked(QUESTIONS[0], session="s-1"), asked(QUESTIONS[1], session="s-2"))
        await parts.fail(gone, kept)
        exported = [{"inputs": each.inputs, "tags": each.tags} for each in parts.records(dataset)]
        await parts.forget("s-1")
        assert await parts.desk.put(f"{dataset} again", exported) == 1
        assert parts.asked(f"{dataset} again") == [QUESTIONS[1]]


def test_the_database_as_it_was_is_taken_over(postgres_url: str) -> None:
    """Rows of an earlier version count as taken, and the way back gives the table as it was."""
    from alembic import command as alembic  # noqa: PLC0415
    from sqlalchemy import create_engine  # noqa: PLC0415

    from gateway.settings import sqlalchemy_url  # noqa: PLC0415
    from gateway.storage.database import alembic_config  # noqa: PLC0415

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE gateway")
    url = sibling_database(postgres_url, name)
    engine = create_engine(sqlalchemy_url(url))
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        alembic.downgrade(config, "0004")
        connection.exec_driver_sql(
            "INSERT INTO dataset_rows (dataset, trace_id, scorers, merged_at) VALUES ('d', 't', '{}', now())"
        )
        alembic.upgrade(config, "head")
    engine.dispose()
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT taken_at IS NOT NULL, provenance FROM dataset_rows").fetchall()
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert found == [(True, {})]
