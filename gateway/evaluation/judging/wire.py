"""How judges' requests and the providers' answers look on the way: what the relay must know of them, and no more."""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from gateway.evaluation.judging.prices import Tokens

TOKEN_HEADER = "x-gateway-relay"  # noqa: S105 - the name of a header
"""Says that the caller is of this process, where ``Authorization`` is the provider's."""
LEASE_HEADER = "x-gateway-lease"
"""Id of the lease that the call belongs to."""
ENDPOINT_HEADER = "x-gateway-endpoint"
"""URL that the call was meant for, if it is not the relay's own base URL."""
LITELLM_SCHEME = "litellm://"
"""Of the URL of a call that LiteLLM is to make; the body's model has the provider: ``hosted_vllm/name``."""
LITELLM_URL = f"{LITELLM_SCHEME}any/chat/completions"

_BYTES_PER_TOKEN = 4  # of English text; what bounds spending may be rough
_TOKENS_PER_IMAGE = 1000
_IMAGE = re.compile(rb";base64,[A-Za-z0-9+/=]{1000,}")
_MODEL_IN_URL = re.compile(r"/(?:models|deployments)/([^/:?]+)")
_NOT_PASSED_ON = frozenset(
    {
        TOKEN_HEADER,
        LEASE_HEADER,
        ENDPOINT_HEADER,
        "accept-encoding",
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


@dataclass(frozen=True)
class Call:
    """One judge call as it is to leave."""

    url: str
    headers: dict[str, str]
    body: bytes
    model: str
    """In MLflow's form, ``openai:/gpt-4o-mini``: what limits, prices and counts go by."""

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens the prompt has."""
        return estimated_tokens(self.body)


def estimated_tokens(text: bytes) -> int:
    """Return about how many tokens a text has; an image in it counts a thousand."""
    images = [len(each) for each in _IMAGE.findall(text)]
    return (len(text) - sum(images)) // _BYTES_PER_TOKEN + len(images) * _TOKENS_PER_IMAGE


def passed_on(headers: dict[str, str]) -> dict[str, str]:
    """Return the headers that are the provider's to read."""
    return {name: value for name, value in headers.items() if name not in _NOT_PASSED_ON}


def model_of(url: str, body: dict[str, Any], lease_model: str | None) -> str:
    """Return the model that a call asks, in MLflow's form.

    The request says the name (Gemini and Azure in the URL). The provider is the lease's if that is its model, else
    OpenAI, whose API it is that others imitate. Before a name for LiteLLM stands the provider.
    """
    name = body.get("model")
    if url.startswith(LITELLM_SCHEME):
        provider, _, name = str(name).partition("/")
        return f"{provider}:/{name}"
    if not isinstance(name, str):
        found = _MODEL_IN_URL.search(url)
        name = found.group(1) if found else "unknown"
    if lease_model is not None and lease_model.partition(":/")[2].lstrip("/") == name:
        return lease_model
    return f"openai:/{name}"


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a body; ``None`` if it is none."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def tokens_of(answer: dict[str, Any]) -> Tokens | None:
    """Return what an answer says of the tokens it took; ``None``: nothing.

    OpenAI's Chat Completions and Responses, Anthropic's Messages and Gemini's ``generateContent`` are understood.
    """
    if isinstance(usage := answer.get("usageMetadata"), dict):
        output = _count(usage, "candidatesTokenCount") + _count(usage, "thoughtsTokenCount")
        return Tokens(_count(usage, "promptTokenCount"), output, _count(usage, "cachedContentTokenCount"))
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    if "prompt_tokens" in usage:
        cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
        return Tokens(_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), cached)
    if "input_tokens" not in usage:
        return None
    # Anthropic counts cached tokens apart, OpenAI's Responses count them in.
    apart = _count(usage, "cache_read_input_tokens")
    written = _count(usage, "cache_creation_input_tokens")
    within = _count(usage.get("input_tokens_details"), "cached_tokens")
    total = _count(usage, "input_tokens") + apart + written
    return Tokens(total, _count(usage, "output_tokens"), apart + within)


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return max(value, 0) if isinstance(value, int) else 0


def retry_after_s(headers: dict[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds that a provider asks to wait; ``None``: it does not say.

    ``Retry-After`` has seconds or a date (RFC 9110, 10.2.3); OpenAI's ``retry-after-ms`` is finer.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if math.isfinite(wait_s):
            return max(wait_s, 0.0)
    try:
        at = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max((at - (now or datetime.now(UTC))).total_seconds(), 0.0)


def error_message(body: bytes) -> str:
    """Return what an error answer says, cut to what a person reads."""
    answer = json_object(body) or {}
    error = answer.get("error", answer.get("message"))
    if isinstance(error, dict):
        error = error.get("message")
    return " ".join(str(error or body[:200].decode(errors="replace") or "no message").split())[:300]
