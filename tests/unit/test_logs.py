"""The logs are structured, and hold nothing that is personal, whoever logs and whatever goes wrong."""

import asyncio
import gc
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from gateway.logs import configure_logging, redact_prints
from gateway.tracing.redaction.redactor import Redactor

MARKERS = ("ann@", "bob@", "555-0142", "hunter22", "4111")


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Set up logging as a process of the gateway does, and return what reads its lines; put it back afterwards."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, logging.lastResort
    others = {name: logging.getLogger(name).handlers[:] for name in list(root.manager.loggerDict)}

    def begin() -> Any:
        configure_logging("info", Redactor(b"k" * 32).text)
        return read

    def read() -> list[dict[str, Any]]:
        """Return the lines since the last time, none of which holds a marker."""
        text = capsys.readouterr().err
        assert not [marker for marker in MARKERS if marker in text], text
        return [json.loads(line) for line in text.splitlines()]

    yield begin
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook, logging.lastResort = hooks
    for name, own in others.items():
        logging.getLogger(name).handlers[:] = own
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)


def test_an_event_is_one_line_of_json_without_secrets(logged: Any) -> None:
    """Our events and a library's records are lines of JSON; values and exceptions in them carry no hash to link by."""
    lines = logged()
    try:
        raise ValueError("no account for ann@example.com")  # noqa: TRY301 - it is the exception's text that matters
    except ValueError:
        structlog.get_logger("ours").exception("lookup failed", asked_by="bob@example.com")
    logging.getLogger("theirs").warning("call %s back", "+1-202-555-0142")
    ours, theirs = lines()
    assert ours["event"] == "lookup failed"
    assert ours["level"] == "error"
    assert "ValueError: no account for <EMAIL>" in ours["exception"]
    assert theirs["event"] == "call <PHONE> back"


def test_values_of_any_kind(logged: Any) -> None:
    """Nested values, names, bytes, numbers, objects and what a name gives away are redacted; the rest stays."""
    lines = logged()
    error = ValueError("bob@example.com")
    structlog.get_logger("ours").info(
        "ok", deep=[{"ann@example.com": ("x", {"to": b"bob@example.com"})}], password="hunter22", card=4111111111111111,
        error=error, user={"password": "hunter22", "id": 7}, count=3, ratio=0.5, nothing=None,
    )  # fmt: skip
    logging.getLogger("theirs").error("%(who)s", {"who": "ann@example.com"}, extra={"asked": ["bob@example.com"]})
    ours, theirs = lines()
    assert ours["deep"] == [{"<EMAIL>": ["x", {"to": "<EMAIL>"}]}]
    assert (ours["password"], ours["card"], ours["user"]) == ("<SECRET>", "<CARD>", {"password": "<SECRET>", "id": 7})
    assert (ours["count"], ours["ratio"], ours["nothing"]) == (3, 0.5, None)
    assert (theirs["event"], theirs["asked"]) == ("<EMAIL>", ["<EMAIL>"])


def test_chains_and_source_lines(logged: Any) -> None:
    """The causes of an exception and the source lines of its traceback are redacted with it."""
    lines = logged()
    try:
        try:
            raise KeyError("ann@example.com")  # noqa: TRY301 - the chain matters
        except KeyError as cause:
            cause.add_note("asked by bob@example.com")
            raise RuntimeError("password=hunter22") from cause
    except RuntimeError:
        logging.getLogger("theirs").exception("failed")
    (line,) = lines()
    assert "direct cause" in line["exception"]
    assert "asked by <EMAIL>" in line["exception"]


def test_what_cannot_be_redacted_is_withheld(logged: Any) -> None:
    """A record that fails on its way is replaced by a line that says so, and nothing is raised."""
    lines = logged()

    class Broken:
        def __str__(self) -> str:
            raise LookupError("ann@example.com")

    cyclic: list[Any] = ["bob@example.com"]
    cyclic.append(cyclic)
    logging.getLogger("theirs").info("%s", Broken())
    logging.getLogger("theirs").info("%d of ann@example.com", "x")
    structlog.get_logger("ours").info("huge", value=10**5000)
    structlog.get_logger("ours").info("round", value=cyclic)
    *withheld, cycle = lines()
    assert [("withheld" in line["event"], line["error"]) for line in withheld] == [
        (True, "LookupError"),
        (True, "TypeError"),
        (True, "ValueError"),
    ]
    assert cycle["event"] == "round"


async def test_what_nothing_caught(logged: Any) -> None:
    """Warnings, and exceptions of threads, tasks, finalizers and the process end up as redacted lines."""
    lines = logged()

    class Finalized:
        def __del__(self) -> None:
            raise ValueError("ann@example.com")

    def fail() -> None:
        raise ValueError("ann@example.com")

    async def fail_too() -> None:
        fail()

    warnings.warn("bob@example.com is deprecated", UserWarning, stacklevel=1)
    thread = threading.Thread(target=fail, name="for ann@example.com")
    thread.start()
    thread.join()
    task = asyncio.create_task(fail_too(), name="for bob@example.com")
    await asyncio.wait([task])
    del task
    Finalized()
    gc.collect()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    said = [line["event"] for line in lines()]
    assert any("deprecated" in event for event in said)
    assert any("Task exception was never retrieved" in event for event in said)
    expected = {"an exception ended a thread", "an exception could not be raised", "an exception ended the process"}
    assert expected <= set(said)


def test_a_handler_of_a_library_is_taken_over(logged: Any) -> None:
    """A library that had set up its own handler before logs through ours afterwards, once."""
    own = logging.getLogger("chatty")
    own.addHandler(logging.StreamHandler(sys.stderr))
    own.propagate = False
    lines = logged()
    own.warning("ann@example.com")
    assert [line["event"] for line in lines()] == ["<EMAIL>"]


def test_what_is_printed_is_redacted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that a tool prints is redacted, in pieces too; a line that cannot be redacted is withheld."""

    def redact(line: str) -> str:
        if "broken" in line:
            raise ValueError("ann@example.com")
        return line.replace("ann@example.com", "<EMAIL>")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    redact_prints(redact)
    sys.stdout.write("write to ann@exam")
    sys.stdout.write("ple.com please\n")
    sys.stderr.write("broken ann@example.com\n")
    captured = capsys.readouterr()
    assert captured.out == "write to <EMAIL> please\n"
    assert captured.err == "(printed lines were withheld: ValueError)\n"
