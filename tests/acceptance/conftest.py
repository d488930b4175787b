"""The product as a user runs it: `gateway serve` as a process of its own, reached over HTTP alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from gateway.testing import ScriptedOpenAI

ROOT = Path(__file__).parent.parent.parent
T = TypeVar("T")


def eventually(look: Callable[[], T], *, within_s: float = 60.0) -> T:
    """Return the first truthy result of ``look``: what another process does can only be looked for."""
    deadline = time.monotonic() + within_s
    while not (result := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:.0f} s")
        time.sleep(0.1)
    return result


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def outside() -> dict[str, str]:
    """Return the environment without what would configure a gateway."""
    ours = ("DATABASE_URL", "GATEWAY_", "MLFLOW_", "OPENAI_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Gateway:
    """A running `gateway serve`."""

    def __init__(self, home: Path, **settings: str):
        self.home = home
        self.port, self.mlflow_port = free_port(), free_port()
        self._environment = {
            **outside(),
            "GATEWAY_HOME": str(home),
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_MLFLOW_PORT": str(self.mlflow_port),
            "GATEWAY_QUIET_PERIOD_S": "1",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.mlflow = httpx.Client(base_url=f"http://127.0.0.1:{self.mlflow_port}", timeout=30)

    def start(self) -> "Gateway":
        """Start it and wait until every part is well."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "serve.log").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve"],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=output,
            )
        eventually(self.is_well, within_s=120)
        return self

    def is_well(self) -> bool:
        """Whether `/health` says so."""
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "serve.log").read_text()[-3000:]
        try:
            return bool(self.api.get("/health").json()["status"] == "ok")
        except (httpx.HTTPError, json.JSONDecodeError):
            return False

    def processes(self) -> list[psutil.Process]:
        """Return the supervisor and everything below it."""
        assert self.process is not None
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def evaluator(self) -> psutil.Process | None:
        """Return the evaluator's process; ``None`` while there is none."""
        found = [each for each in self.processes() if each.cmdline()[-1:] == ["worker"]]
        return found[0] if found else None

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        self.process.send_signal(sent)
        return self.process.wait(60)

    def converse(self, *turns: str, agent: str = "support") -> list[dict[str, Any]]:
        """Hold a conversation."""
        answers: list[dict[str, Any]] = []
        for turn in turns:
            session = {"session_id": answers[0]["session_id"]} if answers else {}
            answer = self.api.post("/invocations", json={"agent": agent, "input": turn, **session})
            assert answer.status_code == 200, answer.text
            answers.append(answer.json())
        return answers

    def assessments(self, trace_id: str) -> dict[str, list[Any]]:
        """Return the values of the trace's valid assessments in MLflow, by name; empty while it is not there."""
        answer = self.mlflow.get(f"/api/3.0/mlflow/traces/{trace_id}")
        if answer.status_code == 404:
            return {}
        found: dict[str, list[Any]] = {}
        for each in answer.json()["trace"]["trace_info"].get("assessments", []):
            if each.get("valid", True):
                found.setdefault(each["assessment_name"], []).append(each["feedback"].get("value"))
        return found

    def dataset(self, name: str = "regressions") -> list[dict[str, Any]]:
        """Return the dataset's records."""
        query = {"filter_string": f"name = '{name}'", "max_results": 1}
        found = self.mlflow.post("/api/3.0/mlflow/datasets/search", json=query).json().get("datasets", [])
        if not found:
            return []
        records = self.mlflow.get(f"/api/3.0/mlflow/datasets/{found[0]['dataset_id']}/records").json()
        return list(json.loads(records["records"]))

    def states(self) -> dict[str, int]:
        """Return the ledger of the last hour: runs by state."""
        states = self.api.get("/v1/quality").json()["hour"]["ledger"]["states"]
        return {each["state"]: each["runs"] for each in states if each["runs"]}


class Judge(ScriptedOpenAI):
    """A judge that finds everything right, unless it is asked about gift wrapping."""

    def __init__(self) -> None:
        super().__init__(self._judge)

    @staticmethod
    def _judge(body: dict[str, Any]) -> str:
        prompt = json.dumps(body["messages"])
        good = "gift wrapping" not in prompt
        result = ("none" if good else "unresolved") if "frustration" in prompt.lower() else ("yes" if good else "no")
        return json.dumps({"result": result, "rationale": "as scripted"})


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    """A judge over real HTTP."""
    with Judge() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what shares the gateway first: one test process takes all of it, and none is left for a second gateway."""
    items.sort(key=lambda item: "gateway" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def gateway_of_the_session(tmp_path_factory: pytest.TempPathFactory, judge: Judge) -> Iterator[Gateway]:
    """A gateway with judges."""
    settings = {
        "GATEWAY_JUDGE_MODEL": "openai:/judge-1",
        "GATEWAY_JUDGE_BASE_URL": judge.url,
        "GATEWAY_JUDGE_API_KEY": "sk-judge",
    }
    running = Gateway(tmp_path_factory.mktemp("gateway") / "home", **settings).start()
    yield running
    running.stop()


@pytest.fixture
def gateway(gateway_of_the_session: Gateway) -> Gateway:
    """One running gateway with judges, shared by the tests; who stops it makes the next one wait for its start."""
    assert gateway_of_the_session.process is not None
    if gateway_of_the_session.process.poll() is not None:
        gateway_of_the_session.start()
    return gateway_of_the_session
