"""A new scorer's verdicts on what was served before it was there: drawn, estimated, after what is live, once."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.commands.rescore import rescore
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError
from gateway.evaluation.catalog import load_scorers
from gateway.evaluation.rescoring import Window, cost_of_one, enqueue_back_fill, unscored
from gateway.evaluation.scorings import Scorings
from gateway.rules import ScorerRule
from gateway.settings import Settings
from gateway.testing import ScriptedOpenAI

from .evaluating import evaluator, fill, made, url_of

SCORERS = """
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import scorer

polite = make_judge(name="polite", instructions="Is {{ outputs }} polite?", feedback_value_type=bool)
whole = make_judge(name="whole", instructions="Is {{ conversation }} whole?", feedback_value_type=bool)

@scorer
def short(outputs):
    return True
"""
RULES = """
[scorers.polite]
share = 0
[scorers.whole]
share = 0
[scorers.short]
share = 0
"""
YES = json.dumps({"result": True, "rationale": "It is."})
EVER = Window(datetime(2020, 1, 1, tzinfo=UTC), None, None)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings in which no scorer scores what is live; the commands read the same ones."""
    (tmp_path / "gateway.toml").write_text(RULES)
    monkeypatch.setenv("GATEWAY_CONFIG", str(tmp_path / "gateway.toml"))
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "all.py").write_text(SCORERS)
    settings = make_settings(
        scorers_dir=tmp_path / "scorers",
        judge_model="openai:/judge-1",
        judge_api_key="sk-judge",
        judge_models={"openai:/judge-1": {"input_usd": 1.0, "output_usd": 2.0}},
    )
    for name, value in (
        ("DATABASE_URL", url_of(settings)),
        ("HOME", str(settings.home)),
        ("SECRET_KEY", "a secret key for tests only"),
        ("SCORERS_DIR", str(tmp_path / "scorers")),
        ("JUDGE_MODEL", "openai:/judge-1"),
        ("JUDGE_API_KEY", "sk-judge"),
    ):
        monkeypatch.setenv(f"GATEWAY_{name}", value)
    return settings


def scorer_of(settings: Settings, name: str) -> Any:
    """Return a scorer as evaluators know it."""
    return next(live for live in load_scorers(settings) if live.name == name)


async def back_fill(settings: Settings, name: str, share: float = 1.0, window: Window = EVER) -> int:
    """Enqueue a scorer's back-fill and return how many subjects it has."""
    live, key = scorer_of(settings, name), load_keys(settings).derive("sampling")
    async with await psycopg.AsyncConnection.connect(url_of(settings)) as connection:
        subjects, _ = await unscored(connection, live, window, share, key)
        await enqueue_back_fill(connection, live, window, share, subjects)
    return len(subjects)


async def test_a_new_scorer_scores_what_was_served_before_once(settings, mlflow_uri, rows) -> None:
    """Back-fills reach MLflow and the ledger as live scores do; what is scored is not scored again."""
    with ScriptedOpenAI(lambda _body: YES) as judge:
        settings = settings.model_copy(update={"judge_base_url": judge.url})
        fill(settings, made("s-1"), made("s-2"))
        [other] = fill(settings, made("s-3", agent="support"))
        async with evaluator(settings, mlflow_uri, alive=True) as parts:
            await parts.intake.drain()
            assert rows("SELECT DISTINCT state FROM runs") == [("not_selected",)]
            only_math = EVER._replace(agents=["math"])
            assert await back_fill(settings, "polite", window=only_math) == 2
            assert await back_fill(settings, "polite", window=only_math) == 0, "it waits already"
            await parts.worker.work_off()
            assert await back_fill(settings, "polite", window=only_math) == 0, "it is scored"
            traces = await asyncio.to_thread(
                parts.store.read_traces, [row[0] for row in rows("SELECT trace_id FROM runs")]
            )
        asked = len(judge.requests)
    assert rows("SELECT agent, state, scored_by FROM runs ORDER BY session_id") == [
        ("math", "scored", 1), ("math", "scored", 1), ("support", "not_selected", 0),
    ]  # fmt: skip
    assert asked == 2
    given = {trace.info.trace_id: [each.name for each in trace.info.assessments] for trace in traces}
    assert sorted(map(len, given.values())) == [0, 1, 1]
    assert given[other] == []


