"""The agent of the comparison: one tool that costs nothing, so that what is measured is everything around it."""

from agents import Agent, function_tool


@function_tool
async def add(a: float, b: float) -> float:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


agent = Agent(name="adder", instructions="You add numbers. Use the tool for every sum.", tools=[add])
