"""Whether the arguments of a tool call fit the tool's JSON Schema. Asked before redaction, which would spoil them."""

import functools
from typing import Any

import jsonschema_rs
import msgspec

VALID = "gateway.arguments_valid"
ERROR = "gateway.arguments_error"
_CACHED_SCHEMAS = 1024


def check_arguments(given: Any, schema: Any) -> dict[str, Any]:
    """Return the attributes that say whether ``given`` fits; none if the schema cannot be used.

    Args:
        given: the arguments; a text if they were not JSON.
        schema: the tool's parameters, as JSON Schema.
    """
    if isinstance(given, str):
        return {VALID: False, ERROR: "not JSON"}
    try:
        validator = _validator(msgspec.json.encode(schema))
        if validator is None or validator.is_valid(given):
            return {VALID: True} if validator else {}
        return {VALID: False, ERROR: _reason(next(validator.iter_errors(given)))}
    except (TypeError, ValueError, OverflowError):  # a schema, or a number, that has no form in JSON
        return {}


@functools.lru_cache(maxsize=_CACHED_SCHEMAS)
def _validator(schema: bytes) -> Any:
    """Return the compiled schema; ``None`` if it is not one, or one that refers to another somewhere else."""
    try:
        # The regular expressions of this kind take linear time, whatever the schema asks for.
        return jsonschema_rs.validator_for(
            msgspec.json.decode(schema), pattern_options=jsonschema_rs.RegexOptions(), retriever=_fetch_nothing
        )
    except (ValueError, LookupError):
        return None


def _fetch_nothing(uri: str) -> Any:
    raise LookupError(uri)


def _reason(error: Any) -> str:
    """Return where and what, without the value."""
    place = "/".join(map(str, error.instance_path))
    what = error.kind.property if error.kind.name == "required" else ""
    return f"{place or 'arguments'}: {error.kind.name} {what}".strip()
