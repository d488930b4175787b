"""Examples of the OpenAPI document: requests that a test sends, and answers written by what writes the real ones."""

from dataclasses import replace
from typing import Any

from gateway.http.answers import ChatAnswer, ResponsesAnswer
from gateway.http.bodies import ChatBody, ResponsesBody, StreamOptions
from gateway.http.streaming import ChatEncoder, Encoder, ResponsesEncoder
from gateway.runs.items import ItemTranslator, item_id_of
from gateway.runs.requests import ApprovalRequest, Run, RunResult, TokenUsage

Examples = dict[str, dict[str, Any]]
"""Example objects of OpenAPI by name."""

REQUEST_ID = "req_4f1c0d5e9a7b4c2d8e6f1a0b3c5d7e9f"
_DIGITS = "a8ce81a0a50b43bd90d883b25ac7aff1"
TRACE_ID = f"tr-{_DIGITS}"
_ASKED = "What is 15% of 240?"
_USER = {"role": "user", "content": _ASKED}
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_WEATHER = {"name": "get_weather", "description": "The weather in a city.", "parameters": _PARAMETERS}
_SCHEMA = {"type": "object", "properties": {"result": {"type": "number"}}, "required": ["result"]}
_WEATHER_ASKED = {"role": "user", "content": "What is the weather in Oslo?"}
_CALL_ID = "call_0a1b2c3d"
_ARGUMENTS = '{"city": "Oslo"}'
_APPROVAL_ID = "mcpr_6b7f1d2c3e4f45a6b7c8d9e0f1a2b3c4"


def _example(summary: str, **body: Any) -> dict[str, Any]:
    return {"summary": summary, "value": body}


_RESPONSES: Examples = {
    "text": _example("A question", input=_ASKED),
    "items": _example(
        "Responses items",
        input=[
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "input_text", "text": _ASKED}]},
        ],
    ),
    "stream": _example("A stream of events", input=_ASKED, stream=True),
    "structured": _example(
        "An answer in a schema of yours",
        input=_ASKED,
        text={"format": {"type": "json_schema", "name": "calculation", "schema": _SCHEMA}},
    ),
    "tool": _example("A tool that you run yourself", input=[_WEATHER_ASKED], tools=[{"type": "function", **_WEATHER}]),
    "tool_result": _example(
        "What your tool gave",
        input=[
            _WEATHER_ASKED,
            {"type": "function_call", "call_id": _CALL_ID, "name": "get_weather", "arguments": _ARGUMENTS},
            {"type": "function_call_output", "call_id": _CALL_ID, "output": "Sunny, 21 °C"},
        ],
        tools=[{"type": "function", **_WEATHER}],
    ),
    "approvals": _example(
        "Decide on a tool call that waits: use the id that the answer before carried",
        approvals=[{"approval_request_id": _APPROVAL_ID, "approve": False, "reason": "Ask the customer first."}],
    ),
}
_CHAT: Examples = {
    "messages": _example("Chat messages", messages=[_USER]),
    "transcript": _example(
        "A whole transcript, as most chat clients send it",
        messages=[_USER, {"role": "assistant", "content": "36"}, {"role": "user", "content": "And times 3?"}],
    ),
    "chat_stream": _example(
        "A stream of chunks, with the usage at its end",
        messages=[_USER],
        stream=True,
        stream_options={"include_usage": True},
    ),
    "chat_structured": _example(
        "An answer in a schema of yours",
        messages=[_USER],
        response_format={"type": "json_schema", "json_schema": {"name": "calculation", "schema": _SCHEMA}},
    ),
    "chat_tool": _example(
        "A tool that you run yourself", messages=[_WEATHER_ASKED], tools=[{"type": "function", "function": _WEATHER}]
    ),
    "chat_tool_result": _example(
        "What your tool gave",
        messages=[
            _WEATHER_ASKED,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": _CALL_ID,
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": _ARGUMENTS},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": _CALL_ID, "content": "Sunny, 21 °C"},
        ],
        tools=[{"type": "function", "function": _WEATHER}],
    ),
}
_BATCHES: Examples = {
    "dataframe_split": _example(
        "A batch: a dataframe by columns and rows",
        dataframe_split={"columns": ["input", "user"], "data": [[_ASKED, "ann"], ["12 plus 30", None]]},
    ),
    "dataframe_records": _example(
        "A batch: a dataframe by records", dataframe_records=[{"input": _ASKED, "user": "ann"}, {"input": "12 plus 30"}]
    ),
    "instances": _example("A batch: rows", instances=[_ASKED, {"messages": [_USER]}]),
    "inputs": _example(
        "A batch: columns, and what holds for every row",
        inputs={"question": [_ASKED, "12 plus 30"]},
        params={"agent": "math"},
    ),
}

