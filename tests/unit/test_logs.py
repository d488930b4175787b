"""The logs are structured, and hold nothing that is personal."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from gateway.logs import configure_logging
from gateway.tracing.redaction import Redactor


@pytest.fixture
def _configured() -> Iterator[None]:
    """Logging as a process of the gateway sets it up; put back afterwards."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)


@pytest.mark.usefixtures("_configured")
def test_an_event_is_one_line_of_json_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    """Our events and a library's records are lines of JSON; values and exceptions in them are redacted."""
    configure_logging("info", Redactor(b"k" * 32).text)
    try:
        raise ValueError("no account for ann@example.com")  # noqa: TRY301 - it is the exception's text that matters
    except ValueError:
        structlog.get_logger("ours").exception("lookup failed", asked_by="bob@example.com")
    logging.getLogger("theirs").warning("call %s back", "+1-202-555-0142")
    lines = capsys.readouterr().err.splitlines()
    ours, theirs = (json.loads(line) for line in lines)
    assert ours["event"] == "lookup failed"
    assert ours["level"] == "error"
    assert "ValueError: no account for <EMAIL:" in ours["exception"]
    assert theirs["event"].startswith("call <PHONE:")
    assert not [secret for secret in ("ann@", "bob@", "555-0142") if secret in "".join(lines)]
