"""``GET /openapi.json``: the API as an OpenAPI 3.1 document, made from the code once at start.

Litestar finds the addresses and their parameters; `gateway.http.operations` adds what handlers decode, answer and raise
by themselves. Schemas and their descriptions come from the structs, errors from the table of `gateway.errors`, and
examples of answers from the code that writes the real ones.
"""

import ast
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import Tag
from litestar.routes import HTTPRoute
from litestar.types import ControllerRouterHandler

from gateway import __version__
from gateway.errors import GatewayError, InvalidRequest, RateLimited, RunError
from gateway.http import accepted, answered
from gateway.http.accepted import CHAT_MESSAGES, INPUT_ITEMS, REF, any_of, list_of
from gateway.http.answered import EVENTS
from gateway.http.errors import ErrorBody, OpenAIErrorBody, openai_error, speaks_openai
from gateway.http.examples import ANSWERS, REQUEST_ID, REQUESTS, STREAMS, TRACE_ID
from gateway.http.operations import (
    DESCRIPTION,
    GUARD,
    HEADERS,
    OPERATIONS,
    PARAMETERS,
    SECURITY,
    TAGS,
    Json,
    Operation,
)
from gateway.tracing import balance, ledger

_CONFIG = OpenAPIConfig(
    title="Agent Gateway",
    version=__version__,
    description=DESCRIPTION,
    use_handler_docstrings=True,
    tags=[Tag(name, description) for name, description in TAGS.items()],
)
_FOR_THIS = {accepted.__name__, answered.__name__}
"""Modules whose structs are in the document although no handler's signature names them."""
_FOR_OTHERS = {balance.__name__, ledger.__name__}
"""Modules whose structs are parts of those that handlers' signatures name."""


@get("/openapi.json", tags=["Reference"], summary="The API as an OpenAPI document")
async def openapi_document(request: Request[Any, Any, State]) -> Response[bytes]:
    """Answer with the document."""
    document: bytes = request.app.state.openapi
    return Response(document, media_type="application/json")


def describe(handlers: Sequence[ControllerRouterHandler]) -> bytes:
    """Return the document, as JSON, of an app with these route handlers."""
    # An app of its own: in the one that serves, Litestar would add addresses for documents and viewers.
    app = Litestar([*handlers], openapi_config=_CONFIG, logging_config=None)
    document: Json = app.openapi_schema.to_schema()
    paths: Json = document["paths"]
    shapes = (each for each in _structs() if each.__module__ in _FOR_THIS and not each.__subclasses__())
    kinds: set[type] = {ErrorBody, OpenAIErrorBody, *shapes}
    for route in app.routes:
        for method, (handler, _) in route.route_handler_map.items() if isinstance(route, HTTPRoute) else ():
            if operation := paths.get(route.path_format, {}).get(method.lower()):
                _complete(operation, route.path_format, handler)
                kinds |= _kinds(handler)
                if f"/v1{route.path_format}" in paths:
                    operation["operationId"] += "_alias"
    document["paths"] = dict(sorted(paths.items(), key=lambda each: f"/v1{each[0]}" in paths))
    components = document["components"]
    components["schemas"] = components.get("schemas", {}) | _schemas(kinds)
    components["parameters"] = {name: {"name": name, "in": "header", **header} for name, header in HEADERS.items()}
    components["securitySchemes"] = SECURITY
    return msgspec.json.encode(document)


def _kinds(handler: HTTPRouteHandler) -> set[type]:
    """Return the structs that a handler takes and gives."""
    about = OPERATIONS.get(handler.handler_name, Operation())
    annotation = handler.parsed_fn_signature.return_type.annotation
    is_struct = isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)
    return {*about.answers, *about.bodies, *((annotation,) if is_struct else ())}