REQUESTS: dict[str, Examples] = {
    "invoke": {
        **_RESPONSES,
        "session": _example("Go on with a conversation", input="And times 3?", session_id="s-my-conversation"),
        "agent": _example("Another agent than the default one", input="Where is my order A-1001?", agent="support"),
        **_CHAT,
        **_BATCHES,
    },
    "create_response": {
        **_RESPONSES,
        "model": _example(
            "An agent by its name, and words of yours to it",
            model="math",
            input=_ASKED,
            instructions="Answer with the number alone.",
            metadata={"page": "home"},
        ),
        "conversation": _example("Go on with a conversation", input="And times 3?", conversation="s-my-conversation"),
        "previous_response": _example(
            "Go on from a stored response: use the id of one of yours",
            input="And times 3?",
            previous_response_id=f"resp_{_DIGITS}",
        ),
        "background": _example("An answer to be fetched later", input=_ASKED, background=True),
    },
    "create_chat_completion": _CHAT,
}
"""Bodies of requests by the names of their handlers."""

_RUN = Run(
    trace_id=TRACE_ID,
    session_id="s-84248e8544654d218ea6dabe48e837bd",
    agent="math",
    agent_version="5e8c18d1b521",
    model="offline",
    offline=True,
    sampled=True,
    created_at=1767225600.0,
)
_CALL = {
    "type": "function_call",
    "id": item_id_of("function_call", _DIGITS, 0),
    "call_id": "call_43",
    "name": "percentage",
    "arguments": '{"value": 240, "percent": 15}',
    "status": "completed",
}
_OUTPUT = {
    "type": "function_call_output",
    "id": item_id_of("function_call_output", _DIGITS, 1),
    "call_id": "call_43",
    "output": "36.0",
    "status": "completed",
}
_MESSAGE = {
    "type": "message",
    "id": item_id_of("message", _DIGITS, 2),
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "36", "annotations": [], "logprobs": []}],
}
_ANSWERED = RunResult(_RUN, "36", [_CALL, _OUTPUT, _MESSAGE], TokenUsage(230, 11), completed_at=1767225601.0)
_WAITING = ApprovalRequest(_APPROVAL_ID, "cancel_order", '{"order_id": "A-1002"}', "call_44")
_PAUSED = RunResult(
    replace(_RUN, agent="support"),
    "",
    [
        {
            "type": "mcp_approval_request",
            "id": _WAITING.approval_id,
            "name": _WAITING.tool,
            "arguments": _WAITING.arguments,
            "server_label": "support",
        }
    ],
    TokenUsage(180, 21),
    completed_at=1767225601.0,
    approvals=(_WAITING,),
)
_RESPONSE = ResponsesAnswer(ResponsesBody(input=_ASKED), model_is_agent=True)
_COMPLETION = ChatAnswer(
    ChatBody(messages=[_USER], stream_options=StreamOptions(include_usage=True)), model_is_agent=True
)


def _stream(encoder: Encoder) -> str:
    """Return the answer as a stream."""
    translator = ItemTranslator(_DIGITS)
    events = [event for item in _ANSWERED.output for event in translator.add(item)]
    parts = (encoder.start(_RUN), *map(encoder.event, events), encoder.end(_RUN, _ANSWERED))
    return b"".join(parts).decode()


ANSWERS: dict[str, Examples] = {
    "ResponseObject": {
        "response": {"summary": "A Responses object", "value": _RESPONSE.body(_RUN, _ANSWERED)},
        "approval_needed": {
            "summary": "A run that waits for a decision on a tool call",
            "value": ResponsesAnswer(ResponsesBody(), model_is_agent=True).body(_PAUSED.run, _PAUSED),
        },
    },
    "ChatCompletion": {"chat_completion": {"summary": "A chat completion", "value": _COMPLETION.body(_RUN, _ANSWERED)}},
    "Predictions": {
        "predictions": _example(
            "Predictions", predictions=["36", {"error_code": "RUN_FAILED", "message": "The agent failed."}]
        )
    },
}
"""Answers by the names of their schemas."""

STREAMS: Examples = {
    "ResponseObject": {
        "summary": "A Responses stream",
        "value": _stream(ResponsesEncoder(_RESPONSE, REQUEST_ID, return_trace_id=False)),
    },
    "ChatCompletion": {
        "summary": "A chat stream",
        "value": _stream(ChatEncoder(_COMPLETION, REQUEST_ID, return_trace_id=False)),
    },
}
"""Streams by the names of the schemas of what would be answered without."""
