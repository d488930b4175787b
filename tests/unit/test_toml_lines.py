"""Where in a TOML file a key stands."""

from pathlib import Path
from textwrap import dedent

import pytest

from gateway.toml_lines import line_of, place_of, told_where

TEXT = dedent("""\
    # settings
    port = 8000
    agents.math.slow_s = 2.0  # a dotted key

    [scorers.polite]
    # of a table
    guidelines = [
        "Be polite.",
        "Be brief = short.",
    ]
    text = '''
    share = 3
    '''
    share = 0.5

    [scorers."odd name"]
    filter = { status = "error", tags = { channel = "app" } }
    """)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("port",), 2),
        (("agents", "math", "slow_s"), 3),
        (("agents",), 3),
        (("scorers", "polite"), 5),
        (("scorers", "polite", "guidelines"), 7),
        (("scorers", "polite", "guidelines", 1), 7),
        (("scorers", "polite", "share"), 14),
        (("scorers", "odd name"), 16),
        (("scorers", "odd name", "filter", "tags", "channel"), 17),
        (("scorers", "rude"), None),
        (("scorers", "polite", "guidelines", 2), None),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_of_a_key(keys: tuple[str | int, ...], line: int | None, newline: str) -> None:
    """A key is found in whatever form it is written, and a text that looks like one is none."""
    assert line_of(TEXT.replace("\n", newline), keys) == line


def test_no_file(tmp_path: Path) -> None:
    """In a file that is not there, or is no text, nothing has a place."""
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    assert place_of(tmp_path / "none.toml", "port") is None
    assert place_of(tmp_path / "odd.toml", "port") is None


def test_a_value_from_elsewhere_has_no_place(tmp_path: Path) -> None:
    """Only a value that the file has is blamed on the file."""
    path = tmp_path / "gateway.toml"
    path.write_text(TEXT)
    assert told_where(path, ("port",), 8000) == f" ({path}, line 2)"
    assert told_where(path, ("port",), 9000) == ""
    assert told_where(path, ("mlflow_port",), 5000) == ""
    table = {"status": "error", "tags": {"channel": "app"}}
    assert told_where(path, ("scorers", "odd name", "filter", "missing"), table) == f" ({path}, line 17)"
