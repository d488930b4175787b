"""Which model a judge asks: what it names itself, a copy that asks another, and what a model lacks to be asked."""

from collections.abc import Mapping
from difflib import get_close_matches

from mlflow.genai.judges.base import Judge
from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.judges.utils import get_default_model
from mlflow.genai.scorers.base import EnsembleScorer, Scorer, ScorerKind, flatten_scorers
from mlflow.genai.scorers.builtin_scorers import BuiltInScorer, SessionLevelScorer

from gateway.errors import ConfigurationError
from gateway.evaluation.judging.providers import (
    is_litellm_installed,
    is_litellms,
    is_mlflows,
    is_relayed,
    load_litellm,
)

_KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "azure": ("AZURE_API_KEY", "AZURE_API_BASE", "AZURE_API_VERSION"),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY",),
    "mistral": ("MISTRAL_API_KEY",),
    "groq": ("GROQ_API_KEY",),
    "deepseek": ("DEEPSEEK_API_KEY",),
    "xai": ("XAI_API_KEY",),
    "openrouter": ("OPENROUTER_API_KEY",),
    "togetherai": ("TOGETHERAI_API_KEY",),
    "typesafe": ("TYPESAFE_API_KEY",),
}
"""What MLflow reads from the environment to call a provider. The others have logins of their own, or none."""
_MLFLOWS_OWN = frozenset({"gateway", "endpoints"})  # served by MLflow, under whatever name somebody gave
_NEVER_ASKED = frozenset(
    {
        "ai21labs",
        "cohere",
        "databricks-model-serving",
        "huggingface-text-generation-inference",
        "litellm",
        "mlflow-model-serving",
        "mosaicml",
        "palm",
        "portkey",
    }
)
"""Providers that MLflow keeps for itself, so that LiteLLM does not get them either, and that its judges cannot ask."""
_DATABRICKS = "databricks"


def asks_model(scorer: Scorer) -> bool:
    """Whether a scorer asks a language model.

    MLflow's built-ins are all judges, `RegexMatch` and its like included, which have no model; an ensemble is none,
    and may be made of judges; neither are the scorers of other libraries, and most of them ask.
    """
    return any(_asks(part) for part in flatten_scorers([scorer]))


def _asks(part: Scorer) -> bool:
    if isinstance(part, BuiltInScorer):
        return "model" in type(part).model_fields
    return isinstance(part, Judge) or (part.kind == ScorerKind.THIRD_PARTY and bool(_of_library(part)))


def named_model(scorer: Scorer) -> str | None:
    """Return the model that a judge's author has named; ``None`` if it is MLflow's default.

    A judge made with `make_judge` looks the default up when it is made, so one that names it cannot be told from one
    that names none. A scorer of another library is tied to the model that it was made with.
    """
    for part in flatten_scorers([scorer]):
        model = _of_library(part) if part.kind == ScorerKind.THIRD_PARTY else getattr(part, "model", None)
        if model and not (isinstance(part, InstructionsJudge) and model == get_default_model()):
            return str(model)
    return None


def _of_library(part: Scorer) -> str | None:
    return getattr(part, "_model", None)


def with_model(scorer: Scorer, model: str) -> Scorer:
    """Return a copy of a judge that asks ``model``; the scorer itself stays as it is.

    Raises:
        ConfigurationError: it is a scorer whose model cannot be set from outside; the message goes on from its name.
    """
    copy = scorer.model_copy()
    if isinstance(copy, EnsembleScorer):
        parts = [with_model(each, model) if asks_model(each) else each for each in flatten_scorers([scorer])]
        object.__setattr__(copy, "_scorers", parts)  # as MLflow sets them; it has no way from outside
    elif isinstance(copy, InstructionsJudge):
        copy._model = model  # noqa: SLF001 - as above: made anew, it would lose what it does not show
        copy._validate_model_format()  # noqa: SLF001 - as above
        copy._validate_model_api()  # noqa: SLF001 - as above: the model decides by which API it is asked
    elif isinstance(copy, BuiltInScorer | SessionLevelScorer) and "model" in type(copy).model_fields:
        copy.model = model
        if "_judge" in type(copy).__private_attributes__:
            copy._judge = None  # noqa: SLF001 - made for the model before
        for name in type(copy).model_fields:
            if isinstance(part := getattr(copy, name), Scorer):  # `KnowledgeRetention` asks by another scorer
                setattr(copy, name, with_model(part, model))
    else:
        raise ConfigurationError("takes no judge model from outside: name the model where it is made.")
    return copy


