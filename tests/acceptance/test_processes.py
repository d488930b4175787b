"""Start and stop: what is kept, what is left behind, and what is said when it cannot start."""

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from .conftest import ROOT, Gateway, eventually, free_port, outside


def answer(gateway: Gateway, text: str) -> str:
    """Send one turn of session `kept` and return the answer."""
    body = {"agent": "math", "session_id": "kept", "messages": [{"role": "user", "content": text}]}
    return str(gateway.api.post("/invocations", json=body).json()["choices"][0]["message"]["content"])


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of the processes runs any more."""
    return not [each for each in processes if runs(each)]


def runs(process: psutil.Process) -> bool:
    """Whether the process does anything any more."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went between the two questions
        return False


def start_and_fail(home: Path, **settings: str) -> str:
    """Start a gateway that cannot start and return what it says."""
    environment = {**outside(), "GATEWAY_HOME": str(home), "GATEWAY_PORT": str(free_port()), **settings}
    command = [sys.executable, "-m", "gateway", "serve"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_folder_in_use_is_refused(gateway: Gateway) -> None:
    """A second gateway on the same folder is refused."""
    assert "Another gateway is running" in start_and_fail(gateway.home)


@pytest.mark.timeout(300)
def test_everything_killed_and_started_again_keeps_all(gateway: Gateway) -> None:
    """A kill -9 leaves nothing running and loses no data that was stored; Ctrl-C ends everything with exit code 0."""
    eventually(lambda: "pending" not in gateway.states())
    before = gateway.states()
    scored = before.get("scored", 0)
    assert answer(gateway, "What is 15% of 240?") == "36"
    eventually(lambda: gateway.states() == before | {"scored": scored + 1})

    processes = gateway.processes()
    assert {"postgres", "web", "worker", "server"} <= {word for each in processes for word in _words(each)}
    processes[0].send_signal(signal.SIGKILL)
    eventually(lambda: gone(processes), within_s=30)
    assert gateway.process is not None
    gateway.process.wait()

    gateway.start()
    assert answer(gateway, "And times 3?") == "108"
    eventually(lambda: gateway.states() == before | {"scored": scored + 2})

    processes = gateway.processes()
    for each in processes:
        each.send_signal(signal.SIGKILL)
    eventually(lambda: gone(processes), within_s=30)
    gateway.process.wait()

    gateway.start()
    assert answer(gateway, "Add 2 to that") == "110"
    processes = gateway.processes()
    assert gateway.stop(signal.SIGINT) == 0
    assert gone(processes)


def _words(process: psutil.Process) -> set[str]:
    return {Path(word).name for word in process.cmdline()[:5]}


SLEEPER = """
import asyncio
from agents import Agent, function_tool

@function_tool
async def wait() -> str:
    "Wait."
    await asyncio.Event().wait()
    return ""

agent = Agent(name="sleeper", tools=[wait])
"""
OFFLINE = "from gateway.runs.offline import Call, OfflineModel\nmodel = OfflineModel(lambda view: Call('wait'))\n"


def test_a_run_that_the_stop_cuts_off_is_in_the_ledger(tmp_path: Path, database_url: str) -> None:
    """A run beyond the grace period of SIGTERM is cancelled, handed over as such, and its session is free."""
    folder = tmp_path / "agents" / "sleeper"
    folder.mkdir(parents=True)
    (folder / "agent.py").write_text(SLEEPER)
    (folder / "offline.py").write_text(OFFLINE)
    port = free_port()
    settings = {
        "GATEWAY_HOME": str(tmp_path / "home"),
        "GATEWAY_AGENTS_DIR": str(tmp_path / "agents"),
        "GATEWAY_DATABASE_URL": database_url,
        "GATEWAY_PORT": str(port),
        "GATEWAY_SHUTDOWN_GRACE_S": "1",
    }
    process = subprocess.Popen([sys.executable, "-m", "gateway", "web"], cwd=ROOT, env=outside() | settings)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client, psycopg.connect(database_url) as connection:
        connection.autocommit = True

        def listens() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return client.get("/ping").status_code == 200
            return False

        eventually(listens)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/invocations", json={"input": "go", "session_id": "cut"}, timeout=0.5)
        assert connection.execute("SELECT turn_owner IS NOT NULL FROM sessions").fetchall() == [(True,)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert connection.execute("SELECT status, state FROM runs").fetchall() == [("error", "pending")]
        assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (0,)


def test_a_taken_port_is_named_with_its_setting(tmp_path: Path) -> None:
    """A port that is taken fails the start with the setting to change, before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in start_and_fail(tmp_path, GATEWAY_PORT=port)
        assert "Set GATEWAY_PORT" in start_and_fail(tmp_path, GATEWAY_PORT=port)
        assert "Set GATEWAY_MLFLOW_PORT" in start_and_fail(tmp_path, GATEWAY_MLFLOW_PORT=port)
    assert not (tmp_path / "postgres").exists()


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    """A setting that is not valid fails the start with its name."""
    assert "GATEWAY_SAMPLE_RATE" in start_and_fail(tmp_path, GATEWAY_SAMPLE_RATE="2")
