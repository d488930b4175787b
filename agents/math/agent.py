"""A calculator agent: every number in its answers comes from a tool."""

from typing import Any

from agents import Agent, RunContextWrapper, function_tool

INSTRUCTIONS = """\
You answer questions about arithmetic.
- Work out every number with the tools, one operation a call; never calculate in your head.
- When a question needs several steps, use the result of one call as an argument of the next.
- "That" and "it" mean the result of the answer before.
- Answer with the bare number: no words, no units, no trailing zeros.
- When a tool fails, say what went wrong instead of guessing a number.
"""


def explain_failure(_context: RunContextWrapper[Any], error: Exception) -> str:
    """Tell the model what went wrong; the SDK's own message would hide the reason from it."""
    return f"Error: {error}"


# The tools are coroutines because the SDK runs plain functions in a small thread pool, which costs more than the sum.
# Results are rounded because nobody who adds 0.1 and 0.2 wants to read 0.30000000000000004.
@function_tool(failure_error_function=explain_failure)
async def add(a: float, b: float) -> float:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return round(a + b, 10)


@function_tool(failure_error_function=explain_failure)
async def subtract(a: float, b: float) -> float:
    """Subtract `b` from `a`.

    Args:
        a: The number to subtract from.
        b: The number to take away.
    """
    return round(a - b, 10)


@function_tool(failure_error_function=explain_failure)
async def multiply(a: float, b: float) -> float:
    """Multiply two numbers.

    Args:
        a: The first factor.
        b: The second factor.
    """
    return round(a * b, 10)


@function_tool(failure_error_function=explain_failure)
async def divide(a: float, b: float) -> float:
    """Divide `a` by `b`.

    Args:
        a: The number to divide.
        b: The number to divide by; not zero.
    """
    if b == 0:
        message = f"cannot divide {a:g} by zero"
        raise ValueError(message)
    return round(a / b, 10)


@function_tool(failure_error_function=explain_failure)
async def percentage(value: float, percent: float) -> float:
    """Work out `percent` per cent of `value`.

    Args:
        value: The whole, such as 240.
        percent: How many per cent of it, such as 15.
    """
    return round(value * percent / 100, 10)


agent = Agent(
    name="math",
    instructions=INSTRUCTIONS,
    tools=[add, subtract, multiply, divide, percentage],
)
