"""An evaluator that is interrupted wherever it commits loses no score and doubles none. Real Postgres, real MLflow."""

import asyncio
import json
import re
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.evaluation.claims import PRESENCE_LOCK
from gateway.settings import Settings
from gateway.testing import HttpError, ScriptedOpenAI
from gateway.tracing.spans import Trace

from .crashing import Children, Commits, Order, steps, work
from .evaluating import Parts, evaluator, fill, made, url_of

Rows = Callable[..., list[tuple[Any, ...]]]
SCORERS = """
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import scorer

polite = make_judge(name="polite", instructions="Is {{ inputs }} polite?", feedback_value_type=bool)
calm = make_judge(name="calm", instructions="Is {{ conversation }} calm?", feedback_value_type=bool)

@scorer
def short(outputs):
    return len(str(outputs)) < 1000

@scorer
def tidy(outputs):
    return True

@scorer
def turns(session):
    return len(session)
"""
EXPECTED = {
    "scores": {  # place, scorer, turns: value, whether it is the latest, whether MLflow says the same, and as valid
        ("plain", "short", None): [(True, True, True, True)],
        ("plain", "tidy", None): [(True, True, True, True)],
        ("judged", "short", None): [(True, True, True, True)],
        ("judged", "tidy", None): [(True, True, True, True)],
        ("judged", "polite", None): [(True, True, True, True)],
        ("first", "short", None): [(True, True, True, True)],
        ("first", "tidy", None): [(True, True, True, True)],
        ("first", "turns", 1): [(1, False, True, False)],
        ("first", "turns", 2): [(2, True, True, True)],
        ("first", "calm", 1): [(True, False, True, False)],
        ("first", "calm", 2): [(True, True, True, True)],
        ("second", "short", None): [(True, True, True, True)],
        ("second", "tidy", None): [(True, True, True, True)],
    },
    "runs": {
        "plain": ("scored", 2),
        "judged": ("scored", 3),
        "first": ("scored", 2),
        "second": ("scored", 2),
    },
    "scorings": {
        ("first", "calm", 1): ("scored", None),
        ("first", "calm", 2): ("scored", None),
        ("judged", "polite", 0): ("scored", None),
    },
    "in MLflow alone": [],
    "waiting": [(0, False)],
}


@dataclass
class Case:
    """The three subjects of one interruption: two traces, and a conversation of two turns."""

    at: int = 0
    late: bool = False
    session: str = field(default_factory=lambda: f"s-{uuid.uuid4().hex}")
    """The conversation's."""
    traces: dict[str, Trace] = field(default_factory=dict)
    """By place."""

    @property
    def label(self) -> str:
        """What its texts bear."""
        return f"{self.at}{'late' if self.late else 'early'}"

    def made(self, place: str, session: str, agent: str = "math") -> Trace:
        """Make the trace at a place."""
        self.traces[place] = made(session, f"{place}:{self.label}", agent=agent)
        return self.traces[place]

    def first_turn(self) -> Trace:
        """Make what is scored before the interruption."""
        return self.made("first", self.session)

    def subjects(self) -> list[Trace]:
        """Make what is being scored at the interruption."""
        plain = self.made("plain", f"plain-{self.label}")
        judged = self.made("judged", f"judged-{self.label}", "support")
        return [plain, judged, self.made("second", self.session)]


