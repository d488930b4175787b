"""Redaction: what must never leave the process, and what must stay for a trace to be of use."""

import json
import random
import re
import time
from collections.abc import Callable

import msgspec
import pytest
from pydantic import BaseModel

from gateway.tracing.redaction.checks import is_card_number
from gateway.tracing.redaction.redactor import PLACEHOLDER, Redactor

CARD = "4111 1111 1111 1111"
API_KEY = "sk-abcdefghij0123456789"


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(b"k" * 32)


def kinds(text: str) -> list[str]:
    """The kinds of the placeholders in a text, in order."""
    return re.findall(r"<([A-Z][A-Z0-9_]*)(?::[a-z2-7]{4})?>", text)


FOUND = {
    "EMAIL": [
        ("write to [ann.lee@example.com].", "ann.lee"),
        ("[Ann.Lee+news@mail.example.co.uk]", "Lee+news"),
        ("[jörg.müller@müller.example]", "müller"),
        ("decomposed [jose\u0301@example.com]", "jose"),
        ("[иван@пример.рф]", "иван"),
        ("[用户@例子.中国]", "用户"),
        ("<[bob@example.com]>", "bob"),
        ("mailto:[bob@example.com]?subject=x", "bob@"),
        ("/orders?email=[bob%40example.com]&page=2", "bob%40"),
        ("a,[b_c@example.org],d", "b_c@"),
    ],
    "CARD": [
        (f"my card is [{CARD}].", "4111"),
        ("[4111111111111111]", "4111"),
        ("[5105-1051-0510-5100]", "5105"),
        ("[2223003122003222]", "2223"),
        ("amex [3782 822463 10005]", "3782"),
        ("[30569309025904]", "3056"),
        ("jcb [3530111333300000]", "3530"),
        ("[6011000990139424]", "6011"),
        ("[6250941006528599]", "6250"),
        ("[4111\u00a01111\u00a01111\u00a01111]", "1111"),
        (f"[{CARD}] 12/27 123", "4111"),
        (f"2 tickets on 12 34 [{CARD}]", "1111"),
        ("6 [4111111111111111] 6", "4111"),
        ("No.[4111111111111111]", "4111"),
        ('{"n":[4111111111111111]}', "4111"),
    ],
    "PHONE": [
        ("call [+1-202-555-0173]", "555"),
        ("[+49 (0)151 12345678]", "12345678"),
        ("[+33 6 12 34 56 78]", "12 34"),
        ("[+4915112345678]", "151"),
        ("[0049 151 12345678]", "151"),
        ("[(415) 555-2671]", "2671"),
        ("1-[800-555-0199] is free", "0199"),
        ("[415.555.2671]", "2671"),
        ("[0151 2345678]", "2345678"),
        ("[030/1234567]", "1234567"),
        ("[06 12 34 56 78]", "12 34"),
        ("my phone number is [5551234567]", "5551234567"),
        ("Tel.: [2345678]", "2345678"),
        ("call me at [555 123 4567]", "4567"),
        ('"phone": "[5551234567]"', "5551234567"),
        ('"phone_number": "[5551234567]"', "5551234567"),
    ],
    "KEY": [
        (f"[{API_KEY}]", "sk-a"),
        ("[sk_live_abcdefghij0123456789]", "sk_live"),
        ("[ghp_abcdefghijklmnopqrst0123456789abcdef]", "ghp_"),
        ("[github_pat_11ABCDEFG0abcdefghijkl_mnop]", "11ABC"),
        ("[glpat-abcdefghij0123456789]", "glpat"),
        ("[AKIAABCDEFGHIJKLMNOP]", "AKIA"),
        ("[AIzaSyA0123456789abcdefghijklmnopqrstu]", "AIza"),
        ("[xoxb-123456789012-abcdefghij]", "xoxb"),
        ("[hf_abcdefghijklmnopqrstuvwx]", "hf_"),
        (f"[gw_0a1b2c3d_{'x' * 43}]", "gw_"),
        ("[eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_123]", "eyJ"),
        ("Bearer [abcdef.0123456789~abcdef]", "abcdef"),
        ("Authorization: Basic [dXNlcjpwYXNzd29yZA==]", "dXNl"),
        ("[-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIE\n-----END RSA PRIVATE KEY-----]", "MIIE"),
        ("[-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQdG\n-----END PGP PRIVATE KEY BLOCK-----]", "lQdG"),
        ("[-----BEGIN PRIVATE KEY-----\\nMIIE, cut off]", "MIIE"),
    ],
    "SECRET": [
        ("password=[hunter22]", "hunter22"),
        ("my password is [hunter22]", "hunter22"),
        ("password is: [hunter22]", "hunter22"),
        ("DB_PASSWORD=[hunter22]", "hunter22"),
        ("aws_secret_access_key = [wJalrXUtnFEMIbPxRfiCY]", "wJal"),
        ("api key: [abcd1234]", "abcd"),
        ("refresh_token=[abcd1234]", "abcd"),
        ('{"password": "[correct horse, battery]"}', "horse"),
        ("{'password': '[correct horse]'}", "horse"),
        ("<password>[hunter22]</password>", "hunter22"),
        ("postgres://app:[s3cret-pw]@localhost/db", "s3cret"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "marked", "part"), [(kind, *example) for kind, examples in FOUND.items() for example in examples]
)
def test_found(redactor, kind, marked, part):
    """What is personal or secret becomes one placeholder of its kind, and the text around it stays."""
    head, tail = (marked[: marked.index("[")], marked[marked.rindex("]") + 1 :])
    text = head + marked[len(head) + 1 : len(marked) - len(tail) - 1] + tail

    redacted = redactor.text(text)

    assert part not in redacted
    assert kinds(redacted) == [kind]
    assert redacted.startswith(head)
    assert redacted.endswith(tail)


STAYS = """
order A-1001
order 1234567890
0012345678
order 012-3456789-0123456
part 123-456-7890-1
invoice INV-2024-001234
PO 4500123456
tracking 1Z999AA10123456784
tracking 9400 1000 0000 0000 0000 00
ISBN 978-3-16-148410-0
EAN 4006381333931
IBAN DE89370400440532013001
reservation 4111111111111112
payment 1111111111111111
1717171717171
1700000000123456789
1700000000-1700003600
20240131123456
2024-01-31
31.01.2024
01/31/2024
2024-01-31T12:34:56.123456+00:00
2024-01-31 12:34:56,123
2024-01-31 - 2024-02-28
12:34:56
v1.2.3
3.11.0rc1
@types/node@18.0.0
127.0.0.1:8080
255.255.255.255
version 10.0.0.1
::1
00:1A:2B:3C:4D:5E
550e8400-e29b-41d4-a716-446655440000
d41d8cd98f00b204e9800998ecf8427e
sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
0x1234567890abcdef
call_abc123DEF456ghi789jkl0
call_4111111111111111
resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b
tr-0123456789abcdef0123456789abcdef
chatcmpl-AbCdEfGhIjKlMnOp
task-1234567890abcdefghij
$1,234,567.89
1.234.567,89 EUR
1 234 567 items
0.4012888888881881
4.111111111111111
-0.1234567
1e+1000000000
1234567 + 7654321
1234567+7654321
12345678+87654321
x=+1234567
+1234567.89
+1,234,567
5,000,000 - 4,999,999
2 * (3 + 4) - 15 % of 240
4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
51 52 53 54 55 56 57 58 59
48.137154, 11.576124
foo@bar and user@localhost
price @ store.com
tel aviv 1234567
a phone case 12345678
phone order 1234567
cell B12 1234567
the password is incorrect.
"secret": true
password reset link
a secretary is here
bearer of bad news
risk-assessment-of-the-whole-project
max_tokens: 1024
https://example.com:8080/a/b?page=2
""".strip().splitlines()


@pytest.mark.parametrize("text", STAYS)
def test_stays(redactor, text):
    """Ids, dates, prices, versions, hashes and arithmetic stay as they are, alone and within JSON."""
    assert redactor.text(text) == text
    assert redactor.text(json.dumps({"value": text})) == json.dumps({"value": text})


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "secret", ["ann@example.com", "josé@example.com", CARD, "415-555-2671", "0151 2345678", "+4915112345678", API_KEY]
)
def test_json_in_json(redactor, depth, secret):
    """A value behind an escaped line break, in JSON that was put into strings, is found; the JSON stays whole."""
    (kind,) = kinds(redactor.text(secret))
    nested = text = f"it is\n{secret}\nby now"
    for _ in range(depth):
        nested = json.dumps({"text": nested})

    redacted = redactor.text(nested, "s")
    for _ in range(depth):
        redacted = json.loads(redacted)["text"]

    assert kinds(redacted) == [kind]
    assert PLACEHOLDER.sub(secret, redacted) == text


