"""What the clients talk to: a web process by itself, without the seconds that MLflow takes, and a scripted model."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from gateway.testing import Answer, HttpError, ScriptedOpenAI, Slow

from .conftest import ROOT, eventually, free_port, outside


@contextmanager
def web_process(home: Path, **settings: str) -> Iterator[str]:
    """Run `gateway web` and give its base URL."""
    port = free_port()
    environment = {**outside(), "GATEWAY_HOME": str(home), "GATEWAY_PORT": str(port), **settings}
    url = f"http://127.0.0.1:{port}"
    with (home / "web.log").open("wb") as log:
        command = [sys.executable, "-m", "gateway", "web"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def listens() -> bool:
        assert process.poll() is None, (home / "web.log").read_text()[-3000:]
        with suppress(httpx.HTTPError):
            return httpx.get(f"{url}/ping").is_success
        return False

    try:
        eventually(listens)
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Model(ScriptedOpenAI):
    """A language model that answers as a test has laid down, and otherwise repeats all that its users said."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.answers: dict[str, Answer | HttpError | Slow] = {}
        """By what the user said last; each is given once."""

    def _answer(self, body: dict[str, Any]) -> Answer | HttpError | Slow:
        items = body["input"]
        if outputs := [item["output"] for item in items if item.get("type") == "function_call_output"]:
            return f"The tools said {' and '.join(outputs)}."
        said = [item["content"] for item in items if item.get("role") == "user"]
        return self.answers.pop(said[-1], " / ".join(said))
