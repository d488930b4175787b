"""Objects as the JSON-like values that they would be stored as."""

import dataclasses
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

import msgspec


def plain(value: Any) -> Any:
    """Return one layer of ``value`` as a string, a list or a dict, whatever it is; what is within is left as it is.

    Bytes are taken as the text that they are in UTF-8. Others only say how many there are: nothing could be found in
    them, so nothing of them is let through.
    """
    match value:
        case bytes() | bytearray() | memoryview():
            return _text(bytes(value))
        case Enum():
            return value.value
        case BaseException():
            return f"{type(value).__name__}: {value}"
        case msgspec.Struct():
            fields = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
            return {encoded: getattr(value, name) for name, encoded in fields}
        case Mapping():
            return dict(value.items())
        case type():
            return value.__qualname__
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Collection) and not isinstance(value, str):
        return list(value)
    return str(value)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"<{len(data)} bytes>"
