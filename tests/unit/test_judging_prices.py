"""What a judge call costs, and how its answer says what it took."""

from datetime import UTC, datetime

import pytest

from gateway.evaluation.judging.prices import Price, Prices, Tokens
from gateway.evaluation.judging.wire import LITELLM_URL, model_of, retry_after_s, tokens_of


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Read MLflow's own price list, as the evaluator does."""
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")


def test_settings_come_first():
    """A price in the settings wins over MLflow's."""
    price = Price(input_usd=10.0, output_usd=20.0)
    assert Prices({"openai:/gpt-4o-mini": price}).of("openai:/gpt-4o-mini") == price


def test_price_of_mlflow():
    """A model that MLflow knows is priced by its list, cached tokens apart."""
    price = Prices({}).of("openai:/gpt-4o-mini")
    assert price is not None
    assert price.cost(Tokens(input=1_000_000, output=1_000_000)) == pytest.approx(0.75)
    assert price.cost(Tokens(input=1_000_000, cached=1_000_000)) == pytest.approx(0.075)


@pytest.mark.parametrize("model", ["openai:/nobody-knows-me", "nowhere:/gpt-4o-mini"])
def test_unknown_price(model):
    """A model that nobody gives a price for has none, which is not the price 0."""
    assert Prices({}).of(model) is None


def test_cached_tokens_without_a_price_of_their_own():
    """Where no price is given for cached tokens they cost what the others cost."""
    assert Price(1.0, 2.0).cost(Tokens(input=1_000_000, output=500_000, cached=400_000)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            {"usage": {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}},
            Tokens(10, 5, 4),
        ),
        (
            {"usage": {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}},
            Tokens(10, 5, 4),
        ),
        (
            {"usage": {"input_tokens": 6, "output_tokens": 5, "cache_read_input_tokens": 4}},
            Tokens(10, 5, 4),
        ),
        (
            {
                "usageMetadata": {
                    "promptTokenCount": 10,
                    "candidatesTokenCount": 3,
                    "thoughtsTokenCount": 2,
                    "cachedContentTokenCount": 4,
                }
            },
            Tokens(10, 5, 4),
        ),
        ({"usage": {"prompt_tokens": None, "completion_tokens": -3}}, Tokens(0, 0, 0)),
        ({"usage": None}, None),
        ({}, None),
    ],
    ids=["chat", "responses", "anthropic", "gemini", "nonsense", "null", "nothing"],
)
def test_tokens_of_an_answer(answer, expected):
    """Every provider's way of saying what was used reads the same: input with the cached part, and output."""
    assert tokens_of(answer) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 05 Mar 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 05 Mar 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, expected):
    """Seconds, milliseconds and dates are understood; anything else says nothing."""
    assert retry_after_s(headers, datetime(2026, 3, 5, 12, tzinfo=UTC)) == expected


@pytest.mark.parametrize(
    ("url", "body", "lease_model", "expected"),
    [
        ("https://a/v1/chat/completions", {"model": "gpt-x"}, "openai:/gpt-x", "openai:/gpt-x"),
        ("https://a/v1/messages", {"model": "claude"}, "anthropic:/claude", "anthropic:/claude"),
        ("https://a/models/gem:generateContent", {}, "gemini:/gem", "gemini:/gem"),
        ("https://a/openai/deployments/mine/chat/completions?v=1", {}, "azure:/mine", "azure:/mine"),
        ("https://a/v1/chat/completions", {"model": "other"}, "openai:/gpt-x", "openai:/other"),
        ("https://a/v1/chat/completions", {}, None, "openai:/unknown"),
        (LITELLM_URL, {"model": "fireworks_ai/accounts/x"}, "openai:/x", "fireworks_ai:/accounts/x"),
    ],
)
def test_model_of_a_call(url, body, lease_model, expected):
    """The model is what the call says, in MLflow's form, with the provider of its scoring."""
    assert model_of(url, body, lease_model) == expected
