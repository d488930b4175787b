"""The agent and the model that every contestant runs."""

import os
from pathlib import Path
from typing import Any

from agents import Agent, RunConfig

from gateway.plugins import load_agents

AGENTS_DIR = Path(__file__).parent.parent / "agent_folder"
AGENT = "adder"
ANSWER = b"The sum is 5."
"""Is in every good answer."""
MODEL_NAME = "scripted-1"
"""What the model behind HTTP is called."""
QUESTION = "What is 2 plus 3?"


def question(thinking_ms: int = 0) -> str:
    """Return what is asked; ``thinking_ms``: how long each of the two model calls of the run takes."""
    return f"{QUESTION} ({thinking_ms} ms)" if thinking_ms else QUESTION


def load() -> tuple[Agent[Any], RunConfig]:
    """Return the agent, and how to run it: with the model behind ``OPENAI_BASE_URL`` if that is set."""
    plugin = load_agents(AGENTS_DIR)[AGENT]
    model = MODEL_NAME if os.environ.get("OPENAI_BASE_URL") else plugin.offline_model
    return plugin.agent, RunConfig(model=model)
