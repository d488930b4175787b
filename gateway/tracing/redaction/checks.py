"""A close look at what an expression found: checksums, ranges, and what stands around it.

Each function takes UTF-8 bytes and a span, and yields the spans that really are such values, in order. All are linear
in what they look at: they look back a fixed number of bytes, and forward no further than the value reaches.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any

import re2

Span = tuple[int, int]
Find = Callable[[bytes, int, int], Iterator[Span]]

_LOOK_BACK_BYTES = 32


def _look_back(expression: bytes) -> Any:
    """Compile an expression of many words for the text before a value: RE2 tries them all in one pass."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.case_sensitive = False
    return re2.compile(expression, options)


def whole(_data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the span as it is."""
    yield start, end


# --- Secrets ---------------------------------------------------------------------------------------------------------

# What follows "password:" or "the token is" in prose, code and schemas without being one.
_NO_SECRETS = frozenset(
    b"""
    a above accepted all also always an and another any are as at attribute bad been before being below between blank
    blocked bool boolean bytes but by can changed char column compromised correct default denied different disabled
    empty enabled encrypted enough example expired expires false field fine for forgotten from function generated good
    gone has hashed have her here hidden his how if in incorrect int integer invalid is it its just known leaked leer
    length locked long lost mandatory masked may minimum missing more must my needed never new nil no none not null
    number object of ok okay old on only optional or our protected rejected required reset reused safe same saved
    secret secure see sent set shown short should still stored str string strong than that the their them there these
    they this to too true type undefined unknown unset until updated used user valid value varchar very was weak were
    what when where which will with without wrong you your yes
    password passwort pwd token key falsch ungueltig richtig incorrecta incorrecto vide leeg
    """.split()
)
_REFERENCE = re.compile(
    rb"\$\{?\w+\}?|\$\(.*|\{\{.*|%\(?\w+\)?s?|<.*|[*.xX#\xe2\x80\xa2\xa6-]{3,}|\[?redacted\]?|\(?hidden\)?"
    rb"|(?:os\.|process\.env|getpass|env\.|env\[|config\.|settings\.|self\.|request\.|st\.secrets|secrets\.|vault\b).*"
    rb"|[A-Za-z_][\w.]*\([^)]*\)?[:;,]?|(?:Optional|List|Union|Annotated|Literal|dict|list)\[.*|SecretStr.*",
    re.IGNORECASE,
)
_OPENING = re.compile(rb"[\[(]?\s?(?:[bfru]{0,2}(\\*)([\"'`]))", re.IGNORECASE)
_QUOTED_RUN = re.compile(rb"[^\"'`\\\r\n]*")
_BARE_RUN = re.compile(rb"[^\s\"'`<>\\]*")
_BACKSLASHES = re.compile(rb"\\+")
# The next pair, or a closing quote, bracket or stop beyond ASCII.
_NEXT = re.compile(
    rb"[,;&|][\w.-]*[=:]|\xe2\x80[\x98-\x9f]|\xc2[\xab\xbb]|\xe3\x80[\x80-\x91]|\xef\xbc[\x81\x89\x8c\x9b]"
)
_CLOSING_TAG = re.compile(rb"</[\w.:-]*$")
_AROUND = b".,;:!?)]}({["


def secret(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the span unless it says something about a secret instead of being one."""
    value = data[start:end].rstrip(_AROUND)
    if value and value.lower() not in _NO_SECRETS and not _REFERENCE.fullmatch(value):
        yield start, end


def secret_after(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the secret that begins at ``end``: the span is what gives it away, such as ``password=``."""
    if data[end - 1 : end] == b">" and _CLOSING_TAG.search(data[max(start - _LOOK_BACK_BYTES, 0) : start]):
        return
    opening = _OPENING.match(data, end)
    if opening:
        first = opening.end()
        last = _closing(data, first, len(opening[1]), opening[2])
        value = data[first:last]
        if value.strip() and value.lower() not in _NO_SECRETS and not _REFERENCE.fullmatch(value):
            yield first, last
        return
    first, last = end, _bare_end(data, end)
    value = data[first:last]
    is_prose = b":" not in data[start:end] and b"=" not in data[start:end]
    if len(value) >= (3 if is_prose else 1) and value[:1] not in b"{[(":
        yield from secret(data, first, last)


def token_after(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield what stands quoted behind the name ``"token"``, unless the name is that of a page's token."""
    if not re.search(
        rb"(?:page|next|cursor|continuation|sync|max|total|input|output|prompt|completion)[_-]", data[start:end].lower()
    ):
        yield from (span for span in secret_after(data, start, end) if span[1] - span[0] >= 6)


def _closing(data: bytes, at: int, backslashes: int, quote: bytes) -> int:
    """Return where the quoted text ends whose opening quote had so many backslashes; the line's end if it is open.

    In JSON within JSON, a quote that belongs to the text has more backslashes than those around it.
    """
    while at < len(data):
        at = _QUOTED_RUN.match(data, at).end()  # type: ignore[union-attr]
        run = _BACKSLASHES.match(data, at)
        behind = run.end() if run else at
        mark = data[behind : behind + 1]
        if mark in {b"", b"\r", b"\n"} or (mark == quote and behind - at <= backslashes):
            return at if mark == quote else behind
        at = behind + 1
    return at


def _bare_end(data: bytes, at: int) -> int:
    """Return where a secret without quotes ends: at a blank, a quote, an escaped line break, or the next pair."""
    start = at
    while True:
        at = _BARE_RUN.match(data, at).end()  # type: ignore[union-attr]
        if data[at : at + 1] != b"\\" or data[at + 1 : at + 2] in b"nrtu\\\"'":
            break
        at += 1
    following = _NEXT.search(data, start, at)
    value = data[start : following.start() if following else at]
    return start + len(value.rstrip(_AROUND) or value)


def mixed(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the span if it has digits and letters: what a word or a number is not."""
    value = data[start:end]
    if re.search(rb"[0-9]", value) and re.search(rb"[A-Za-z]", value):
        yield start, end


def token(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the span unless it is words with hyphens between them."""
    value = data[start:end]
    if not value.startswith(b"sk-") or re.search(rb"[0-9A-Z]|[a-z]{20}", value):
        yield start, end


def query(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the parameter's value; short ones of names that mean other things as well are none."""
    name = data[max(start - 9, 0) : start].lower()
    is_vague = re.search(rb"[?&;](?:code|key|policy)=$", name)
    if end - start >= (12 if is_vague else 1):
        yield from secret(data, start, end)


def authorization(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the credentials of an ``Authorization`` header, without the scheme's name."""
    if data[start:end][:13].lower() != b"authorization":
        yield start, end
        return
    scheme = re.compile(rb"(?i)authorization[\"'\\]{0,8}\s*[:=]\s*[\"'\\]{0,8}([a-z0-9-]+\s+)?").match(data, start, end)
    first = scheme.end() if scheme else start
    yield from secret(data, first, end)


# --- Addresses -------------------------------------------------------------------------------------------------------

_NOT_IN_ADDRESS = (
    r"\s\"'<>()\[\]{},;:|\\/=!?&#$*^`~@"
    r"\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb\u2013\u2014\u3001"
    r"\u3002\uff0c\uff1a\uff1b\uff08\uff09\u3010\u3011\u300c\u300d\u00a0\u202f"
)
_ADDRESS_RUN = re.compile(rf"[^{_NOT_IN_ADDRESS}]+")
_PERCENT_CODES = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_AT = re.compile(r"@|%40|&#64;|&#x40;")
_APOSTROPHE = re.compile(rb"(?<![A-Za-z0-9])(?:[A-Za-z]{1,20}\.)?[ODod]'\Z")  # of O'Neil, not of b'text'
_TOP_LEVEL = re.compile(r"xn--[a-z0-9-]+|[^\W\d_]{2,}", re.IGNORECASE)
_FILE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "gif", "webp", "svg", "service", "timer", "socket", "mount", "slice"})


def email(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the address within a run of letters, dots and the like around an at sign."""
    if data[start - 1 : start] == b"\\" and data[start : start + 1] in b"nrt":
        start += 1
    text = data[start:end].decode("utf-8", "surrogateescape")
    for at in _AT.finditer(text):
        # Backwards, so that it is one pass, however long the run is.
        before = _ADDRESS_RUN.match(text[: at.start()][::-1])
        behind = _ADDRESS_RUN.match(text, at.end())
        if not before or not behind:
            continue
        local = before[0][::-1]
        code = _PERCENT_CODES.match(local)
        local = local[code.end() :] if code else local
        host = _host(behind[0])
        if local.strip(".-") and host and local != "git":
            first = start + len(text[: at.start() - len(local)].encode("utf-8", "surrogateescape"))
            length = len((local + at[0] + host).encode("utf-8", "surrogateescape"))
            is_quoted = data[first - 1 : first] == b"'"
            apostrophe = is_quoted and _APOSTROPHE.search(data, max(first - _LOOK_BACK_BYTES, 0), first)
            yield (apostrophe.start() if apostrophe else first), first + length
        return


def _host(text: str) -> str:
    """Return the part of the text that is a host name with a top-level domain; empty if there is none."""
    labels = text.split(".")
    while len(labels) > 1:
        top = _TOP_LEVEL.match(labels[-1])
        if top and labels[-2] and top[0].lower() not in _FILE_SUFFIXES:
            return ".".join([*labels[:-1], top[0]])
        labels.pop()
    return ""


_A_VERSION = _look_back(
    rb"(?:(?:^|[^a-z]|\\[nrt])v|ver\.?|version|versi\xc3\xb3n|vers\xc3\xa3o|\xe7\x89\x88\xe6\x9c\xac"
    rb"|\xd0\xb2\xd0\xb5\xd1\x80\xd1\x81\xd0\xb8\xd1\x8f|release|build|firmware|section|chapter|clause|abschnitt"
    rb"|kapitel|rfc|oid|\xc2\xa7|[=<>~!]=|\^)[\"'\\]{0,4}(?: is| ist)?[\s:=#]{0,3}[\"'\\]{0,4}$"
)
_PRODUCT = re.compile(rb"(?:^|[^\w/.]|\\[nrt])[A-Z]\w*/$")


def ipv4(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the address unless it is a version, part of a longer number, or one that names no one (loopback, mask)."""
    octets = data[start:end].split(b".")
    if any(int(octet) > 255 or (octet[:1] == b"0" and octet != b"0") for octet in octets):
        return
    if octets[0] in {b"0", b"127", b"255"}:
        return
    before = data[max(start - _LOOK_BACK_BYTES, 0) : start]
    goes_on = re.match(rb"\.[0-9]|[.-](?:alpha|beta|rc|dev|post|tar|zip|whl|tgz|deb|rpm|exe|jar)", data[end : end + 6])
    is_part = re.search(rb"[0-9]\.$|[A-Za-z]-$", before)
    if not goes_on and not is_part and not _A_VERSION.search(before) and not _PRODUCT.search(before):
        yield start, end


_MAX_IPV6_CHARACTERS = 45


def ipv6(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the address. Those in use begin with a group of four digits; ``a::b`` is code, ``::1`` names no one."""
    while data[end - 1 : end] in b":." and end > start:
        end -= 1
    if re.match(rb"[0-9A-Za-z_]|:[0-9A-Fa-f:]", data[end : end + 2]):
        return
    is_escaped = data[max(start - 2, 0) : start] in {b"\\n", b"\\r", b"\\t"}
    if (
        data[start - 1 : start].isalnum() and not is_escaped
    ):  # the end of a word such as "node:" was taken for the first group
        start = data.find(b":", start, end) + 1
    elif re.search(rb"[0-9A-Fa-f:]:$", data[max(start - 2, 0) : start]):
        return
    value = data[start:end]
    is_mapped = value.lower().startswith(b"::ffff:") and b"." in value
    if len(value) > _MAX_IPV6_CHARACTERS or not (is_mapped or re.match(rb"[0-9A-Fa-f]{4}:", value)):
        return
    if not re.search(rb"[0-9]", value):
        return
    try:
        ipaddress.IPv6Address(value.decode())
    except ValueError:
        return
    yield start, end


# --- Numbers ---------------------------------------------------------------------------------------------------------

_DIGITS = re.compile(rb"[0-9]+")
_FIRST_GROUP = re.compile(rb"(?<![0-9])[2-6][0-9]{3,}")
_CARD_NUMBER = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|35[0-9]{14}|3[0689][0-9]{12}"
    r"|6[0-9]{15}|62[0-9]{15,17}"
)
"""Leading digits and lengths of the card schemes in use: one order id in ten passes the checksum by chance."""
MAX_CARD_DIGITS = 19
_MAX_CARD_BYTES = 36  # 19 digits in five groups with separators of up to three bytes, and what tells that it goes on


def is_card_number(digits: str) -> bool:
    """Whether these are a payment card's digits: a scheme's prefix and length, and Luhn's checksum.

    Source: ISO/IEC 7812-1, annex B.
    """
    if not _CARD_NUMBER.fullmatch(digits):
        return False
    numbers = [int(digit) for digit in digits]
    doubled = [number * 2 - 9 * (number > 4) for number in numbers[-2::-2]]
    return (sum(numbers[-1::-2]) + sum(doubled)) % 10 == 0


def card(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the card numbers within a run of digits, which other numbers (a quantity, an expiry date) may be part of.

    A card number is written in groups of four or more digits, only its last one may be shorter.
    """
    if data[start - 1 : start] == b"." and data[max(start - 2, 0) : start - 1].isdigit():
        decimals = _DIGITS.match(data, start, end)
        start = decimals.end() if decimals else start
    free = start
    for first in _FIRST_GROUP.finditer(data, start, end):
        if first.start() < free:
            continue
        digits = ""
        for group in _DIGITS.finditer(data, first.start(), min(first.start() + _MAX_CARD_BYTES, end)):
            digits += group[0].decode()
            if is_card_number(digits):
                free = group.end()
            if len(group[0]) < 4 or len(digits) > MAX_CARD_DIGITS:
                break
        if free > first.start():
            yield first.start(), free


# Characters of an account number by country. Source: SWIFT, IBAN Registry (ISO 13616).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ DZ ES MD PK RO SA SE SK TN VG", 25: "AO CV GW LY MZ PT ST",
        26: "IS TR", 27: "BF BI CF CM DJ FR GR IT MC MG MR SM", 28: "AL AZ BJ BY CI CY DO GT HN HU LB ML NI PL SN SV",
        29: "BR EG PS QA UA", 30: "JO KW YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN_CHARACTER = re.compile(rb"(?:[ .-]|\xc2\xa0|\xe2\x80[\x80-\x8a\x90-\x93\xaf])?([A-Za-z0-9])")


def iban(data: bytes, start: int, _end: int) -> Iterator[Span]:
    """Yield the account number that begins here, if its country's length and the checksum (ISO 7064) say it is one."""
    length = _IBAN_LENGTHS.get(data[start : start + 2].decode().upper())
    if length is None:
        return
    compact, at = b"", start
    while len(compact) < length:
        character = _IBAN_CHARACTER.match(data, at)
        if character is None:
            return
        compact += character[1]
        at = character.end()
    if data[at : at + 1].isalnum():
        return
    rearranged = (compact[4:] + compact[:4]).decode().upper()
    if int("".join(str(int(each, 36)) for each in rearranged)) % 97 == 1:
        yield start, at


_GOES_ON_BEFORE = re.compile(rb"[0-9][-./:]")
_GOES_ON_BEHIND = re.compile(rb"[-.][0-9]")
_DECIMAL = re.compile(rb"\+[0-9]+\.[0-9]{1,2}")
_MONTH_AND_YEAR = re.compile(rb"0[1-9]-(?:19|20)[0-9]{2}-")
_AN_ID = _look_back(
    rb"(?:^|[^a-z]|\\[nrt])(?:order|bestellung|commande|pedido|invoice|rechnung|facture|tracking|shipment|parcel|reservation"
    rb"|booking|transaction|part|sku|product|item|serial|ticket|case|batch|lot|model|isbn|ean|upc|rma|confirmation"
    rb"|article|artikel|policy|contract|document|reference|ref|po|catalog|doi|version|coordinates|range|score)"
    rb"(?:[ _-]?(?:id|no|nr|number|nummer|num|ref|code|key))?\.?[\"'\\]{0,4}(?: is| ist)?[\s:.=#]{0,4}[\"'\\]{0,4}$"
)


def phone(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the span unless digits go on behind it, or before it where that is no area code's leading 1."""
    if data[start : start + 1] == b"\\":  # an escaped line break, and then the number
        start += 2
    goes_on = data[start : start + 1] == b"0" and _GOES_ON_BEFORE.match(data[max(start - 2, 0) : start])
    if goes_on or _GOES_ON_BEHIND.match(data, end) or _DECIMAL.fullmatch(data, start, end):
        return
    if _MONTH_AND_YEAR.match(data, start) or ids_before(data, start):
        return
    yield start, end


def ssn(data: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the number if it is one that is given out. Source: 20 CFR 422.103, and SSA's randomization of 2011."""
    digits = b"".join(_DIGITS.findall(data, start, end)).decode()
    is_given_out = (
        digits[:3] not in {"000", "666"} and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"
    )
    before = data[max(start - 2, 0) : start]
    goes_on = re.search(rb"[0-9][-./:]$", before) or re.match(rb"[-./:][0-9]", data[end : end + 2])
    if is_given_out and not goes_on and not ids_before(data, start):
        yield start, end


def ids_before(data: bytes, start: int) -> bool:
    """Whether the text right before says that this is some other number: an order's, a part's."""
    return data[start : start + 1] != b"+" and bool(_AN_ID.search(data[max(start - _LOOK_BACK_BYTES, 0) : start]))
