"""Where in a TOML file a key stands. ``tomllib`` keeps no positions, and the libraries that write TOML show none."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Keys = Sequence[str | int]


def place_of(path: Path, *keys: str) -> str | None:
    """Return where the file sets what the keys lead to, as "gateway.toml, line 3"; ``None`` if it does not."""
    line = line_of(_text(path), keys)
    return None if line is None else f"{path}, line {line}"


def told_where(path: Path, keys: Keys, value: object) -> str:
    """Return where the file has a value that was refused, as " (gateway.toml, line 3)".

    Nothing if the value came from elsewhere: the environment may have overridden the file. ``keys`` may lead further
    than the file goes, to a key that is missing; then ``value`` is the table that misses it.
    """
    text = _text(path)
    try:
        known, found = walk(tomllib.loads(text), keys)
    except tomllib.TOMLDecodeError:
        return ""
    return f" ({path}, line {line_of(text, known)})" if known and found == value else ""


def line_of(text: str, keys: Keys) -> int | None:
    """Return the line, the first being 1, of the statement that sets what ``keys`` lead to; ``None`` if none does.

    The text is read in growing pieces, and the statement is the one after which the keys lead somewhere. So every form
    of TOML counts (dotted and quoted keys, inline tables, values over several lines), at the price of reading a small
    file as often as it has lines, when there is a mistake to report.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    whole = 0  # lines that are statements in full
    for count in range(1, len(lines) + 1):
        try:
            read = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value
        if len(walk(read, keys)[0]) == len(keys):
            return whole + 1
        whole = count
    return None


def walk(table: Mapping[str, Any], keys: Keys) -> tuple[Keys, Any]:
    """Follow ``keys`` as far as they lead; return those that did, and the value there."""
    value: Any = table
    for depth, key in enumerate(keys):
        if isinstance(value, Mapping) and key in value:
            value = value[str(key)]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return keys[:depth], value
    return keys, value


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
