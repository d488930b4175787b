"""Which way the calls of a judge model take: MLflow's own HTTP, LiteLLM, or a client that nobody can bound.

LiteLLM belongs to the extra ``judges``. It is imported as late as can be: that takes seconds and some 90 MB.
"""

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mlflow.gateway.provider_registry import is_supported_provider

_ASKED_BY_HTTP = frozenset(
    {
        "openai",
        "azure",
        "anthropic",
        "gemini",
        "mistral",
        "togetherai",
        "groq",
        "deepseek",
        "xai",
        "openrouter",
        "ollama",
        "databricks",
        "vertex_ai",
        "sap-ai-core",
        "gateway",
    }
)
"""Providers whose judges MLflow asks by HTTP itself. The others' clients are their own: LiteLLM, boto3, Databricks'."""
_DEPLOYMENTS = "endpoints"  # MLflow's client of deployments asks those, LiteLLM does not


def is_relayed(model: str) -> bool:
    """Whether the calls of MLflow's judges with this model go through the relay."""
    provider, separator, _ = model.partition(":/")
    return bool(separator) and (provider in _ASKED_BY_HTTP or is_litellms(model))


def is_litellms(model: str) -> bool:
    """Whether LiteLLM makes the calls of judges with this model: it is installed, and MLflow has no way of its own."""
    provider, separator, _ = model.partition(":/")
    return bool(separator) and not is_mlflows(provider) and is_litellm_installed()


def is_mlflows(provider: str) -> bool:
    """Whether MLflow takes a provider for one that it asks by itself, be it that it cannot."""
    return provider == _DEPLOYMENTS or provider in _ASKED_BY_HTTP or is_supported_provider(provider)


def is_litellm_installed() -> bool:
    """Whether LiteLLM can be imported; it is not."""
    return find_spec("litellm") is not None


def load_litellm() -> Any:
    """Return LiteLLM, which calls nobody by itself, and says no more than warnings.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # read at the import, which else asks the web
    litellm: Any = import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return litellm
