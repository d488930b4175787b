"""What cannot be seen from the handlers' signatures: what they decode, answer and raise. For the OpenAPI document."""

from itertools import chain
from typing import Any, NamedTuple

import msgspec

from gateway import errors
from gateway.http import answered
from gateway.http.accepted import SCORING_BODIES, any_of
from gateway.http.bodies import ChatBody, Id, ResponsesBody
from gateway.http.serving import RETURN_TRACE_HEADER
from gateway.quality.since import SINCE_FORMS

Json = dict[str, Any]
Errors = tuple[type[errors.GatewayError], ...]


class _Defect(errors.GatewayError):
    """A defect of the gateway; its log says why, under the request's id."""

    code = "INTERNAL_ERROR"


def _tree(*kinds: type[errors.GatewayError]) -> Errors:
    """Return errors and all below them, without those that have no code of their own."""
    below = chain.from_iterable(_tree(*kind.__subclasses__()) for kind in kinds)
    return (*(kind for kind in kinds if "code" in vars(kind)), *below)


GUARD: Errors = (errors.Unauthenticated, errors.PermissionDenied, errors.ServiceUnavailable, _Defect)
"""What an address can raise that needs a scope."""
_RUN = _tree(errors.RequestError, errors.RunError, errors.ServiceUnavailable)
_CHAT = tuple(kind for kind in _RUN if kind is not errors.ResponseNotFound)


class Operation(NamedTuple):
    """What one handler does."""

    answers: tuple[type, ...] = ()
    """What it answers with status 200; none: what its signature says."""
    bodies: tuple[type, ...] = ()
    """What it decodes, if that is a run; else its signature says it."""
    raises: Errors = ()
    """Errors beyond those of the guard, and of parameters that are not valid."""
    unavailable: Json | None = None
    """Content of an answer with status 503 that is not an error's."""


_RESPONSE = Operation((answered.ResponseObject,), raises=(errors.InvalidRequest, errors.ResponseNotFound))
_SESSION = Operation(raises=(errors.SessionNotFound,))

OPERATIONS = {
    "invoke": Operation(
        (answered.ResponseObject, answered.ChatCompletion, answered.Predictions),
        (ResponsesBody, ChatBody, *SCORING_BODIES),
        _RUN,
    ),
    "create_response": Operation((answered.ResponseObject,), (ResponsesBody,), _RUN),
    "create_chat_completion": Operation((answered.ChatCompletion,), (ChatBody,), _CHAT),
    "get_response": _RESPONSE,
    "cancel_response": _RESPONSE,
    "delete_response": _RESPONSE._replace(answers=(answered.DeletedResponse,)),
    "list_input_items": _RESPONSE._replace(answers=(answered.InputItems,)),
    "list_models": Operation((answered.Models,)),
    "get_model": Operation((answered.Model,), raises=(errors.AgentNotFound,)),
    "get_session": _SESSION,
    "get_session_scores": _SESSION,
    "get_trace_scores": Operation(raises=(errors.TraceNotFound,)),
    "end_session": _SESSION,
    "forget_session": Operation(raises=(errors.SessionNotFound, errors.SessionBusy)),
    "forget_user": Operation(raises=(errors.SessionBusy,)),
    "health": Operation((answered.Health,), unavailable={"application/json": {"schema": any_of(answered.Health)}}),
    "versions": Operation((answered.Version,)),
    "openapi_document": Operation((answered.Document,)),
    "ops_page": Operation(unavailable={"text/html": {"schema": {"type": "string"}}}),
}
"""By the names of the handlers."""

HEADERS: Json = {
    "Idempotency-Key": {
        "description": "The request is not run again if it comes again with this key: it gets the same answer.",
        "schema": {"type": "string", "pattern": "^[ -~]{1,255}$"},
    },
    "X-Session-Id": {"description": "The same as `session_id`.", "schema": msgspec.json.schema(Id)},
    "X-Amzn-Bedrock-AgentCore-Runtime-Session-Id": {
        "description": "The same as `session_id`, as Amazon's AgentCore sends it.",
        "schema": msgspec.json.schema(Id),
    },
    "X-Gateway-Keep-Trace": {
        "description": "`true`: the traces of the conversation are kept, whatever the sampling says.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "traceparent": {
        "description": "The caller's place in its own trace (W3C Trace Context); an invalid one is passed over.",
        "schema": {"type": "string"},
    },
    "tracestate": {"description": "Goes with `traceparent`.", "schema": {"type": "string"}},
    RETURN_TRACE_HEADER: {
        "description": "`true`: `metadata.trace_id` of the answer is the id of the run's trace in MLflow.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
}
"""Headers that a request for a run may have."""

PARAMETERS = {
    "response_id": "Id of a stored response.",
    "session_id": "Id of a session.",
    "trace_id": "Id of a run's trace.",
    "wait": "Seconds to hold the answer for, until a score arrives or nothing is pending any more.",
    "user_id": "Id of a user, as requests had it in `user`.",
    "model": "Name of an agent.",
    "stream": "Only `false` is taken: a stored response cannot be streamed again.",
    "limit": "Items a page.",
    "order": "`desc`: the last item first.",
    "after": "Id of the last item of the page before.",
    "since": f"Begin of the window: {SINCE_FORMS}.",
}
"""What the parameters of paths and queries mean."""

SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
    "password": {
        "type": "http",
        "scheme": "basic",
        "description": "An API key as the password, with any user name: how a browser opens `/ops`.",
    },
}
"""The ways in which an API key is sent."""

TAGS = {
    "Runs": "MLflow's and the cloud runtimes' address: runs and batches.",
    "OpenAI": "OpenAI's addresses, where a model is an agent.",
    "Sessions": "What is known of conversations and of users, and its end.",
    "Scores": "What scorers said of runs and conversations.",
    "Operations": "How good the answers are, and what became of the runs.",
    "Probes": "For load balancers and for people in operations.",
    "Reference": "This description.",
}

DESCRIPTION = """\
Agent Gateway serves tool-calling agents over HTTP. It speaks OpenAI's Responses and Chat Completions APIs, where a
model is an agent, and MLflow's and the cloud runtimes' `/invocations`.

- **Access.** As long as no API key was ever made, everything is open. A key is sent as a bearer token, in the header
  `X-API-Key`, or as the password of HTTP Basic.
- **Sessions.** The gateway keeps the history of a conversation. Send its `session_id` again to go on with it.
- **Streams.** With `"stream": true` a run is answered with server-sent events, which end with `data: [DONE]`. What goes
  wrong after the first event is told in the stream.
- **Errors.** Below `/v1`, and at `/responses`, they have OpenAI's form; elsewhere that of MLflow's scoring server.
- **Ids.** Every answer has a header `x-request-id`, which names the request in the gateway's log.
"""