async def test_conversations_are_filled_in_too(settings, mlflow_uri, rows) -> None:
    """A judge of conversations scores those that are over, as they are now."""
    with ScriptedOpenAI(lambda _body: YES) as judge:
        settings = settings.model_copy(update={"judge_base_url": judge.url, "quiet_period_s": 0.001})
        fill(settings, made("s-1"), made("s-1"))
        async with evaluator(settings, mlflow_uri, alive=True) as parts:
            await parts.intake.drain()
            assert await back_fill(settings, "whole") == 0, "it is not over yet"
            await parts.conversations.score("s-1")
            assert await back_fill(settings, "whole") == 1
            await parts.worker.work_off()
    assert rows("SELECT session_id, turns, value FROM scores") == [("s-1", 2, True)]


async def test_a_higher_share_adds_to_what_is_there_and_makes_all_as_likely(settings, mlflow_uri, rows) -> None:
    """What a low share scored is part of what a higher one scores, and has its probability from then on."""
    fill(settings, *[made(f"s-{number}") for number in range(40)])
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        await parts.intake.drain()
        few = await back_fill(settings, "short", share=0.3)
        await parts.worker.work_off()
        more = await back_fill(settings, "short", share=0.8)
        await parts.worker.work_off()
    assert 0 < few < few + more < 40
    assert rows("SELECT count(*), min(inclusion_probability), max(inclusion_probability) FROM scores") == [
        (few + more, 0.8, 0.8)
    ]


async def test_back_fills_wait_for_what_is_live(settings, mlflow_uri, rows) -> None:
    """Live scorings are claimed first, and back-fills of scorers that are to wait not at all."""
    fill(settings, made("s-1"), made("s-2"))
    live = settings.model_copy(update={"scorers": {"polite": ScorerRule(), "whole": ScorerRule(share=0)}})
    async with evaluator(settings, mlflow_uri, alive=True) as parts:
        await parts.intake.drain()
        await back_fill(settings, "polite")
        fill(settings, made("s-3"))
        async with evaluator(live, mlflow_uri, alive=True) as newer:
            await newer.intake.drain()
        [number] = rows("SELECT max(evaluator_id) FROM evaluators")[0]
        scorings = Scorings(parts.pool, number)
        first = await scorings.claim(1)
        assert [each.back_fill for each in first] == [False]
        await scorings.give_back(first)
        assert not [each for each in await scorings.claim(3, ["polite"]) if each.back_fill]


async def test_the_command_says_the_cost_first(settings, mlflow_uri, rows, capsys) -> None:
    """The estimate comes from what the judge's last scorings took; without a yes nothing is done."""
    with ScriptedOpenAI(lambda _body: YES) as judge:
        settings = settings.model_copy(update={"judge_base_url": judge.url})
        fill(settings, made("s-1"), made("s-2"), made("s-3"))
        async with evaluator(settings, mlflow_uri, alive=True) as parts:
            await parts.intake.drain()
            with pytest.raises(ConfigurationError, match="--yes"):
                await asyncio.to_thread(rescore, scorer="polite", since="1h")
            assert "3 traces" in (said := capsys.readouterr().out)
            assert "has not been asked yet" in said
            assert rows("SELECT count(*) FROM scorings") == [(0,)]
            [first] = rows("SELECT started_at FROM runs ORDER BY started_at LIMIT 1")
            begin, end = first[0] - timedelta(seconds=1), first[0] + timedelta(microseconds=1)
            await back_fill(settings, "polite", window=Window(begin, end, None))
            await parts.worker.work_off()
            await asyncio.to_thread(rescore, scorer="polite", since="1h", yes=True)
            assert "2 traces" in (said := capsys.readouterr().out)
            async with await psycopg.AsyncConnection.connect(url_of(settings)) as connection:
                cost = await cost_of_one(connection, scorer_of(settings, "polite"))
            assert cost is not None
            assert (cost.scorings, cost.tokens > 0, (cost.usd or 0) > 0) == (1, True, True)
            assert f"Its last 1 took {cost.tokens:,.0f} tokens each on average: about {2 * cost.tokens:,.0f}" in said
            await parts.worker.work_off()
    assert rows("SELECT count(*) FROM scores") == [(3,)]


def test_a_scorer_that_no_evaluator_knows(settings, capsys) -> None:
    """The message names those that are known, and what to do."""
    with pytest.raises(ConfigurationError, match=r"No scorer politeness runs live.*polite, short, whole.*share = 0"):
        rescore(scorer="politeness", since="1h")
