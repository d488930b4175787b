"""``POST /invocations``: one run in Responses or chat form, or a batch in a form of MLflow's scoring server."""

from collections.abc import Mapping
from typing import Any

from litestar import Request, Response, post
from litestar.datastructures import State

from gateway.errors import InvalidRequest
from gateway.http.access import caller_of
from gateway.http.answers import ChatAnswer, ResponsesAnswer
from gateway.http.batches import Batch
from gateway.http.bodies import ChatBody, ResponsesBody, convert, decode
from gateway.http.dataframes import SCORING_FIELDS
from gateway.http.requests import BodyRules, from_chat, from_responses
from gateway.http.serving import ChatForm, Form, ResponsesForm, Service, read_body, stored
from gateway.runs.requests import RunRequest


@post(
    "/invocations",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Run an agent",
    description=(
        "Runs an agent on one turn of a conversation, in the shape of the request: `input` gets a Responses object, "
        "`messages` a chat completion. A batch in a form of MLflow's scoring server gets `predictions`, one a row."
    ),
    tags=["Runs"],
)
async def invoke(request: Request[Any, Any, State]) -> Response[Any]:
    """Run an agent and answer in the shape of the request."""
    raw = await read_body(request)
    body = decode(raw)
    service: Service = request.app.state.service
    if any(field in body for field in SCORING_FIELDS):
        return await Batch(request, service, body, prepare).answer(raw)
    key_id, headers = caller_of(request).key_id, request.headers
    return await service.answer(request, raw, lambda: prepare(body, headers, service.rules, key_id))


def prepare(body: dict[str, Any], headers: Mapping[str, str], rules: BodyRules, key_id: str) -> tuple[RunRequest, Form]:
    """Return what a body asks for, and the form of its answer; raise `InvalidRequest`."""
    if body.get("input") is not None and body.get("messages") is not None:
        raise InvalidRequest('Give either "input" (a text or Responses items) or "messages" (chat messages).', "input")
    if body.get("messages") is not None:
        chat = convert({name: value for name, value in body.items() if name != "input"}, ChatBody)
        return from_chat(chat, headers, rules, key_id), ChatForm(ChatAnswer(chat, model_is_agent=False))
    if body.get("input") is None and not body.get("approvals"):
        raise InvalidRequest(
            'Give either "input" (a text or Responses items) or "messages" (chat messages), or a batch: '
            f"{', '.join(SCORING_FIELDS)}.",
            "input",
        )
    kept = {name: value for name, value in body.items() if name != "messages"}
    responses = convert(kept, ResponsesBody)
    answer = ResponsesAnswer(responses, model_is_agent=False, show_tool_calls=rules.show_tool_calls)
    wanted = from_responses(responses, headers, rules, key_id)
    return (stored(wanted, answer) if wanted.background else wanted), ResponsesForm(answer)