def test_json_in_json_field_name(redactor):
    """A field's name is understood in JSON within JSON, where quotes are escaped."""
    nested = json.dumps({"arguments": json.dumps({"password": "correct horse", "to": "Rome"})})

    inner = json.loads(json.loads(redactor.text(nested))["arguments"])

    assert kinds(inner["password"]) == ["SECRET"]
    assert "horse" not in inner["password"]
    assert inner["to"] == "Rome"


def test_surrogate(redactor):
    """Half a surrogate pair does not keep the rest of the text from being redacted, nor from being stored."""
    redacted = redactor.text("\ud800 ann@example.com")

    assert kinds(redacted) == ["EMAIL"]
    redacted.encode()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ann@example.com", "Ann@Example.com"),
        ("4111 1111 1111 1111", "4111-1111-1111-1111"),
        ("+1-202-555-0173", "+1 (202) 555 0173"),
        ("password: hunter22", "password=hunter22."),
    ],
)
def test_same_value_same_placeholder(redactor, one, other):
    """Two ways of writing one value give one placeholder within a scope."""
    assert PLACEHOLDER.findall(redactor.text(one, "s")) == PLACEHOLDER.findall(redactor.text(other, "s"))


def test_placeholders_are_not_linkable(redactor):
    """One value has different placeholders in two sessions and with two keys, and two values differ in one."""
    text = "ann@example.com"
    placeholders = {
        redactor.text(text, "s-1"),
        redactor.text(text, "s-2"),
        redactor.text("bob@example.com", "s-1"),
        Redactor(b"j" * 32).text(text, "s-1"),
    }
    assert len(placeholders) == 4


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "passwd",
        "db_password",
        "userPassword",
        "passphrase",
        "pwd",
        "secret",
        "client_secret",
        "clientSecret",
        "api_key",
        "apiKey",
        "x-api-key",
        "secret_key",
        "privateKey",
        "token",
        "access_token",
        "accessToken",
        "Authorization",
    ],
)
@pytest.mark.parametrize("value", ["zzz", 1234, ["zzz", "yyy"], "Basic zzz"])
def test_secret_field(redactor, name, value):
    """What stands under a name that says it is secret goes, whatever it looks like."""
    text = json.dumps(redactor.value({name: value}))
    assert not any(part in text for part in ("zzz", "yyy", "1234"))
    assert set(kinds(text)) == {"SECRET"}