class Judge:
    """Says yes, each time in other words, and counts by the text that it is asked about."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.refusals = 0
        """How many of the next calls it refuses for good."""

    def __call__(self, body: dict[str, Any]) -> str | HttpError:
        *_, about = re.findall(r"(?:first|second|judged):\w+", json.dumps(body["messages"]))
        self.asked[about] += 1
        if self.refusals:
            self.refusals -= 1
            return HttpError(400, "no such model")
        return json.dumps({"result": True, "rationale": f"asked {self.asked.total()} times"})


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """Where evaluators come from that die."""
    with Children() as children:
        yield children


@pytest.fixture
def judge() -> Judge:
    """The judge of the test."""
    return Judge()


@pytest.fixture
def settings(
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
) -> Iterator[Settings]:
    """Settings with two judges and three scorers in plain code, of traces and of conversations."""
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("GATEWAY_CONFIG", str(tmp_path / "empty.toml"))
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "all.py").write_text(SCORERS)
    with ScriptedOpenAI(judge) as server:
        yield make_settings(
            scorers_dir=tmp_path / "scorers",
            scorers={"polite": {"agents": ["support"]}},
            mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}",
            judge_model="openai:/judge-1",
            judge_base_url=server.url,
            judge_api_key="sk-judge",
            judge_concurrency=1,  # so that the commits have one order
            quiet_period_s=0.001,
        )


async def first_turns(parts: Parts, cases: list[Case]) -> None:
    """Have the conversations scored that go on at the interruption."""
    fill(parts.settings, *(case.first_turn() for case in cases))
    await parts.intake.drain()
    for case in cases:
        await parts.conversations.score(case.session)
    await parts.worker.work_off()


async def alone(rows: Rows) -> None:
    """Wait until one evaluator is alive: Postgres has yet to see that a dead one's connections are gone."""
    async with asyncio.timeout(20):
        while rows(ALIVE, PRESENCE_LOCK) != [(1,)]:  # noqa: ASYNC110 - another process' doing
            await asyncio.sleep(0.005)


def is_stored(rows: Rows, case: Case) -> dict[str, bool]:
    """Return whether the judges' verdicts are stored, by the text that they were asked about."""
    said = {scorer for (scorer,) in rows(VERDICTS, case.traces["judged"].trace_id, case.session)}
    return {f"judged:{case.label}": "polite" in said, f"second:{case.label}": "calm" in said}


def state_of(parts: Parts, rows: Rows, case: Case) -> dict[str, Any]:
    """Return what there is of a case in the databases, in the form of `EXPECTED`."""
    places = {trace.trace_id: place for place, trace in case.traces.items()}
    ids = list(places)
    there = {each.assessment_id: each for trace in parts.store.read_traces(ids) for each in trace.info.assessments}
    scores: dict[tuple[Any, ...], list[Any]] = {}
    for score_id, trace_id, scorer, turns, value, latest, rationale in rows(SCORES, ids):
        found = there.pop(score_id, None)
        is_same = found is not None and (found.feedback.value, found.rationale) == (value, rationale)
        valid = found.valid is not False if found else None
        scores.setdefault((places[trace_id], scorer, turns), []).append((value, latest, is_same, valid))
    return {
        "scores": scores,
        "runs": {places[trace_id]: (state, scored_by) for trace_id, state, scored_by in rows(RUNS, ids)},
        "scorings": {(places[trace_id], *key): (*end,) for trace_id, *key, end in rows(SCORINGS, ids)},
        "in MLflow alone": [each.name for each in there.values()],
        "waiting": rows(WAITING, ids, case.session),
    }


def wrong(found: dict[str, Any], expected: dict[str, Any] = EXPECTED) -> dict[str, Any]:
    """Return what is not as expected: found, and expected."""
    return {
        part: {key: (found[part].get(key), each) for key, each in wanted.items() if found[part].get(key) != each}
        if isinstance(wanted, dict) and found[part].keys() <= wanted.keys()
        else (found[part], wanted)
        for part, wanted in expected.items()
        if found[part] != wanted
    }


def asked_in_vain(judge: Judge, before: Counter[str], kept: dict[str, bool]) -> list[str]:
    """Return what a judge was asked about in vain: its verdict was there, or it was asked a third time."""
    return [text for text, there in kept.items() if judge.asked[text] > (before[text] if there else 2)]


