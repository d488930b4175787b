"""What judges are to say: seen by clients while it is pending, tried again, done once. Real Postgres, real MLflow."""

import asyncio
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.rules import ScorerRule
from gateway.settings import Settings
from gateway.storage.scorings import failures, retry
from gateway.testing import HttpError, ScriptedOpenAI

from .evaluating import evaluator, fill, made, url_of
from .runs import until

JUDGES = """
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import scorer

polite = make_judge(name="polite", instructions="Is {{ outputs }} polite?", feedback_value_type=bool)

@scorer
def short(outputs):
    return len(str(outputs)) < 1000
"""
MOODY = """
from pathlib import Path
from mlflow.genai.scorers import scorer

@scorer
def moody(outputs):
    if Path({path!r}).exists():
        raise RuntimeError("not today")
    return True
"""
YES = json.dumps({"result": True, "rationale": "It is."})


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a judge, and a scorer in plain code."""
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("GATEWAY_CONFIG", str(tmp_path / "empty.toml"))
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"):
        monkeypatch.setenv(name, "")  # restored afterwards: the evaluator sets them for its process
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "both.py").write_text(JUDGES)
    return make_settings(
        scorers_dir=tmp_path / "scorers",
        scorers={"short": {"filter": {"status": "error"}}},
        mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}",
        judge_model="openai:/judge-1",
        judge_api_key="sk-judge",
    )


async def ask(client: Any, text: str = "12 + 30") -> str:
    """Ask the agent and return the trace's id."""
    return str((await client.post("/invocations", json={"agent": "math", "input": text})).json()["trace_id"])


async def scores(client: Any, trace_id: str, wait: float = 0.0) -> dict[str, dict[str, Any]]:
    """Return what the API says, by scorer."""
    answer = await client.get(f"/v1/traces/{trace_id}/scores", params={"wait": wait})
    assert answer.status_code == 200, answer.text
    return {score["scorer"]: score for score in answer.json()["scores"] if not score.get("superseded")}


async def test_a_client_sees_what_is_pending_and_gets_the_score_it_waits_for(serve, settings, mlflow_uri, rows) -> None:
    """A judge is pending until it has answered; a client that waits is answered then; a filter's skip says why."""
    with ScriptedOpenAI(lambda _body: YES) as judge:
        settings = settings.model_copy(update={"judge_base_url": judge.url})
        async with serve(settings) as client, evaluator(settings, mlflow_uri, alive=True) as parts:
            trace_id = await ask(client)
            await until(lambda: rows("SELECT 1 FROM outbox"))
            await parts.intake.drain()
            before = await scores(client, trace_id)
            waiting = asyncio.create_task(scores(client, trace_id, wait=20))
            await parts.worker.work_off()
            after = await waiting
    assert {name: (score["state"], score.get("reason")) for name, score in before.items()} == {
        "polite": ("pending", None),
        "short": ("skipped", "status"),
    }
    assert (after["polite"]["state"], after["polite"]["value"], after["polite"]["rationale"]) == (
        "scored",
        True,
        "It is.",
    )
    assert rows("SELECT state, scored_by FROM runs") == [("scored", 1)]


async def test_what_failed_for_good_is_tried_again_by_hand_and_ends_as_one_verdict(
    serve, settings, mlflow_uri, rows
) -> None:
    """A refused judge call is a visible failure; tried again, its verdict takes the failure's place, here and there."""
    answers: list[Any] = [HttpError(400, "no such model"), YES]
    with ScriptedOpenAI(lambda _body: answers[0]) as judge:
        settings = settings.model_copy(update={"judge_base_url": judge.url})
        async with serve(settings) as client, evaluator(settings, mlflow_uri, alive=True) as parts:
            trace_id = await ask(client)
            await until(lambda: rows("SELECT 1 FROM outbox"))
            await parts.intake.drain()
            await parts.worker.work_off()
            failed = await scores(client, trace_id)
            assert rows("SELECT state, reason FROM runs") == [("failed", "every scorer failed")]
            async with await psycopg.AsyncConnection.connect(url_of(settings)) as connection:
                [failure] = await failures(connection, "polite", None, 10)
                assert await retry(connection, "polite", None) == 1
            answers.pop(0)
            await parts.worker.work_off()
            again = await scores(client, trace_id)
            assert rows("SELECT state, reason, scored_by FROM runs") == [("scored", None, 1)]
            [trace] = parts.store.read_traces([trace_id])
    assert failed["polite"]["state"] == "failed"
    assert (failure.subject, failure.attempts) == (trace_id, 1)
    assert "no such model" in (failure.reason or "")
    assert again["polite"]["value"] is True
    valid = [each for each in trace.info.assessments if each.valid is not False]
    assert [(each.name, each.feedback.value) for each in valid] == [("polite", True)]
    assert rows("SELECT state FROM scorings") == [("scored",)]


async def test_what_plain_code_failed_at_is_tried_again_by_hand_too(settings, mlflow_uri, tmp_path, rows) -> None:
    """A scorer in plain code that raised is in the list of failures; once it is mended its verdict takes the place."""
    broken = tmp_path / "broken"
    broken.touch()
    (tmp_path / "scorers" / "both.py").write_text(MOODY.format(path=str(broken)))
    settings = settings.model_copy(update={"scorers": {}, "judge_model": None})
    [trace_id] = fill(settings, made())
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        await parts.intake.drain()
        assert rows("SELECT state, reason FROM runs") == [("failed", "every scorer failed")]
        broken.unlink()
        async with await psycopg.AsyncConnection.connect(url_of(settings)) as connection:
            [failure] = await failures(connection, None, None, 10)
            assert await retry(connection, "moody", None) == 1
        await parts.worker.work_off()
        [trace] = parts.store.read_traces([trace_id])
    assert (failure.subject, failure.scorer, failure.reason) == (trace_id, "moody", "RuntimeError: not today")
    assert rows("SELECT state, scored_by FROM runs") == [("scored", 1)]
    valid = [each for each in trace.info.assessments if each.valid is not False]
    assert [(each.name, each.feedback.value) for each in valid] == [("moody", True)]


async def test_what_pressure_leaves_out_is_counted_and_weighted(settings, mlflow_uri, rows) -> None:
    """Under lasting pressure a part is scored, with its probability; the rest is stored, and the ledger says why."""
    settings = settings.model_copy(update={"scorers": {"polite": ScorerRule(share=0.0)}})
    fill(settings, *[made(f"s-{number}") for number in range(60)])
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        parts.pressure.share = 0.3
        await parts.intake.drain()
        stored = await asyncio.to_thread(parts.store.known, [row[0] for row in rows("SELECT trace_id FROM runs")])
    assert len(stored) == 60
    counted = dict(rows("SELECT state || ':' || coalesce(reason, ''), count(*) FROM runs GROUP BY 1"))
    assert counted.keys() == {"scored:", "budget_skipped:pressure"}
    assert rows("SELECT count(*), min(inclusion_probability) FROM scores") == [(counted["scored:"], 0.3)]
    assert rows("""SELECT count(*) FROM runs WHERE skips->>'short' = 'pressure'""") == [
        (counted["budget_skipped:pressure"],)
    ]