def _complete(operation: Json, path: str, handler: HTTPRouteHandler) -> None:
    """Add to an operation what Litestar cannot know."""
    name, scope = handler.handler_name, handler.opt.get("scope")
    about = OPERATIONS.get(name, Operation())
    parameters = [_parameter(each) for each in operation.pop("parameters", ())]
    raises = {*about.raises, *(GUARD if scope else ())}
    if "requestBody" in operation or any(each["in"] != "path" for each in parameters):
        raises.add(InvalidRequest)
    succeeded = {
        status: each | {"description": "The answer."}
        for status, each in operation["responses"].items()
        if status < "400"
    }
    operation["responses"] = succeeded | _failures(raises, path)
    if about.unavailable:
        _also_unavailable(operation["responses"], about.unavailable)
    if scope:
        operation["security"] = [{}, *({scheme: [scope]} for scheme in SECURITY)]
    if about.answers:
        operation["responses"]["200"] = _answer(about)
    if about.bodies:
        parameters += [{"$ref": f"#/components/parameters/{header}"} for header in HEADERS]
        content = {"schema": any_of(*about.bodies), "examples": REQUESTS[name]}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    for response in operation["responses"].values():
        response["headers"] = response.get("headers", {}) | _header(
            "x-request-id", "Names the request in the gateway's log."
        )
    if "description" in operation:
        operation["description"] = _text(operation["description"])
    operation |= {"operationId": name, "parameters": parameters}


def _parameter(found: Json) -> Json:
    """Return a parameter without what says nothing."""
    schema = found["schema"]
    # Litestar shows `None` as a value that a query can have.
    schema = next((each for each in schema.get("oneOf", ()) if each != {"type": "null"}), schema)
    kept = {"name": found["name"], "in": found["in"], "required": found["required"], "schema": schema}
    text = found.get("description") or PARAMETERS.get(found["name"])
    return kept | ({"description": text} if text else {})


def _answer(about: Operation) -> Json:
    """Return the answer with status 200."""
    names = [kind.__name__ for kind in about.answers]
    content: Json = {"application/json": {"schema": any_of(*about.answers)}}
    if examples := {key: each for name in names for key, each in ANSWERS.get(name, {}).items()}:
        content["application/json"]["examples"] = examples
    answer: Json = {"description": "The answer.", "content": content}
    if about.bodies:
        content["text/event-stream"] = {
            "schema": _event(*(EVENTS[name] for name in names if name in EVENTS)),
            "examples": {name: STREAMS[name] for name in names if name in STREAMS},
        }
        answer["description"] = "The answer: JSON, or with `stream` server-sent events."
        is_batch = "Predictions" in names  # which has no session of its own
        answer["headers"] = {
            **_header("x-session-id", "Send it again to go on with the conversation.", required=not is_batch),
            **_header("idempotent-replayed", "`true`: the answer was given before.", required=False),
        }
    return answer


def _event(*kinds: type) -> Json:
    """Return the schema of one server-sent event: OpenAPI 3.1 has no word for a stream of them."""
    trace = {"type": "object", "required": ["trace_id"], "additionalProperties": {"type": "string"}}
    told = any_of(*kinds, OpenAIErrorBody, trace)
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": told}
    return {
        "type": "object",
        "description": "One of the events. Its `data` is JSON; that of the last one is `[DONE]`.",
        "properties": {"event": {"type": "string"}, "data": any_of({"const": "[DONE]"}, data)},
        "required": ["data"],
    }


def _failures(raises: Iterable[type[GatewayError]], path: str) -> Json:
    """Return the answers of errors by status."""
    grouped: dict[str, list[type[GatewayError]]] = defaultdict(list)
    for kind in sorted(raises, key=lambda kind: (kind.status, kind.code)):
        grouped[str(kind.status)].append(kind)
    responses: Json = {}
    for status, kinds in grouped.items():
        shape = OpenAIErrorBody if speaks_openai(path) else ErrorBody
        examples = {kind.code: {"value": _error(kind, path)} for kind in kinds}
        headers: Json = {}
        if status == "401":
            headers = _header("WWW-Authenticate", "How a key is sent.")
        elif status in {"429", "503"}:
            headers = _header("Retry-After", "Seconds after which it may succeed.", kind="integer")
        responses[status] = {
            "description": "\n".join(f"- `{_code(kind, path)}`: {_summary(kind)}" for kind in kinds),
            "headers": headers,
            "content": {"application/json": {"schema": any_of(shape), "examples": examples}},
        }
    return responses