@pytest.mark.timeout(900)  # many processes, which a busy machine holds up
async def test_an_evaluator_that_dies_at_any_commit_leaves_another_what_it_takes_to_finish(
    settings, judge, mlflow_uri, rows, children
) -> None:
    """Killed before each commit; once another has taken over, every score is there once, and in MLflow once.

    After a commit there is what there is before the next one, unless a judge is asked in between: so it is killed
    there only where scorings were claimed, and at the end.
    """
    found = {}
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        none = Case()
        await first_turns(parts, [none])
        fill(settings, *none.subjects())
        status, commits = await asyncio.to_thread(children.run, Order(settings, mlflow_uri, none.session, 0))
        assert (status, wrong(state_of(parts, rows, none))) == (0, {})
        changing = [(at, commit.name) for at, commit in enumerate(commits, 1) if commit.changes]
        cases = [Case(at) for at, _ in changing]
        cases += [Case(at, late=True) for at, name in changing if name == "COMMIT of UPDATE scorings"]
        await first_turns(parts, cases)
        for case in cases:
            fill(settings, *case.subjects())
            order = Order(settings, mlflow_uri, case.session, case.at, case.late)
            assert await asyncio.to_thread(children.run, order) == (-signal.SIGKILL, [])
            await alone(rows)
            kept, before = is_stored(rows, case), judge.asked.copy()
            await work(parts, case.session)
            if what := wrong(state_of(parts, rows, case)) or asked_in_vain(judge, before, kept):
                found[case.label, commits[case.at - 1].name] = what
    assert len(cases) >= 20
    assert found == {}


@pytest.mark.timeout(900)
async def test_an_evaluator_that_loses_its_connection_at_any_commit_recovers(settings, judge, mlflow_uri, rows) -> None:
    """Cut off before each commit, or before its answer, once a step; tried again, each score is there once."""

    def cut(process: int) -> None:
        with psycopg.connect(url_of(settings), autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 20000)", [process])

    found = {}
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        none, counted = Case(), [Commits(cut) for _ in range(3)]
        await first_turns(parts, [none])
        fill(settings, *none.subjects())
        for commits, step in zip(counted, steps(parts, none.session), strict=True):
            with commits.counted():
                await step()
        assert wrong(state_of(parts, rows, none)) == {}
        changing = [[at for at, each in enumerate(commits.found, 1) if each.changes] for commits in counted]
        together = list(zip_longest(*changing, fillvalue=0))
        cases = [Case(nth, late) for nth in range(len(together)) for late in (False, True)]
        await first_turns(parts, cases)
        for case in cases:
            fill(settings, *case.subjects())
            for at, step in zip(together[case.at], steps(parts, case.session), strict=True):
                commits = Commits(cut, at, late=case.late)
                with commits.counted(), suppress(psycopg.OperationalError):
                    await step()
                assert len(commits.found) >= at
                kept, before = is_stored(rows, case), judge.asked.copy()
                rows(TRY_AGAIN)
                await step()
            if what := wrong(state_of(parts, rows, case)) or asked_in_vain(judge, before, kept):
                found[case.label, together[case.at]] = what
    assert len(together) >= 9
    assert found == {}


@pytest.mark.parametrize("judged", [False, True])
async def test_a_verdict_that_a_dead_evaluator_kept_from_mlflow_holds_up_no_later_one(
    settings, mlflow_uri, rows, children, judged
) -> None:
    """Dead before MLflow had a conversation's verdict, which then goes on: MLflow gets both, the later one as valid."""
    case = Case()
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        fill(settings, case.first_turn())
        order = Order(settings, mlflow_uri, case.session, 2 if judged else 1, of="INSERT INTO assessments")
        assert await asyncio.to_thread(children.run, order) == (-signal.SIGKILL, [])
        await alone(rows)
        fill(settings, case.made("second", case.session))
        await work(parts, case.session)
        found = state_of(parts, rows, case)
    assert {key: each for key, each in found["scores"].items() if key[2]} == {
        key: each
        for key, each in EXPECTED["scores"].items()
        if key
        in {("first", "turns", 1), ("first", "turns", 2), ("first", "calm", 2)}
        | ({("first", "calm", 1)} if judged else set())
    }
    assert found["waiting"] == [(0, False)]


