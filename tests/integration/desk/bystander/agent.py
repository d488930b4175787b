"""An agent that has nothing to do with the other, and no patience with its model."""

from agents import Agent, ModelSettings

agent = Agent(name="bystander", model_settings=ModelSettings(timeout=0.2))