def _also_unavailable(responses: Json, content: Json) -> None:
    """Add an answer of status 503 that is no error."""
    if "503" in responses:
        responses["503"]["content"] |= content
        responses["503"]["headers"] = {}
    else:
        responses["503"] = {"description": "Serving itself is broken.", "content": content}


def _header(name: str, description: str, *, required: bool = True, kind: str = "string") -> Json:
    return {name: {"description": description, "required": required, "schema": {"type": kind}}}


def _error(kind: type[GatewayError], path: str) -> Json:
    """Return an error of that kind as a client would get it."""
    message = _summary(kind)
    error = kind(message, 7.0) if issubclass(kind, RateLimited) else kind(message)
    error.trace_id = TRACE_ID if isinstance(error, RunError) else None
    if speaks_openai(path):
        return openai_error(error, REQUEST_ID)
    body: Json = msgspec.to_builtins(ErrorBody(error.code, message, REQUEST_ID, error.trace_id))
    return body


def _code(kind: type[GatewayError], path: str) -> str:
    body = _error(kind, path)
    return str(body["error"]["code"] if "error" in body else body["error_code"])


def _summary(kind: type) -> str:
    """Return the first sentence of a class's docstring."""
    return _text(kind.__doc__ or "").partition("\n")[0]


def _schemas(kinds: set[type]) -> Json:
    """Return the schemas of structs and of all that is in them, described by their docstrings."""
    _, schemas = msgspec.json.schema_components(sorted(kinds, key=lambda kind: kind.__name__), ref_template=REF)
    modules = {*(kind.__module__ for kind in kinds), *_FOR_OTHERS}  # elsewhere structs may have the same names
    for kind in _structs():
        if kind.__module__ in modules and (schema := schemas.get(kind.__name__)):
            schema["description"] = _text(kind.__doc__ or "")
            for name, text in _notes(kind).items():
                schema["properties"][name]["description"] = text
    # In the structs these are lists of any objects, which are looked at one by one.
    given, chat = schemas["ResponsesBody"], schemas["ChatBody"]
    items = any_of({"type": "string"}, list_of(*INPUT_ITEMS))
    given["properties"]["input"] = {"description": given["properties"]["input"]["description"], **items}
    given["anyOf"] = [{"required": ["input"]}, {"required": ["approvals"]}]
    messages = list_of(*CHAT_MESSAGES)
    chat["properties"]["messages"] = {"description": chat["properties"]["messages"]["description"], **messages}
    chat["required"] = ["messages"]
    return dict(sorted(schemas.items()))


def _structs(kind: type = msgspec.Struct) -> Iterator[type]:
    """Return all structs of ours."""
    below: type
    for below in kind.__subclasses__():
        if below.__module__.startswith("gateway."):
            yield below
        yield from _structs(below)


def _notes(kind: type) -> dict[str, str]:
    """Return the texts below a struct's fields, which Python does not keep."""
    notes: dict[str, str] = {}
    for each in kind.__mro__:
        if not each.__module__.startswith("gateway."):
            break
        for line, below in pairwise(_classes(each.__module__)[each.__name__].body):
            match line, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    notes.setdefault(name, _text(text))
    return notes


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a module's source."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {each.name: each for each in tree.body if isinstance(each, ast.ClassDef)}


def _text(docstring: str) -> str:
    """Return a docstring as Markdown, for readers who know JSON."""
    return inspect.cleandoc(docstring).replace("``None``", "`null`").replace("``", "`")
