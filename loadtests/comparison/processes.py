"""Processes: start, pin, watch, end. And the database and MLflow server that all contestants share."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil
import psycopg

from gateway.settings import MLFLOW_DEFAULTS, sibling_database, sqlalchemy_url
from gateway.storage.database import create_database
from gateway.storage.embedded import EmbeddedPostgres, die_with_parent

from .machine import Cores

ROOT = Path(__file__).parent.parent.parent
"""The project's folder, in which the contestants run."""
SERVING = "loadtests.comparison.serving"
_START_S = 90.0
_STOP_S = 20.0
_OUTSIDE = ("DATABASE_URL", "GATEWAY_", "MLFLOW_", "OPENAI_")


class NotStartedError(Exception):
    """A process ended or did not answer in time; its log, named in the message, says why."""


class Child:
    """One process of ours, in a process group of its own."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: dict[str, str],
        logs: Path,
        *,
        cores: frozenset[int],
        talks: bool = False,
        nice: int = 0,
    ):
        """Start it.

        Args:
            name: names its log.
            arguments: what follows ``python``.
            environment: what is added to an environment without settings of gateway, MLflow or OpenAI.
            logs: folder for its output.
            cores: the cores that it may use.
            talks: it is talked to over ``input`` and ``output``; the log then has only its errors.
            nice: what is added to its niceness.
        """
        self.name = name
        self.log = logs / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**outside(), **environment},
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - started while no other thread is at work
            )
        # Threads inherit it: it has none yet, since the interpreter is only starting.
        os.sched_setaffinity(self._process.pid, cores)
        if nice:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, nice)
        self._cores = cores
        self.usage = psutil.Process(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def input(self) -> IO[bytes]:
        """Takes what it is told."""
        return _pipe(self._process.stdin)

    @property
    def output(self) -> IO[bytes]:
        """Gives what it says."""
        return _pipe(self._process.stdout)

    def check(self) -> None:
        """Raise `NotStartedError` if it has ended."""
        if (code := self._process.poll()) is not None:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise NotStartedError(f"{self.name} ended with exit code {code}. Its log {self.log} ends:\n{last}")

    def await_ready(self, is_ready: Callable[[], bool]) -> None:
        """Wait until ``is_ready``; raise `NotStartedError` if it ends before, or takes too long."""
        deadline = time.monotonic() + _START_S
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise NotStartedError(f"{self.name} does not answer after {_START_S:g} s; see {self.log}.")
            time.sleep(0.1)

    def cpu_s(self) -> float:
        """Return the processor time that it and its children have used, in seconds."""
        times = self.usage.cpu_times()
        living = sum(sum(child.cpu_times()[:2]) for child in self.usage.children(recursive=True))
        return float(times.user + times.system + times.children_user + times.children_system + living)

    def core_busy_s(self) -> float:
        """Return how long its cores have been busy since the machine started, with whatever, in seconds."""
        cores = psutil.cpu_times(percpu=True)
        return sum(sum(cores[core]) - cores[core].idle - cores[core].iowait for core in self._cores)

    def peak_rss_mb(self) -> float:
        """Return the most memory that it had at once, and its children, in MB."""
        processes = [self.usage, *self.usage.children(recursive=True)]
        return sum(_peak_rss_bytes(process.pid) for process in processes) / 1e6

    def stop(self) -> None:
        """End it, and whatever it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True)
class Shared:
    """What all contestants use."""

    folder: Path
    """A new folder, removed in the end, for data and logs."""
    database_url: str
    """Postgres, database ``gateway``."""
    mlflow_port: int
    model_url: str
    """Base URL of the scripted model behind HTTP."""
    cores: Cores

    @property
    def mlflow_url(self) -> str:
        """Address of the MLflow server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    def stored(self, trace_ids: list[str]) -> int:
        """Return how many of these ids MLflow has traces of, with spans."""
        query = (
            "SELECT count(*) FROM trace_info WHERE request_id = ANY(%s) AND EXISTS "
            "(SELECT 1 FROM spans WHERE spans.trace_id = trace_info.request_id)"
        )
        with psycopg.connect(sibling_database(self.database_url, "mlflow")) as connection:
            row = connection.execute(query, [trace_ids]).fetchone()
            return int(row[0]) if row else 0


@contextlib.contextmanager
def shared(cores: Cores) -> Iterator[Shared]:
    """Run a Postgres, an MLflow server on it, and the model server, until the block is left."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True)))
        folder.chmod(0o711)  # Postgres runs as another account when this is root
        postgres = EmbeddedPostgres(folder)
        stack.callback(postgres.stop)
        url = postgres.start()
        create_database(url, "mlflow")
        mlflow_port, model_port = free_port(), free_port()
        mlflow = Child("mlflow", _mlflow(mlflow_port, folder), _mlflow_environment(url), folder, cores=cores.others)
        stack.callback(mlflow.stop)
        model = Child("model", ["-m", f"{SERVING}.model_server", str(model_port)], {}, folder, cores=cores.others)
        stack.callback(model.stop)
        mlflow.await_ready(lambda: answers(f"http://127.0.0.1:{mlflow_port}/health"))
        model.await_ready(lambda: listens(model_port))
        yield Shared(folder, url, mlflow_port, f"http://127.0.0.1:{model_port}/v1", cores)


def _mlflow(port: int, folder: Path) -> list[str]:
    """Return how `gateway serve` starts the MLflow server: the same one serves all contestants."""
    server = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*server, "--artifacts-destination", str(folder / "mlartifacts")]


def _mlflow_environment(url: str) -> dict[str, str]:
    return {
        **MLFLOW_DEFAULTS,
        "MLFLOW_BACKEND_STORE_URI": sqlalchemy_url(sibling_database(url, "mlflow")),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("this process is not one that is talked to")
    return pipe


def outside() -> dict[str, str]:
    """Return the environment without what would configure a contestant."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OUTSIDE)}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET gets a good answer."""
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False


def listens(port: int) -> bool:
    """Whether somebody listens on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _peak_rss_bytes(pid: int) -> int:
    """Return the peak as the kernel counts it (``VmHWM``, in kB)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
