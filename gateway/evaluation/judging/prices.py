"""What a call costs: the settings' prices first, then those that MLflow ships, then LiteLLM's, else it is unknown."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlflow.metrics.genai.model_utils import _parse_model_uri
from mlflow.utils.providers import cost_per_token

from gateway.evaluation.judging.providers import is_litellms, load_litellm

_MILLION = 1_000_000


@dataclass(frozen=True)
class Tokens:
    """Tokens of one call or of several."""

    input: int = 0
    """Cached ones included."""
    output: int = 0
    """Reasoning included."""
    cached: int = 0
    """Part of the input that the provider had in its cache."""

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input + self.output


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input_usd: float
    output_usd: float
    cached_input_usd: float | None = None
    """``None``: cached tokens cost what the others cost."""

    def cost(self, tokens: Tokens) -> float:
        """Return what these tokens cost, in USD."""
        cached_usd = self.input_usd if self.cached_input_usd is None else self.cached_input_usd
        cached = min(tokens.cached, tokens.input)
        usd = (tokens.input - cached) * self.input_usd + cached * cached_usd + tokens.output * self.output_usd
        return usd / _MILLION


class Prices:
    """Prices by model; what was found once is kept."""

    def __init__(self, table: Mapping[str, Price]):
        """Take the settings' prices, by model in MLflow's form (``openai:/gpt-4o-mini``)."""
        self._table = table
        self._found: dict[str, Price | None] = {}

    def of(self, model: str) -> Price | None:
        """Return a model's price; ``None``: unknown. Reads a file of MLflow's the first time, or imports LiteLLM."""
        if model not in self._found:
            self._found[model] = self._table.get(model) or _mlflow_price(model) or _litellm_price(model)
        return self._found[model]


def _mlflow_price(model: str) -> Price | None:
    """Return the price in MLflow's catalog, by its own calculation for a million tokens of each kind."""
    provider, name = _parse_model_uri(model)
    one_each = cost_per_token(name, _MILLION, _MILLION, custom_llm_provider=provider)
    cached = cost_per_token(name, _MILLION, 0, custom_llm_provider=provider, cache_read_input_tokens=_MILLION)
    if one_each is None or cached is None or not sum(one_each):  # a model that it knows without a price costs 0 there
        return None
    return Price(one_each[0], one_each[1], cached[0])


def _litellm_price(model: str) -> Price | None:
    """Return the price in LiteLLM's list of a model that LiteLLM is to ask; it is not imported for others."""
    if not is_litellms(model):
        return None
    name = "/".join(_parse_model_uri(model))
    cost = load_litellm().cost_per_token
    try:
        each = cost(model=name, prompt_tokens=_MILLION, completion_tokens=_MILLION)
        cached = cost(model=name, prompt_tokens=_MILLION, completion_tokens=0, cache_read_input_tokens=_MILLION)
    except Exception:  # noqa: BLE001 - it raises bare ones for a model that it does not list
        return None
    return Price(each[0], each[1], cached[0] or None) if sum(each) else None  # it says 0 where it does not know
