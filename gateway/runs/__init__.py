"""The hot path: one run of an agent.

`runner.AgentRunner` takes the session's turn (`sessions`), runs the agent with its model (`models`, `offline`), and
commits the turn only if the run succeeded. What a run costs beyond the SDK's own work is what this folder is
judged by.
"""
