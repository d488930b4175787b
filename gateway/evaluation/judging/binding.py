"""Ties the HTTP calls of a judge to the scoring that they belong to.

The lease travels in a context variable. MLflow's judges call in the thread of their scorer, or in one that MLflow
starts with a copy of its context, so whatever a scorer is made of (a built-in around another judge, a function that
asks two judges), each call finds its lease, and the model's name stays what it is: for MLflow's price list, its
context windows, its memory of who takes which format, and the assessment's source. A token in the model's name would
have to get into every copy of every inner judge, and out of all of these again.

Where the calls leave, MLflow has one function, `send_chat_request`. While judges run, ours stands in its place: it adds
the lease, turns MLflow's own retries off, and sends calls for other providers to the relay as well. So it is with
`_invoke_litellm`, by which MLflow asks the providers that it does not know (`litellms`). A thread that a scorer starts
by hand has no context; its calls still go through the relay, and within all limits but the lease's.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from mlflow.genai.judges.adapters import gateway_adapter, litellm_adapter

from gateway.errors import ConfigurationError
from gateway.evaluation.judging.litellms import by_litellm
from gateway.evaluation.judging.providers import is_litellm_installed

Route = Callable[[str, dict[str, str], str | None], tuple[str, dict[str, str]]]
"""From a call's URL, headers and lease to the URL and headers with which it goes to the relay."""

_PARAMETERS = {"endpoint", "headers", "payload", "num_retries"}
_lease_id: ContextVar[str | None] = ContextVar("judge_lease", default=None)


@contextmanager
def calling_under(lease_id: str) -> Iterator[None]:
    """Make the judge calls of the block belong to a lease. To be entered in the thread of the scorer."""
    token = _lease_id.set(lease_id)
    try:
        yield
    finally:
        _lease_id.reset(token)


@contextmanager
def judges_routed(route: Route, base_url: str) -> Iterator[None]:
    """Send the calls of MLflow's judges by ``route``, until the block is left.

    Args:
        route: to the relay.
        base_url: the relay's own, ``/v1`` included.

    Raises:
        ConfigurationError: this MLflow sends them in another way than the one we know.
    """
    send = _known(gateway_adapter, "send_chat_request", _PARAMETERS)

    @functools.wraps(send)
    def send_by_route(endpoint: str, headers: dict[str, str], payload: Any, num_retries: int) -> Any:  # noqa: ARG001
        url, all_headers = route(endpoint, headers, _lease_id.get())
        return send(endpoint=url, headers=all_headers, payload=payload, num_retries=0)

    def send_for_litellm(url: str | None, body: dict[str, Any]) -> Any:
        return send_by_route(url or f"{base_url}/chat/completions", {}, body, 0)

    invoke = by_litellm(send_for_litellm)
    with ExitStack() as stack:
        stack.enter_context(_in_place(gateway_adapter, "send_chat_request", send_by_route))
        if is_litellm_installed():
            _known(litellm_adapter, "_invoke_litellm", set(inspect.signature(invoke).parameters))
            stack.enter_context(_in_place(litellm_adapter, "_invoke_litellm", invoke))
        yield


def _known(module: Any, name: str, parameters: set[str]) -> Any:
    """Return MLflow's function, if it takes what we know."""
    function = getattr(module, name, None)
    if function is None or set(inspect.signature(function).parameters) != parameters:
        raise ConfigurationError(
            "This version of MLflow calls judges in a way that the gateway cannot bound. Install one that it was "
            "tested with (see constraints.txt), or unset GATEWAY_JUDGE_MODEL to run without judges."
        )
    return function


@contextmanager
def _in_place(module: Any, name: str, ours: Any) -> Iterator[None]:
    theirs = getattr(module, name)
    setattr(module, name, ours)
    try:
        yield
    finally:
        setattr(module, name, theirs)