def what_model_lacks(model: str, environment: Mapping[str, str]) -> str | None:
    """Return what keeps MLflow from asking a judge model, and what to do; ``None``: nothing that can be seen from here.

    Args:
        model: in MLflow's form, ``provider:/name``.
        environment: the variables that its call will see.
    """
    if model == _DATABRICKS:
        return None
    provider, separator, name = model.partition(":/")
    if not separator or not name.strip("/") or name.startswith("/"):
        return f"{model} is no model: write provider:/model, as openai:/gpt-4o-mini."
    if provider in _MLFLOWS_OWN:
        return None
    if provider in _NEVER_ASKED:
        return (
            f"MLflow's judges cannot ask the provider {provider}. Put a server that speaks OpenAI's API before it, "
            f"name it in GATEWAY_JUDGE_BASE_URL, and write openai:/{name}."
        )
    if not is_mlflows(provider):
        return _what_litellm_lacks(provider, name)
    if missing := [key for key in _KEYS.get(provider, ()) if not environment.get(key)]:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, which {model} needs." + (
            " Set it, or GATEWAY_JUDGE_API_KEY; for a local server with GATEWAY_JUDGE_BASE_URL any text will do."
            if provider == "openai"
            else ""
        )
    return None


def _what_litellm_lacks(provider: str, name: str) -> str | None:
    near = get_close_matches(provider, list(_KEYS), n=1)
    meant = f"did you mean {near[0]}:/{name}? " if near else ""
    if not is_litellm_installed():
        return (
            f"MLflow does not know the provider {provider} by itself; {meant and meant + 'Else '}install "
            "LiteLLM, which does: `pip install 'agent-gateway[judges]'`."
        )
    # Imported here, in one thread: judges that import it all at once, each in a thread of its own, may wait for ever.
    if provider in [each.value for each in load_litellm().provider_list]:
        return None
    return f"Neither MLflow nor LiteLLM knows the provider {provider}" + (f"; {meant.strip()}" if meant else ".")


def keys_that_litellm_misses(model: str, environment: Mapping[str, str]) -> list[str]:
    """Return the variables that LiteLLM wants for a model and that are not set; none for a model that it does not ask.

    It does not know every way to log in, nor every name of a key. So a provider of which anything is set is left alone.
    """
    if not is_litellms(model):
        return []
    provider, _, name = model.partition(":/")
    wanted: list[str] = load_litellm().validate_environment(model=f"{provider}/{name.lstrip('/')}")["missing_keys"]
    begun = (provider.partition("_")[0].upper(), *(key.partition("_")[0] for key in wanted))
    return [] if any(value and key.startswith(begun) for key, value in environment.items()) else wanted


def what_cannot_be_bounded(scorer: Scorer, model: str) -> str | None:
    """Return which of a judge's calls go past the relay, past limits and budget, as a sentence; ``None``: none do.

    Args:
        scorer: the judge.
        model: that it asks, in MLflow's form.
    """
    of_libraries = [part for part in flatten_scorers([scorer]) if part.kind == ScorerKind.THIRD_PARTY]
    if any(_asks(part) for part in of_libraries) and not model.startswith("openai:/"):
        return f"a scorer of another library asks {model} by clients of its own."
    if not is_relayed(model):
        return f"MLflow asks {model} by a client of its own."
    return None