@pytest.mark.parametrize(
    "name", ["phone", "phone_number", "phoneNumber", "home-phone", "mobile", "mobile_no", "telephone", "fax"]
)
@pytest.mark.parametrize("value", ["5551234567", 5551234567])
def test_phone_field(redactor, name, value):
    """A bare number under a name that says phone is a phone number."""
    assert kinds(redactor.value({name: value})[name]) == ["PHONE"]


@pytest.mark.parametrize(
    "item",
    [
        {"input_tokens": 12, "max_token": 5, "total_tokens": 30},
        {"token_count": 3, "tokenizer": "bpe", "secretary": "Kim", "keyboard": "qwerty", "phones": 3},
        {"password": None, "secret": False, "token": "", "api_key": []},
        {"password": {"type": "string", "description": "at least 8 characters"}, "required": ["password"]},
        {"name": "Ann", "order_id": 1234567890, "price": 12.5, "ok": True, "none": None, "tags": ["a", 1]},
        {"at_ms": 1717171717171, "big": 2**100, "huge": 10**5000, "negative": -4111111111111111},
    ],
)
def test_fields_that_stay(redactor, item):
    """Counts, schemas, empty values, ids and numbers of any size stay under their names."""
    assert redactor.value(item) == item


def test_numbers_that_are_cards(redactor):
    """A number that is a card's goes, also in a list; its neighbours stay numbers."""
    card, other = redactor.value([4111111111111111, 4111111111111112])
    assert kinds(card) == ["CARD"]
    assert card == redactor.text(CARD)
    assert other == 4111111111111112


