"""Structured logs: one line an event on standard error, text for people, JSON for machines.

One choke point: `_Redacting` stands between every record, whoever logged it, and standard error. It redacts the
finished line's parts, values of any kind at any depth and exceptions with their chains and source lines included. What
it cannot redact is withheld, and a line says so.
"""

import io
import logging
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO

import structlog

_DEPTH = 8  # deeper, a value in a log line is written as text
_WITHHELD = "a log line was withheld: it could not be redacted"

_LONGEST_LINE = 100_000  # characters printed without a line break, after which it counts as a line


def configure_logging(level: str, redact: Callable[[str], str]) -> None:
    """Send our logs, those of the libraries, warnings, and exceptions that nothing caught through one formatter.

    Args:
        level: least severe level that is written.
        redact: applied to every text of every event, so that no value or exception can carry what a user typed.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    people = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            _redacted_event(redact),
            renderer,
        ],
    )
    root = logging.getLogger()
    root.handlers[:] = [_Redacting(sys.stderr, formatter)]
    root.setLevel(level.upper())
    _take_over_libraries()
    # Their ordinary traffic is not news: a line a request, a job or a poll would bury what is.
    for noisy in ("httpx", "httpx2", "httpcore", "alembic", "procrastinate", "mlflow", "openai", "psycopg.pool"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    _log_what_nothing_caught()


def redact_prints(redact: Callable[[str], str]) -> None:
    """Redact what agents, tools and scorers print, too: in a service it ends where the log does. To be called once.

    Args:
        redact: as for `configure_logging`, which comes first: what it writes is redacted already.
    """
    sys.stdout = _RedactedPrints(sys.stdout, redact)
    sys.stderr = _RedactedPrints(sys.stderr, redact)


class _RedactedPrints(io.TextIOBase):
    """A text stream that passes on whole lines, redacted: a value may come in pieces."""

    def __init__(self, stream: TextIO, redact: Callable[[str], str]):
        self._stream = stream
        self._redact = redact
        self._begun = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Take a text; its whole lines are written, as one: a key may take several."""
        with self._lock:
            whole, end, self._begun = (self._begun + text).rpartition("\n")
            if len(self._begun) > _LONGEST_LINE:
                whole, end, self._begun = whole + end + self._begun, "\n", ""
            if end:
                self._write(whole + end)
        return len(text)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Name of the encoding that the stream writes."""
        return self._stream.encoding

    def flush(self) -> None:
        """Write what is there of the lines before; one that was begun waits for its end."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the descriptor, for those who ask whether it is a terminal."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return whether people read it."""
        return self._stream.isatty()

    def _write(self, lines: str) -> None:
        try:
            self._stream.write(self._redact(lines))
        except Exception as error:  # noqa: BLE001 - fails closed: whatever it was, the text stays in
            self._stream.write(f"(printed lines were withheld: {type(error).__name__})\n")


class _Redacting(logging.StreamHandler[TextIO]):
    """Writes lines that the formatter redacted; if it fails, a line that says where, and nothing of the record."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter):
        super().__init__(stream)
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or that it was withheld. Never raises: a log line is not worth a request."""
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - fails closed, whatever it was
            # The logger's name and the place in the code are ours or a library's, never a user's.
            where = f"{record.name.split('[')[0]}:{record.lineno}"
            line = (
                f'{{"event": "{_WITHHELD}", "level": "error", "where": "{where}", "error": "{type(error).__name__}"}}'
            )
        try:
            self.stream.write(line + self.terminator)
            self.flush()
        except (OSError, ValueError):  # nobody reads standard error any more
            pass

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Stay silent: the standard handler prints the record's message and arguments as they are."""


def _take_over_libraries() -> None:
    """Let what libraries log come to the root's handler only: one of their own would write it as it is."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if not isinstance(handler, logging.NullHandler):
                logger.removeHandler(handler)
                logger.propagate = True
    # Writes the bare message of a record that finds no handler.
    logging.lastResort = None


def _log_what_nothing_caught() -> None:
    """Log exceptions that end a thread or the process, or that Python could not raise, instead of printing them.

    Those of tasks that nobody asked for come through logging anyway: asyncio's own handler logs them.
    """
    log = logging.getLogger("gateway.uncaught")

    def in_main(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, KeyboardInterrupt(), None)
        else:
            log.critical("an exception ended the process", exc_info=(kind, error, trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            # Named by its class: a thread's name may be made of what it works on.
            log.error("an exception ended a thread", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    def unraisable(args: Any) -> None:
        if args.exc_value is not None:
            log.error("an exception could not be raised", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    sys.excepthook = in_main
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def _redacted_event(redact: Callable[[str], str]) -> Callable[[Any, str, MutableMapping[str, Any]], dict[str, Any]]:
    """Return the processor that redacts an event's names and values, of any type and at any depth."""

    def plain(value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            text = str(value)  # it may be a card's number, and as text it would be found
            return value if redact(text) == text else redact(text)
        if depth < _DEPTH and isinstance(value, Mapping):
            return {redact(str(name)): named(str(name), item, depth + 1) for name, item in value.items()}
        if depth < _DEPTH and isinstance(value, list | tuple | set | frozenset):
            return [plain(item, depth + 1) for item in value]
        if isinstance(value, bytes | bytearray | memoryview):
            return redact(bytes(value).decode("utf-8", "replace"))
        return redact(value if isinstance(value, str) else repr(value) if depth else str(value))

    def named(name: str, item: Any, depth: int) -> Any:
        """Redact a value in the light of its name: of ``password="x"``, the name gives away what ``x`` is."""
        shown = plain(item, depth)
        if isinstance(shown, str | int | float) and not isinstance(shown, bool):
            label = name.replace("-", "_")
            pair = f"{label}={shown}"
            redacted = redact(pair)
            if redacted != pair and redacted.startswith(f"{label}="):
                return redacted[len(label) + 1 :]
        return shown

    def event_of(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
        return {redact(str(name)): named(str(name), value, 0) for name, value in event.items()}

    return event_of
