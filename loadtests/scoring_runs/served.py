"""A gateway as `gateway serve` runs it: web, evaluator, embedded Postgres, MLflow, in a temporary folder."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
from comparison.processes import ROOT, Child, answers, free_port, listens

from gateway.settings import sibling_database
from gateway.storage.embedded import running_url

from .traffic import AGENT
from .usage import cpu_s

SIX = (
    "no_tool_errors",
    "valid_tool_arguments",
    "no_redundant_calls",
    "answer_uses_tool_result",
    "no_ungrounded_values",
    "no_empty_answer",
)
"""Scorers of single traces in plain code, those that look at every value of the answer among them."""
ALWAYS = "no_empty_answer"
"""The one of them that says something of every answered run. All of a trace's go to MLflow in one transaction."""
JUDGE = "load_test_judge"
"""Name of the judge."""
INSTRUCTIONS = "Does the answer {{ outputs }} say what was asked for in {{ inputs }}?"
JUDGE_FILE = f'''\
"""One judge, for the load test."""

from typing import Literal

from mlflow.genai.judges import make_judge

judge = make_judge(
    name="{JUDGE}",
    instructions={INSTRUCTIONS!r},
    feedback_value_type=Literal["yes", "no"],
)
'''
_ROLES = {"gateway web": "web", "gateway worker": "evaluator", "mlflow server": "MLflow server"}
_BEATS = "SELECT 1 FROM evaluators WHERE heartbeat_at > now() - interval '5 seconds'"
# A score is missing if our table, or the queue of what is still to be scored, has it, and MLflow does not.
_EXPECTED = "SELECT trace_id, score_id FROM scores WHERE trace_id = ANY(%s) AND session_id IS NULL"
_UNFINISHED = "SELECT trace_id FROM runs WHERE trace_id = ANY(%s) AND state <> 'scored'"
_THERE = "SELECT assessment_id FROM assessments WHERE trace_id = ANY(%s)"


@dataclass(frozen=True)
class Served:
    """A gateway that runs."""

    child: Child
    url: str
    """Where it is asked."""
    mlflow_url: str
    database_url: str
    folder: Path
    """Temporary; for data and logs."""

    @property
    def mlflow_database(self) -> str:
        """URL of MLflow's database."""
        return sibling_database(self.database_url, "mlflow")

    def cpu_s(self) -> dict[str, float]:
        """Return the processor time that its processes have used so far, in seconds, by role."""
        used: dict[str, float] = {}
        for process in self.child.usage.children():
            role = _ROLES.get(" ".join(process.cmdline()[2:4]), "Postgres")
            used[role] = used.get(role, 0.0) + cpu_s(process)
        return used

    def yields(self) -> int:
        """Return how often the evaluator has begun to yield, since the machine or the database was pressed."""
        return self.child.log.read_text(errors="replace").count("the evaluator yields")

    def complete(self, trace_ids: Sequence[str]) -> int:
        """Return how many of the traces are settled, with every score that our table has of them in MLflow."""
        with psycopg.connect(self.database_url) as connection:
            expected = connection.execute(_EXPECTED, [trace_ids]).fetchall()
            missing = {str(row[0]) for row in connection.execute(_UNFINISHED, [trace_ids])}
        with psycopg.connect(self.mlflow_database) as connection:
            there = {str(row[0]) for row in connection.execute(_THERE, [trace_ids])}
        missing |= {str(trace_id) for trace_id, score_id in expected if str(score_id) not in there}
        return len(set(trace_ids) - missing)


@contextlib.contextmanager
def served(scorers: Sequence[str], environment: dict[str, str], cores: frozenset[int]) -> Iterator[Served]:
    """Run a gateway until the block is left.

    Args:
        scorers: names of those that run; all others are switched off.
        environment: more settings.
        cores: that all of its processes share.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoring-", ignore_cleanup_errors=True)))
        folder.chmod(0o711)  # Postgres runs as another account when this is root
        port, mlflow_port = free_port(), free_port()
        settings = {
            "GATEWAY_AGENTS_DIR": str(ROOT / "agents"),
            "GATEWAY_CONFIG": str(_rules(folder, scorers)),
            "GATEWAY_DEFAULT_AGENT": AGENT,
            "GATEWAY_HOME": str(folder / "home"),
            "GATEWAY_MLFLOW_PORT": str(mlflow_port),
            "GATEWAY_PORT": str(port),
            "GATEWAY_SAMPLE_RATE": "1",
            "GATEWAY_SCORERS_DIR": str(folder / "scorers"),
            **environment,
        }
        child = Child("gateway", ["-m", "gateway", "serve"], settings, folder, cores=cores)
        stack.callback(child.stop)
        url, mlflow_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{mlflow_port}"
        child.await_ready(lambda: answers(f"{url}/ping") and answers(f"{mlflow_url}/health"))
        database_url = running_url(folder / "home") or ""
        child.await_ready(lambda: _beats(database_url))
        yield Served(child, f"{url}/invocations", mlflow_url, database_url, folder)


def _beats(database_url: str) -> bool:
    with psycopg.connect(database_url) as connection:
        return connection.execute(_BEATS).fetchone() is not None


def _rules(folder: Path, scorers: Sequence[str]) -> Path:
    """Make a folder of scorers with the load test's judge, and rules by which only some of them run."""
    from gateway.evaluation.catalog import find_scorers  # noqa: PLC0415 - MLflow takes seconds to import
    from gateway.settings import Settings  # noqa: PLC0415

    shutil.copytree(ROOT / "scorers", folder / "scorers", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scorers" / "load_test.py").write_text(JUDGE_FILE)
    known = find_scorers(Settings(scorers_dir=folder / "scorers", agents_dir=ROOT / "agents", scorers={}))
    if unknown := set(scorers) - set(known):
        raise ValueError(f"there are no scorers {', '.join(sorted(unknown))}")
    path = folder / "gateway.toml"
    path.write_text("".join(f"[scorers.{name}]\nenabled = {str(name in scorers).lower()}\n" for name in sorted(known)))
    return path


@contextlib.contextmanager
def judge_server(folder: Path, latency_ms: float, cores: frozenset[int]) -> Iterator[str]:
    """Run the judges' model in a process of its own; return its base URL."""
    port = free_port()
    arguments = ["-m", "loadtests.scoring_runs.judge_server", str(port), str(latency_ms)]
    child = Child("judge", arguments, {}, folder, cores=cores)
    try:
        child.await_ready(lambda: listens(port))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        child.stop()


def judge_calls(url: str) -> int:
    """Return how often the judges' model was asked so far."""
    return int(httpx.get(url, timeout=5).json()["asked"])


def judge_settings(url: str) -> dict[str, str]:
    """Return the settings by which a gateway's judges ask that model."""
    return {
        "GATEWAY_JUDGE_MODEL": "openai:/scripted",
        "GATEWAY_JUDGE_BASE_URL": url,
        "GATEWAY_JUDGE_API_KEY": "scripted",
    }