@pytest.mark.parametrize(
    ("digits", "expected"),
    [("4111111111111111", True), ("378282246310005", True), ("4111111111111112", False), ("0000000000000000", False),
     ("1717171717171", False), ("79927398713", False), ("", False), ("411111111111111a", False)],
)  # fmt: skip
def test_is_card_number(digits, expected):
    """A card's number has a scheme's prefix, its length, and Luhn's checksum."""
    assert is_card_number(digits) is expected


class Model(BaseModel):
    name: str
    note: str | None = None
    password: str = "hunter22"


class Struct(msgspec.Struct):
    email: str
    inner: list[str]


class Opaque:
    """Any object whose text gives something away."""

    def __str__(self) -> str:  # noqa: D105
        return "Opaque(ann@example.com)"


def test_objects(redactor):
    """Models, structs and any other object are taken as the JSON or text they would be stored as."""
    value = {
        "model": Model(name="ann@example.com"),
        "struct": Struct("ann@example.com", ["bob@example.com"]),
        "opaque": [Opaque()],
        "set": {"ann@example.com"},
        "tuple": (1, "ann@example.com"),
        "bytes": b"ann@example.com",
    }

    redacted = redactor.value(value)

    assert "example.com" not in json.dumps(redacted)
    assert kinds(redacted["model"]["name"]) == ["EMAIL"]
    assert kinds(redacted["model"]["password"]) == ["SECRET"]
    assert kinds(redacted["struct"]["inner"][0]) == ["EMAIL"]
    assert redacted["opaque"] == [f"Opaque({redactor.text('ann@example.com')})"]
    assert redacted["tuple"][0] == 1


def test_nested_and_keys(redactor):
    """Values are found at any depth, and in the keys of mappings; the argument is left as it was."""
    value = {"a": [{"b": {"ann@example.com": ["x", {"c": CARD}]}}], 7: "seven"}
    before = json.dumps(value)

    redacted = redactor.value(value, "s")

    email = redactor.text("ann@example.com", "s")
    assert redacted == {"a": [{"b": {email: ["x", {"c": redactor.text(CARD, "s")}]}}], "7": "seven"}
    assert json.dumps(value) == before


def test_idempotent(redactor):
    """Redacting what was redacted changes nothing, in text and in values."""
    texts = [text.replace("[", "").replace("]", "") for examples in FOUND.values() for text, _ in examples]
    everything = {
        "all": "\n".join(texts),
        "each": texts,
        "password": "p",
        "phone": 5551234567,
        "json": json.dumps(texts),
    }

    once = redactor.value(everything, "s")

    assert redactor.value(once, "s") == once
    assert [redactor.text(redactor.text(text)) for text in texts] == [redactor.text(text) for text in texts]


def test_identifier(redactor):
    """An id that is not personal stays; a personal one becomes the same hash in every session, one for each kind."""
    assert redactor.identifier("user-1001", "user") == "user-1001"
    hashed = redactor.identifier("ann@example.com", "user")
    assert hashed.startswith("user-")
    assert "ann" not in hashed
    assert hashed == redactor.identifier("ann@example.com", "user")
    assert hashed[5:] != redactor.identifier("ann@example.com", "session")[8:]
    assert redactor.identifier(hashed, "user") == hashed


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _card(rng: random.Random) -> str:
    body = rng.choice(["4", "51", "62", "37"])
    body += _digits(rng, (14 if body == "37" else 15) - len(body))
    number = next(body + str(check) for check in range(10) if is_card_number(body + str(check)))
    separator = rng.choice(["", " ", "-"])
    return separator.join(number[at : at + 4] for at in range(0, len(number), 4)) if len(number) == 16 else number


