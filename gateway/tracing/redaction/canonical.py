"""The form by which two ways of writing one value are the same."""

import ipaddress
import re
import unicodedata
from urllib.parse import unquote

_DIGITS = re.compile(r"[0-9]+")
_ESCAPE = re.compile(rb"(?<!\\)\\+u(?:([dD][89abAB][0-9a-fA-F]{2})\\+u([dD][c-fC-F][0-9a-fA-F]{2})|([0-9a-fA-F]{4}))")
_KEPT = frozenset({ord('"'), ord("\\"), ord("'"), 0x7F})


def simplify(data: bytes) -> bytes:
    r"""Return text with JSON's ``\u0040`` written as ``@``, and so for all that needs no escape, at any depth of JSON.

    Either way of writing is the same JSON.
    """
    return _ESCAPE.sub(_character, data)


def _character(match: re.Match[bytes]) -> bytes:
    high, low, single = match.groups()
    code = int(single, 16) if single else 0x10000 + ((int(high, 16) - 0xD800) << 10) + (int(low, 16) - 0xDC00)
    if code < 0x20 or code in _KEPT or 0xD800 <= code < 0xE000:
        return match[0]
    return chr(code).encode()


def canonical(kind: str, found: str) -> str:
    """Return what the placeholder's hash is made of."""
    match kind:
        case "EMAIL":
            text = unquote(found.replace("&#64;", "@").replace("&#x40;", "@"))
            return unicodedata.normalize("NFC", text).lower()
        case "PHONE":
            return _phone(found)
        case "CARD" | "SSN":
            return "".join(_DIGITS.findall(found)) or found
        case "IBAN":
            return "".join(char for char in found if char.isascii() and char.isalnum()).upper()
        case "IP":
            return _address(found)
        case _:
            text = found.replace("\\", "")
            return unquote(text.rstrip(".!?") or text)


def _phone(found: str) -> str:
    """Digits with the country code, if there is one; a trunk prefix in brackets, 00 and North America's 1 left out."""
    digits = "".join(_DIGITS.findall(found.replace("%2B", "+").replace("%2b", "+").replace("(0)", ""))) or found
    digits = digits.removeprefix("00")
    return digits[1:] if len(digits) == 11 and digits[0] == "1" else digits


def _address(found: str) -> str:
    address = ipaddress.ip_address(found)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
