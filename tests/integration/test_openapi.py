"""The OpenAPI document says what the gateway does, and the reference page shows it."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from litestar.routes import HTTPRoute

from gateway.app import ROUTES, create_app
from gateway.http.accepted import INPUT_ITEMS
from gateway.http.bodies import ChatBody, ResponsesBody
from gateway.http.openapi import describe
from gateway.http.operations import HEADERS, OPERATIONS, PARAMETERS, TAGS
from gateway.http.requests import _ITEM_FIELDS

DOCUMENT: dict[str, Any] = json.loads(describe(ROUTES))
OPERATIONS_BY_PATH = {
    (method.upper(), path): operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
RUNS = [path for (_, path), operation in OPERATIONS_BY_PATH.items() if "requestBody" in operation]


def within(value: Any, key: str) -> Iterator[Any]:
    """Return everything that stands under a key, however deep."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for each in value.values():
            yield from within(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from within(each, key)


def check(value: Any, schema: dict[str, Any]) -> None:
    """Hold a value against a schema of the document."""
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def check_stream(text: str, schema: dict[str, Any]) -> None:
    """Hold the events of a stream against the schema of one, their data too."""
    payload = schema["properties"]["data"]["anyOf"][1]["contentSchema"]
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    assert events[-1]["data"] == "[DONE]"
    for event in events:
        check(event, schema)
        if event["data"] != "[DONE]":
            check(json.loads(event["data"]), payload)


def check_answer(answer: Any, method: str, path: str) -> None:
    """Hold an answer against what is documented of the operation."""
    documented = OPERATIONS_BY_PATH[method, path]["responses"]
    assert str(answer.status_code) in documented, answer.text
    response = documented[str(answer.status_code)]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = response["content"][media_type]["schema"]
    if media_type == "text/event-stream":
        check_stream(answer.text, schema)
    elif media_type == "application/json":
        check(answer.json(), schema)
    missing = [
        name for name, header in response["headers"].items() if header["required"] and name not in answer.headers
    ]
    assert not missing


def test_the_document_is_openapi() -> None:
    """The document is valid OpenAPI 3.1, its schemas are JSON schemas, and every reference leads somewhere."""
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    components = DOCUMENT["components"]
    for schema in [*components["schemas"].values(), *within(DOCUMENT["paths"], "schema")]:
        Draft202012Validator.check_schema(schema)
    references = set(within(DOCUMENT, "$ref"))
    there = {f"#/components/{kind}/{name}" for kind, named in components.items() for name in named}
    assert references == {each for each in there if not each.startswith("#/components/securitySchemes/")}
    names = [operation["operationId"] for operation in OPERATIONS_BY_PATH.values()]
    assert len(names) == len(set(names))


def test_every_address_is_in_the_document(make_settings) -> None:
    """What is served and what is documented are the same methods at the same addresses."""
    routes = [route for route in create_app(make_settings()).routes if isinstance(route, HTTPRoute)]
    served = {
        (method, route.path_format)
        for route in routes
        for method, (handler, _) in route.route_handler_map.items()
        if method != "OPTIONS" and handler.resolve_include_in_schema()
    }
    assert served == set(OPERATIONS_BY_PATH)


def test_what_is_said_beside_the_handlers_is_about_them() -> None:
    """Each operation, parameter and tag that is described by its name is there, and none is left undescribed."""
    handlers = {route.handler_name for route in ROUTES}
    assert set(OPERATIONS) <= handlers
    parameters = [each for operation in OPERATIONS_BY_PATH.values() for each in operation.get("parameters", ())]
    assert {each["name"] for each in parameters if "name" in each} == set(PARAMETERS)
    assert all("description" in each for each in parameters if "name" in each)
    assert {tag for operation in OPERATIONS_BY_PATH.values() for tag in operation["tags"]} == set(TAGS)
    assert all(operation.get("description") for operation in OPERATIONS_BY_PATH.values())
    schemas = DOCUMENT["components"]["schemas"]
    assert all(schema["description"] for schema in schemas.values())


def test_items_are_those_that_are_taken() -> None:
    """The types of items in the document are those that are taken."""
    schemas = DOCUMENT["components"]["schemas"]
    kinds = [kind for item in INPUT_ITEMS for kind in schemas[item.__name__]["properties"]["type"]["enum"]]
    assert set(kinds) == {"message", *_ITEM_FIELDS}


@pytest.mark.parametrize("body", [ResponsesBody, ChatBody])
def test_bodies_are_described_by_their_structs(body: type) -> None:
    """The schema of a body has the fields of its struct, described as in the code, and no others."""
    schema = DOCUMENT["components"]["schemas"][body.__name__]
    assert set(schema["properties"]) == set(body.__struct_fields__)  # type: ignore[attr-defined]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["session_id"]["description"].startswith("Id of the conversation to go on with")


def test_what_needs_a_key_says_so() -> None:
    """Operations behind the guard, and no others, name their scope and can be refused for the key."""
    scopes = {route.handler_name: route.opt.get("scope") for route in ROUTES}
    for operation in OPERATIONS_BY_PATH.values():
        scope = scopes[operation["operationId"].removesuffix("_alias")]
        ways = [{}, {"bearer": [scope]}, {"header": [scope]}, {"password": [scope]}]
        assert operation.get("security") == (ways if scope else None)
        assert ("401" in operation["responses"]) == ("403" in operation["responses"]) == bool(scope)


def test_examples_keep_to_their_schemas() -> None:
    """Every example in the document has the form that stands beside it."""
    found = 0
    for operation in OPERATIONS_BY_PATH.values():
        for holder in [operation.get("requestBody", {}), *operation["responses"].values()]:
            for media_type, described in holder.get("content", {}).items():
                hold = check_stream if media_type == "text/event-stream" else check
                for example in described.get("examples", {}).values():
                    hold(example["value"], described["schema"])
                    found += 1
    assert found > 200


@pytest.mark.parametrize("path", RUNS)
async def test_examples_of_requests_are_taken(serve, make_settings, path: str) -> None:
    """Each example of a request is answered as documented; only those that name what is not there are refused."""
    examples = OPERATIONS_BY_PATH["POST", path]["requestBody"]["content"]["application/json"]["examples"]
    statuses = {}
    async with serve(make_settings()) as client:
        for name, example in examples.items():
            answer = await client.post(path, json=example["value"])
            statuses[name] = answer.status_code
            check_answer(answer, "POST", path)
    refused = {name for name, status in statuses.items() if status != 200}
    assert refused == {"approvals", "previous_response"} & set(examples)
    assert {statuses[name] for name in refused} <= {404}


async def test_answers_have_their_documented_form(serve, make_settings) -> None:
    """What is stored, what waits for approval and what failed is answered in the documented form by every operation."""
    async with serve(make_settings()) as client:
        asked = {"model": "support", "input": "Please cancel order A-1002.", "session_id": "s"}
        waiting = await client.post("/v1/responses", json=asked)
        check_answer(waiting, "POST", "/v1/responses")
        approvals = [
            {"approval_request_id": each["id"], "approve": True} for each in waiting.json()["approval_requests"]
        ]
        decided = await client.post("/invocations", json={"approvals": approvals, "stream": True})
        check_answer(decided, "POST", "/invocations")
        stored = waiting.json()["id"]
        requests = [
            ("GET", "/v1/responses/{response_id}", stored),
            ("GET", "/v1/responses/{response_id}/input_items", stored),
            ("POST", "/v1/responses/{response_id}/cancel", stored),
            ("DELETE", "/v1/responses/{response_id}", stored),
            ("GET", "/v1/models/{model}", "math"),
            ("GET", "/v1/sessions/{session_id}", "s"),
            ("POST", "/v1/sessions/{session_id}/end", "s"),
            ("DELETE", "/v1/sessions/{session_id}", "s"),
            ("DELETE", "/v1/users/{user_id}", "ann"),
        ]
        requests += [("GET", path, "") for method, path in OPERATIONS_BY_PATH if method == "GET" and "{" not in path]
        for method, path, name in requests:
            answer = await client.request(method, re.sub(r"\{\w+\}", name, path))
            assert answer.status_code == 200, (method, path, answer.text)
            check_answer(answer, method, path)


async def test_headers_of_runs_are_taken(serve, make_settings) -> None:
    """A request may have all headers that are documented for runs, and its twin is answered with the same."""
    headers = dict.fromkeys(HEADERS, "s-1") | {"x-mlflow-return-trace-id": "true"}
    async with serve(make_settings()) as client:
        answers = [await client.post("/invocations", json={"input": "12 + 30"}, headers=headers) for _ in range(2)]
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true"]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["x-session-id"] == "s-1"
    assert answers[0].json()["metadata"] == {"trace_id": answers[0].json()["trace_id"]}
    for answer in answers:
        check_answer(answer, "POST", "/invocations")


@pytest.mark.parametrize("session_id", ["日本", "é", "a\u2028b"])
async def test_session_ids_may_have_any_letters(serve, make_settings, session_id: str) -> None:
    """A session's id in other letters than those of headers is taken, and is the same in the header of the answer."""
    async with serve(make_settings()) as served:
        # Not the client of the framework, which knows headers of ASCII alone.
        transport = httpx.ASGITransport(served.app)
        client = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        for stream in (False, True):
            body = {"input": "1 + 1", "session_id": session_id, "stream": stream}
            named = await client.post("/v1/responses", json=body)
            assert dict(named.headers.raw)[b"x-session-id"].decode() == session_id
        headers = {"X-Session-Id": session_id.encode()}
        again = await client.post("/v1/responses", json={"input": "And times 3?"}, headers=headers)
        broken = await client.post("/v1/responses", json={"input": "1 + 1", "session_id": f"{session_id}\n"})
    assert again.json()["session_id"] == session_id
    assert broken.status_code == 400


async def test_the_reference_loads_nothing_from_elsewhere(serve, make_settings) -> None:
    """The page has its files from the gateway, which lets browsers keep them, and forbids all else."""
    async with serve(make_settings()) as client:
        page = await client.get("/reference")
        below = await client.get("/reference/")
        files = re.findall(r'(?:src|href)="(reference/[^"]+)"', page.text)
        answers = await asyncio.gather(*(client.get(f"/{file}") for file in files))
        missing = await client.get("/reference/page.py")
    assert "http" not in page.text
    assert 'href="ops"' in page.text
    assert 'href="../openapi.json"' in below.text
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert all("immutable" in answer.headers["cache-control"] for answer in answers)
    assert (missing.status_code, missing.json()["error_code"]) == (404, "ENDPOINT_NOT_FOUND")
    policy = page.headers["content-security-policy"]
    nonces = set(re.findall(r"nonce-([\w-]+)", policy))
    assert nonces == set(re.findall(r'nonce="([\w-]+)"', page.text))
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
