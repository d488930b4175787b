"""Contestant: MLflow's AgentServer, written as its documentation shows. ``python -m ... PORT [autolog]``."""

import sys
from typing import Any

import agents as sdk
import mlflow
import uvicorn
from agents import Runner
from mlflow.genai.agent_server import AgentServer, invoke
from mlflow.types.responses import ResponsesAgentRequest, ResponsesAgentResponse

from .common import load


def main(port: int, *, traced: bool) -> None:
    """Serve until a signal comes."""
    agent, config = load()
    if traced:
        # Not by MLFLOW_EXPERIMENT_NAME: it is then looked up on the server anew for each trace, while all else waits.
        mlflow.set_experiment("agent-server")
        mlflow.openai.autolog()
    else:
        mlflow.tracing.disable()
        sdk.set_tracing_disabled(True)

    async def answer(request: Any) -> Any:
        items = [item.model_dump(exclude_none=True) for item in request.input]
        result = await Runner.run(agent, items, run_config=config)
        return ResponsesAgentResponse(output=[item.to_input_item() for item in result.new_items])

    answer.__annotations__ = {"request": ResponsesAgentRequest, "return": ResponsesAgentResponse}
    invoke()(answer)
    # Without the access log, as the other contestants: a line a request costs as much as serving a small one.
    uvicorn.run(AgentServer("ResponsesAgent").app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]), traced="autolog" in sys.argv[2:])
