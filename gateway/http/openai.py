"""OpenAI's addresses: ``/v1/responses``, ``/v1/chat/completions`` and ``/v1/models``, where a model is an agent."""

import asyncio
import itertools
from typing import Annotated, Any, Literal

from litestar import Request, Response, delete, get, post
from litestar.datastructures import State
from litestar.params import Parameter

from gateway.errors import AgentNotFound, InvalidRequest
from gateway.http.access import caller_of, visible_key
from gateway.http.answers import ChatAnswer, ResponsesAnswer, failed_by_a_crash
from gateway.http.bodies import ChatBody, ResponsesBody, convert, decode
from gateway.http.requests import from_chat, from_responses
from gateway.http.serving import ChatForm, Form, ResponsesForm, Service, read_body, stored
from gateway.plugins import AgentPlugin
from gateway.runs.requests import RunRequest
from gateway.runs.responses import ResponseStore, StoredResponse
from gateway.runs.runner import CANCELLED, AgentRunner
from gateway.storage.signals import STOP_RESPONSE, send

_CANCEL_WAIT_S = 5.0  # for another process to end the run
_CANCEL_LOOK_S = 0.1

AppRequest = Request[Any, Any, State]


@post(
    ["/v1/responses", "/responses"],
    status_code=200,
    opt={"scope": "invoke"},
    summary="Create a response",
    description="Runs the agent that `model` names. OpenAI's Responses API.",
    tags=["OpenAI"],
)
async def create_response(request: AppRequest) -> Response[Any]:
    """Run an agent and answer with a Responses object, or a stream of its events."""
    raw = await read_body(request)
    service: Service = request.app.state.service
    key_id = caller_of(request).key_id

    def prepare() -> tuple[RunRequest, Form]:
        body = convert(decode(raw), ResponsesBody)
        wanted = from_responses(body, request.headers, service.rules, key_id)
        answer = ResponsesAnswer(body, model_is_agent=True, show_tool_calls=service.rules.show_tool_calls)
        return (wanted if body.store is False else stored(wanted, answer)), ResponsesForm(answer)

    return await service.answer(request, raw, prepare)


@post(
    "/v1/chat/completions",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Create a chat completion",
    description="Runs the agent that `model` names. OpenAI's Chat Completions API.",
    tags=["OpenAI"],
)
async def create_chat_completion(request: AppRequest) -> Response[Any]:
    """Run an agent and answer with a chat completion, or a stream of its chunks."""
    raw = await read_body(request)
    service: Service = request.app.state.service
    key_id = caller_of(request).key_id

    def prepare() -> tuple[RunRequest, Form]:
        body = convert(decode(raw), ChatBody)
        wanted = from_chat(body, request.headers, service.rules, key_id)
        return wanted, ChatForm(ChatAnswer(body, model_is_agent=True))

    return await service.answer(request, raw, prepare)


@get(
    "/v1/responses/{response_id:str}",
    opt={"scope": "invoke"},
    summary="Get a stored response",
    tags=["OpenAI"],
)
async def get_response(request: AppRequest, response_id: str, stream: bool = False) -> dict[str, Any]:
    """Answer with a response as it was given, or as far as it is."""
    if stream:
        raise InvalidRequest("A stored response cannot be streamed again. Leave stream out.", "stream")
    return _shown(await _get(request, response_id))


@post(
    "/v1/responses/{response_id:str}/cancel",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Cancel a response that is under way",
    tags=["OpenAI"],
)
async def cancel_response(request: AppRequest, response_id: str) -> dict[str, Any]:
    """End the run behind a response, in whatever process it is; a response that is done stays as it is."""
    found = await _get(request, response_id)
    runner: AgentRunner = request.app.state.runner
    if found.status == "in_progress" and not found.orphaned:
        trace_id = response_id.replace("resp_", "tr-", 1)
        runner.stop(trace_id, CANCELLED)
        await send(request.app.state.pool, STOP_RESPONSE, trace_id)
        for _ in range(round(_CANCEL_WAIT_S / _CANCEL_LOOK_S)):
            found = await _get(request, response_id)
            if found.status != "in_progress":
                break
            await asyncio.sleep(_CANCEL_LOOK_S)
    return _shown(found)


@delete(
    "/v1/responses/{response_id:str}",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Delete a stored response",
    description="Its turn stays in its session; to forget that as well, delete the session.",
    tags=["OpenAI"],
)
async def delete_response(request: AppRequest, response_id: str) -> dict[str, Any]:
    """Delete a stored response."""
    store: ResponseStore = request.app.state.responses
    await store.delete(response_id, visible_key(request))
    return {"id": response_id, "object": "response", "deleted": True}


@get(
    "/v1/responses/{response_id:str}/input_items",
    opt={"scope": "invoke"},
    summary="List what a stored response was the answer to",
    tags=["OpenAI"],
)
async def list_input_items(
    request: AppRequest,
    response_id: str,
    limit: Annotated[int, Parameter(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Answer with the items of the request, a page at a time."""
    found = await _get(request, response_id)
    digits = response_id.removeprefix("resp_")
    items = [_input_item(item, f"{digits}_in{index}") for index, item in enumerate(found.input)]
    if order == "desc":
        items.reverse()
    if after is not None:
        items = list(itertools.islice(itertools.dropwhile(lambda item: item["id"] != after, items), 1, None))
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": len(items) > limit}


@get("/v1/models", opt={"scope": "invoke"}, summary="List the agents, as models", tags=["OpenAI"])
async def list_models(request: AppRequest) -> dict[str, Any]:
    """Answer with one entry an agent that the caller may use."""
    plugins: dict[str, AgentPlugin] = request.app.state.agents
    caller = caller_of(request)
    return {"object": "list", "data": [_model(plugin) for plugin in plugins.values() if caller.may_use(plugin.name)]}


@get("/v1/models/{model:str}", opt={"scope": "invoke"}, summary="Get an agent, as a model", tags=["OpenAI"])
async def get_model(request: AppRequest, model: str) -> dict[str, Any]:
    """Answer with the entry of one agent."""
    plugins: dict[str, AgentPlugin] = request.app.state.agents
    if model not in plugins or not caller_of(request).may_use(model):
        raise AgentNotFound(f"There is no agent {model!r} here; GET /v1/models lists them.")
    return _model(plugins[model])


OPENAI_ROUTES = [
    create_response,
    get_response,
    cancel_response,
    delete_response,
    list_input_items,
    create_chat_completion,
    list_models,
    get_model,
]


async def _get(request: AppRequest, response_id: str) -> StoredResponse:
    store: ResponseStore = request.app.state.responses
    return await store.get(response_id, visible_key(request))


def _shown(found: StoredResponse) -> dict[str, Any]:
    return failed_by_a_crash(found.body) if found.orphaned else found.body


def _input_item(item: dict[str, Any], digits: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}.get(
        kind, "item"
    )
    shown = {"id": f"{prefix}_{digits}", "type": kind, "status": "completed", **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        shown["content"] = [{"type": part, "text": item["content"]}]
    return shown


def _model(plugin: AgentPlugin) -> dict[str, Any]:
    return {"id": plugin.name, "object": "model", "created": plugin.created_at, "owned_by": "agent-gateway"}
