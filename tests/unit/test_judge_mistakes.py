"""Judges that no limit reaches, and budgets that do not count them, are told at the start and by the doctor."""

from typing import Any

import pytest
from mlflow.genai.judges import make_judge

from gateway.evaluation.judge_models import keys_that_litellm_misses, what_model_lacks
from gateway.evaluation.judging.providers import is_relayed
from gateway.evaluation.mistakes import mistakes_of_settings
from gateway.evaluation.scoring import LiveScorer
from gateway.rules import ScorerRule
from gateway.settings import Settings

KEYS = {"OPENAI_API_KEY": "sk", "TYPESAFE_API_KEY": "k"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Read MLflow's own price list, as the evaluator does."""
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")


def told(model: str, **settings: Any) -> list[str]:
    """Return what is said of a judge that asks a model, a line each, with its severity."""
    judge = make_judge(name="tone", instructions="Is {{ outputs }} polite?", feedback_value_type=bool)
    live = [LiveScorer(judge, "v1", ScorerRule(), model)]
    return [f"{each.severity} {each}" for each in mistakes_of_settings(Settings(**settings), live, KEYS)]


@pytest.mark.parametrize("model", ["databricks", "endpoints:/mine", "bedrock:/claude", "typesafe:/x"])
def test_calls_past_every_limit(model):
    """A judge whose provider MLflow asks by a client of its own is told, with the way around it."""
    (line,) = told(model, judge_usd_per_day=1.0)
    assert line.startswith(f"warning GATEWAY_JUDGE_MODEL: tone: MLflow asks {model} by a client of its own. No limit")
    assert "GATEWAY_JUDGE_BASE_URL" in line


def test_budget_that_does_not_count():
    """A budget in money for a model of unknown price is told; a price, or a budget in tokens, settles it."""
    (line,) = told("openai:/our-own", judge_usd_per_day=1.0)
    assert line.startswith("warning GATEWAY_JUDGE_USD_PER_DAY: the price of openai:/our-own is unknown")
    free = {"openai:/our-own": {"input_usd": 0, "output_usd": 0}}
    assert told("openai:/our-own", judge_usd_per_day=1.0, judge_models=free) == []
    assert told("openai:/our-own", judge_tokens_per_day=1000) == []
    assert told("openai:/gpt-4o-mini", judge_usd_per_hour=1.0) == []


def test_providers_that_nobody_asks():
    """A provider that MLflow lists, and its judges cannot ask, can never work: an error that says what to do."""
    (line,) = told("cohere:/command-r")
    assert line.startswith("error GATEWAY_JUDGE_MODEL: tone cannot ask cohere:/command-r. MLflow's judges cannot ask")


def test_litellm_is_asked_whom_it_knows():
    """Where LiteLLM is installed its providers are taken, also for bounded ones, and others are told."""
    pytest.importorskip("litellm", reason="the extra `judges` is not installed")
    assert what_model_lacks("hosted_vllm:/x", {}) is None
    assert is_relayed("hosted_vllm:/x")
    assert "Neither MLflow nor LiteLLM knows the provider opnai; did you mean openai:/x?" in str(
        what_model_lacks("opnai:/x", {})
    )


def test_key_that_litellm_wants():
    """Where LiteLLM is installed the key that it wants is named, unless something of that provider is set."""
    pytest.importorskip("litellm", reason="the extra `judges` is not installed")
    (line,) = told("fireworks_ai:/x")
    assert "wants FIREWORKS_AI_API_KEY, and finds nothing of the kind" in line
    assert keys_that_litellm_misses("fireworks_ai:/x", {"FIREWORKS_API_KEY": "k"}) == []
    assert keys_that_litellm_misses("hosted_vllm:/x", {}) == []