def _email(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzäéñжд"
    local, host = ("".join(rng.choices(letters, k=rng.randint(3, 12))) for _ in range(2))
    return f"{local}{rng.choice(['', '.', '+', '_'])}{_digits(rng, 3)}@{host}.{rng.choice(['com', 'de', 'co.uk'])}"


def _key(rng: random.Random) -> str:
    prefix = rng.choice(["sk-", "sk-proj-", "ghp_", "hf_", "sk_live_", "glpat-"])
    return prefix + "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789", k=36))


def _surroundings(rng: random.Random) -> str:
    pieces = [
        "order A-1001",
        "12 34",
        '{"a": ',
        "\\n",
        "\n",
        "é",
        "日本",
        "$5.00",
        "<b>",
        "x=",
        "(",
        "2024-01-31",
        "🙂",
    ]
    return " ".join(rng.choices(pieces, k=rng.randint(0, 8)))


@pytest.mark.parametrize(("kind", "make"), [("CARD", _card), ("EMAIL", _email), ("KEY", _key)])
def test_planted_values_never_stay(redactor, kind: str, make: Callable[[random.Random], str]):
    """A value planted in random text is never left in it, plain or in JSON, and redacting again changes nothing."""
    rng = random.Random(kind)
    for _ in range(1_000):
        planted = make(rng)
        text = f"{_surroundings(rng)}{rng.choice([' ', chr(10), '(', ':', ','])}{planted}{rng.choice([' ', ')', ''])} "
        text += _surroundings(rng)
        for written in (text, json.dumps(text), json.dumps(text, ensure_ascii=False)):
            redacted = redactor.text(written)
            assert planted not in redacted, written
            assert kind in kinds(redacted), written
            assert redactor.text(redacted) == redacted, written


PATHOLOGICAL = {
    "addresses that never end": "a@",
    "one run of digits": "1-",
    "groups like a card's": "4444-",
    "secrets without a value": "password=",
    "secrets with one": "password=hunter22 ",
    "an open quote": 'password="',
    "keys that never end": "-----BEGIN PRIVATE KEY-----",
    "tokens": "eyJaaaaaaaa.",
    "backslashes": "\\n",
    "plus signs": "+1",
    "dots": "a.",
    "colons": "://a:",
    "placeholders": "<SECRET:abcd> ",
    "one word": "x",
    "one word beyond ASCII": "é",
}


@pytest.mark.parametrize("unit", PATHOLOGICAL.values(), ids=PATHOLOGICAL.keys())
def test_linear_time(redactor, unit):
    """Four times the text takes about four times as long, whatever is in it."""

    def seconds(characters: int) -> float:
        text = unit * (characters // len(unit))
        times = []
        for _ in range(3):
            started = time.process_time()
            redactor.text(text)
            times.append(time.process_time() - started)
        return min(times)

    small, large = seconds(50_000), seconds(200_000)
    # A few milliseconds say nothing but that it is fast; quadratic time would be a ratio of 16.
    assert large < 0.05 or large / small < 8


def test_a_word_of_five_megabytes(redactor):
    """A word of 5 MB is let through in a moment."""
    word = "x" * 5_000_000
    started = time.process_time()
    assert redactor.text(word) == word
    assert time.process_time() - started < 2


def test_large_text_hides_nothing(redactor):
    """A value at the end of megabytes of random Unicode is still found: the scan does not give up half-way."""
    rng = random.Random(1)
    noise = "".join(map(chr, rng.choices([*range(32, 127), *range(0xA1, 0x3000), *range(0x4E00, 0x9FFF)], k=1_000_000)))
    redacted = redactor.text(f"{noise} {API_KEY} {CARD} password=hunter22")
    assert all(planted not in redacted for planted in (API_KEY, CARD, "hunter22"))