async def test_a_failure_that_a_dead_evaluator_kept_from_mlflow_holds_up_no_verdict(
    settings, judge, mlflow_uri, rows, children
) -> None:
    """A judge that failed before the death and answers after it: the verdict counts, here and in MLflow."""
    case, judge.refusals = Case(), 1
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        fill(settings, case.made("judged", "nobody ends it", "support"))
        order = Order(settings, mlflow_uri, case.session, 1, of="INSERT INTO assessments")
        assert await asyncio.to_thread(children.run, order) == (-signal.SIGKILL, [])
        await alone(rows)
        await work(parts, case.session)
        found = state_of(parts, rows, case)
    assert found["scores"]["judged", "polite", None] == [(None, False, True, False), (True, True, True, True)]
    assert (found["runs"], found["scorings"]) == (
        {"judged": EXPECTED["runs"]["judged"]},
        {("judged", "polite", 0): ("scored", None)},
    )


@pytest.mark.parametrize("fails", ["first", "last"])
async def test_a_scorer_that_changes_its_mind_after_a_death_has_said_one_thing(
    settings, mlflow_uri, rows, children, fails
) -> None:
    """Asked again since its evaluator died, a scorer in plain code has one score that counts, the same in MLflow."""
    case, mark = Case(), settings.scorers_dir / "asked before"
    (settings.scorers_dir / "moody.py").write_text(MOODY.format(mark=str(mark), fails_again=fails == "last"))
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        fill(settings, case.made("plain", "nobody ends it"))
        order = Order(settings, mlflow_uri, case.session, 1, of="UPDATE trace_info")
        assert await asyncio.to_thread(children.run, order) == (-signal.SIGKILL, [])
        await alone(rows)
        await work(parts, case.session)
        [trace] = parts.store.read_traces([case.traces["plain"].trace_id])
    said = [score_id for (score_id,) in rows("SELECT score_id FROM scores WHERE scorer = 'moody' AND latest")]
    shown = [each for each in trace.info.assessments if each.name == "moody" and each.valid is not False]
    assert mark.exists()
    assert (len(said), said) == (1, [each.assessment_id for each in shown])


MOODY = """
from pathlib import Path
from mlflow.genai.scorers import scorer

@scorer
def moody(outputs):
    mark = Path({mark!r})
    again = mark.exists()
    mark.touch()
    if again == {fails_again}:
        raise ValueError("not now")
    return True
"""
ALIVE = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND objsubid = 2 AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
VERDICTS = """
    SELECT scorer FROM scores
    WHERE (trace_id = %s AND scorer = 'polite') OR (session_id = %s AND turns = 2 AND scorer = 'calm')
"""
SCORES = """
    SELECT score_id, trace_id, scorer, turns, value, latest, rationale FROM scores
    WHERE trace_id = ANY(%s) AND logged_at IS NOT NULL
"""
RUNS = "SELECT trace_id, state, scored_by FROM runs WHERE trace_id = ANY(%s)"
SCORINGS = "SELECT trace_id, scorer, turns, (state, claimed_by) FROM scorings WHERE trace_id = ANY(%s)"
WAITING = """
    SELECT (SELECT count(*) FROM outbox WHERE trace_id = ANY(%s)), due_at IS NOT NULL
    FROM conversations WHERE session_id = %s
"""
TRY_AGAIN = """
    WITH traces AS (UPDATE outbox SET retry_at = now()),
         sessions AS (UPDATE conversations SET due_at = now() WHERE due_at IS NOT NULL)
    UPDATE scorings SET due_at = now() WHERE state = 'pending' RETURNING 1
"""
