"""``gateway serve``: Postgres, MLflow, web processes and evaluator as watched children of one small process.

Start: Postgres, then all others at once; each waits for what it needs. A child that ends by itself is started again,
after a pause that grows while it keeps ending. Stop (Ctrl-C, SIGTERM, the terminal closed): web first, so that no new
work comes in and what is under way is handed over; evaluator; MLflow; Postgres last.

No process is left behind, whatever ended this one: on Linux the kernel signals the children of a dead parent, and a
next start on the same folder ends what it still finds there.
"""

import contextlib
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx
import psycopg
import structlog

from gateway.crypto import load_keys
from gateway.errors import ConfigurationError
from gateway.settings import MLFLOW_DEFAULTS, Settings, reachable_host, sibling_database, sqlalchemy_url
from gateway.storage.api_keys import check_open
from gateway.storage.database import create_database, migrate
from gateway.storage.embedded import EmbeddedPostgres, die_with_parent

log = structlog.get_logger(__name__)

_POLL_S = 0.2
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0  # a child that ran this long before it ended is started again at once
_BACKLOG = 2048
_OWN_DEADLINES_S = 15.0  # beyond the grace period: what a process does after it, such as handing over its traces


class Child:
    """One process that is kept running."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], *, log_file: Path | None, fd: int = -1
    ):
        """Describe the process; `start` starts it.

        Args:
            name: shown in logs.
            command: program and arguments; no secrets, since any user of the machine can read them.
            environment: its whole environment.
            log_file: takes its output; ``None`` shares ours.
            fd: a file descriptor it inherits; -1 for none.
        """
        self.name = name
        self._command = command
        self._environment = environment
        self._log_file = log_file
        self._fd = fd
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._start_at = 0.0

    @property
    def role(self) -> str:
        """Name without a number: children of one role are stopped together."""
        return self.name.partition("-")[0]

    def start(self) -> None:
        """Start the process in a process group of its own, so that Ctrl-C reaches only the supervisor."""
        self._started = time.monotonic()
        with self._output() as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=() if self._fd < 0 else (self._fd,),
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - this process has one thread
            )

    @contextlib.contextmanager
    def _output(self) -> Iterator[IO[bytes] | None]:
        if self._log_file is None:
            yield None
            return
        with self._log_file.open("ab") as output:
            yield output

    def watch(self) -> None:
        """Start the process again if it has ended, once its pause is over."""
        if self._process is None:
            if time.monotonic() >= self._start_at:
                self.start()
            return
        code = self._process.poll()
        if code is None:
            return
        self._kill_group()
        if time.monotonic() - self._started > _STEADY_S:
            self._pause_s = _FIRST_PAUSE_S
        log.warning("a process ended by itself", process=self.name, exit_code=code, restart_in_s=self._pause_s)
        self._start_at = time.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        self._process = None

    def ask_to_stop(self) -> None:
        """Ask the process to end in its own order."""
        if self._process is not None:
            self._process.terminate()

    def await_stop(self, deadline: float) -> None:
        """Wait for the process until ``deadline`` (monotonic seconds), then end it and whatever it started."""
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            log.warning("a process did not end in time and is killed", process=self.name)
        self._kill_group()
        self._process.wait()
        self._process = None

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Supervisor:
    """Runs everything on one machine, from `run` to a signal."""

    def __init__(self, settings: Settings, *, logs_to_files: bool):
        self._settings = settings
        self._logs = settings.home / "logs" if logs_to_files else None
        self._postgres: EmbeddedPostgres | None = None
        self._children: list[Child] = []
        self._stopping = False

    def run(self) -> None:
        """Start everything, watch it, and stop it in order when a signal comes.

        Raises:
            ConfigurationError: a port is taken, the folder is in use, or a part cannot start.
        """
        settings = self._settings
        settings.home.mkdir(parents=True, exist_ok=True)
        for directory in ("logs", "mlartifacts"):
            (settings.home / directory).mkdir(exist_ok=True)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, self._stop)
        with only_one(settings.home), _listen(settings) as listener:
            if settings.runs_own_mlflow:
                _check_port(settings.mlflow_host, settings.mlflow_port, "GATEWAY_MLFLOW_PORT")
            load_keys(settings)  # made before two children look for it at once
            started = time.monotonic()
            try:
                url = self._start_database()
                self._children = self._plan(url, listener)
                for child in self._children:
                    child.start()
                self._watch(url, started)
            finally:
                self._stop_all()

    def _stop(self, _signal: int, _frame: object) -> None:
        self._stopping = True

    def _start_database(self) -> str:
        settings = self._settings
        if settings.database_url is not None:
            url = settings.database_url.get_secret_value()
        else:
            self._postgres = EmbeddedPostgres(settings.home)
            url = self._postgres.start()
        migrate(url)
        check_open(settings, url)
        if settings.runs_own_mlflow:
            create_database(url, "mlflow")
        return url

    def _plan(self, url: str, listener: socket.socket) -> list[Child]:
        """Return the children in the order in which they are stopped."""
        settings = self._settings
        environment = {**os.environ, "GATEWAY_DATABASE_URL": url}
        web = [sys.executable, "-m", "gateway", "web", "--fd", str(listener.fileno())]
        children = [
            Child(f"web-{number}", web, environment, log_file=self._log("web"), fd=listener.fileno())
            for number in range(1, settings.web_workers + 1)
        ]
        worker = [sys.executable, "-m", "gateway", "worker"]
        children.append(Child("evaluator", worker, environment, log_file=self._log("evaluator")))
        if settings.runs_own_mlflow:
            children.append(self._mlflow(url))
        return children

    def _mlflow(self, url: str) -> Child:
        settings = self._settings
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            settings.mlflow_host,
            "--port",
            str(settings.mlflow_port),
        ]
        # One worker and no job runner: 2 processes instead of 14, and we have no use for its jobs.
        command += ["--workers", "1", "--artifacts-destination", str((settings.home / "mlartifacts").resolve())]
        environment = {
            **MLFLOW_DEFAULTS,
            **os.environ,
            # In the environment, not on the command line: it holds a password.
            "MLFLOW_BACKEND_STORE_URI": sqlalchemy_url(sibling_database(url, "mlflow")),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        # Its log has a line a request, of little use to anyone but MLflow's developers: always a file.
        return Child("mlflow", command, environment, log_file=settings.home / "logs" / "mlflow.log")

    def _log(self, name: str) -> Path | None:
        return self._logs / f"{name}.log" if self._logs else None

    def _watch(self, url: str, started: float) -> None:
        announced = False
        while not self._stopping:
            if self._postgres is not None and self._postgres.poll() is not None:
                log.error("Postgres ended by itself; starting it again", exit_code=self._postgres.poll())
                self._postgres.start()
            for child in self._children:
                child.watch()
            if not announced and _ready(self._settings, url):
                announced = True
                log.info("ready", seconds=round(time.monotonic() - started, 1), **addresses(self._settings))
            time.sleep(_POLL_S)

    def _stop_all(self) -> None:
        for _, group in itertools.groupby(self._children, key=lambda child: child.role):
            children = list(group)
            for child in children:
                child.ask_to_stop()
            deadline = time.monotonic() + self._settings.shutdown_grace_s + _OWN_DEADLINES_S
            for child in children:
                child.await_stop(deadline)
        if self._postgres is not None:
            self._postgres.stop()
        log.info("stopped")


def addresses(settings: Settings) -> dict[str, str]:
    """Return what a person may want to open, by name."""
    base = f"http://{reachable_host(settings.host)}:{settings.port}"
    found = {"api": base, "quality": f"{base}/ops", "reference": f"{base}/reference"}
    return found | ({"mlflow": settings.mlflow_ui} if settings.mlflow_ui else {})


def _ready(settings: Settings, url: str) -> bool:
    """Whether web, MLflow and an evaluator all answer."""
    try:
        base = f"http://{reachable_host(settings.host)}:{settings.port}"
        checks: list[Callable[[], object]] = [lambda: httpx.get(f"{base}/ping", timeout=1).raise_for_status()]
        if settings.runs_own_mlflow:
            checks.append(lambda: httpx.get(f"{settings.mlflow_ui}/health", timeout=1).raise_for_status())
        for check in checks:
            check()
        with psycopg.connect(url, connect_timeout=1) as connection:
            beat = "SELECT 1 FROM evaluators WHERE heartbeat_at > now() - interval '5 seconds'"
            return connection.execute(beat).fetchone() is not None
    except (httpx.HTTPError, psycopg.Error):
        return False


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when this process is gone.

    Raises:
        ConfigurationError: another process holds it.
    """
    with (home / "gateway.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"Another gateway is running on {home}. Stop it, or set GATEWAY_HOME to another folder."
            ) from None
        yield


@contextlib.contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """Bind the API's port once: all web processes inherit it, and a taken port shows before anything starts."""
    with _bind(settings.host, settings.port, "GATEWAY_PORT") as listener:
        listener.set_inheritable(True)
        yield listener


def _check_port(host: str, port: int, setting: str) -> None:
    _bind(host, port, setting).close()


def _bind(host: str, port: int, setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}. Set {setting} to a free port"
            + (", or GATEWAY_HOST to an address of this machine." if error.errno not in (13, 98, 48) else ".")
        ) from None
