"""An agent that does as it is told ("refund A-1, wait"): tests see what it did, and hold it up."""

import asyncio
import threading
from contextlib import suppress
from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    function_tool,
    input_guardrail,
    output_guardrail,
)

SECRET = "hunter22"
"""What no client may be told."""

done: list[str] = []
"""What was done, in order."""
seen: list[list[Any]] = []
"""What the model saw, call by call."""
began = threading.Event()
"""Set when a tool, or the model, waits for the gate."""
gate = asyncio.Event()
thread_gate = threading.Event()


@function_tool
async def note(what: str) -> str:
    """Write something down."""
    done.append(what)
    return f"noted {what}"


@function_tool(needs_approval=True, failure_error_function=None)
async def refund(what: str) -> str:
    """Refund an order; fail on "boom"."""
    done.append(f"refund {what}")
    if what == "boom":
        raise RuntimeError(f"{SECRET} {what}")
    return f"refunded {what}"


@function_tool(needs_approval=True)
async def cancel(what: str) -> str:
    """Cancel an order."""
    done.append(f"cancel {what}")
    return f"cancelled {what}"


@function_tool(failure_error_function=None)
async def wait(what: str) -> str:
    """Wait for the gate; fail on "boom"."""
    began.set()
    await gate.wait()
    if what == "boom":
        raise RuntimeError(f"{SECRET} {what}")
    done.append(f"waited {what}")
    return f"waited {what}"


@function_tool
async def cling(what: str) -> str:
    """Wait for the gate, whoever cancels it."""
    began.set()
    while not gate.is_set():
        with suppress(asyncio.CancelledError):
            await gate.wait()
    done.append(f"clung {what}")
    return what


@function_tool
def block(what: str) -> str:
    """Wait for the gate in a thread."""
    began.set()
    thread_gate.wait(30)
    done.append(f"blocked {what}")
    return what


@function_tool(failure_error_function=None)
async def crash(what: str) -> str:
    """Fail."""
    raise RuntimeError(f"{SECRET} {what}")


@function_tool(failure_error_function=None)
async def give_up(what: str) -> str:
    """Cancel itself."""
    raise asyncio.CancelledError(what)


@function_tool(timeout=0.05, timeout_behavior="raise_exception")
async def dawdle(what: str) -> str:
    """Take too long."""
    await asyncio.Event().wait()
    return what


@input_guardrail
async def no_forbidden(
    _context: RunContextWrapper[Any], _agent: Agent[Any], asked: str | list[Any]
) -> GuardrailFunctionOutput:
    """Stop what speaks of forbidden things."""
    return GuardrailFunctionOutput(None, "forbidden" in str(asked[-1]))


@output_guardrail
async def no_leak(_context: RunContextWrapper[Any], _agent: Agent[Any], answer: str) -> GuardrailFunctionOutput:
    """Stop an answer that leaks."""
    return GuardrailFunctionOutput(None, "leak" in answer)


agent = Agent(
    name="clerk",
    instructions="Do as you are told.",
    tools=[note, refund, cancel, wait, cling, block, crash, give_up, dawdle],
    input_guardrails=[no_forbidden],
    output_guardrails=[no_leak],
)
