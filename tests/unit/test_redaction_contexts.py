"""What must go and what must stay, each in the places where it turns up: prose, JSON at three depths, code, logs."""

import json
from collections.abc import Callable

import pytest

from gateway.tracing.redaction.redactor import Redactor

# A value that is recognized by itself, wherever it stands.
GO = {
    "EMAIL": [
        "ann.lee@example.com",
        "o.k+tag@mail.example.co.uk",
        "zoë@exämple.de",
        "ann%40example.com",
        "x_1@a-b.museum",
    ],
    "PHONE": [
        "+1-202-555-0173",
        "+49 (0)151 12345678",
        "+442079460958",
        "+33 6 12 34 56 78",
        "(415) 555-2671",
        "415-555-2671",
        "+91 98765 43210",
        "+86 138 0013 8000",
        "020 7946 0958",
        "0049 151 12345678",
        "(11) 98765-4321",
    ],
    "CARD": ["4111 1111 1111 1111", "5555555555554444", "3782 822463 10005", "6011-0009-9013-9424", "3530111333300000"],
    "IBAN": [
        "DE89370400440532013000",
        "GB82 WEST 1234 5698 7654 32",
        "FR1420041010050500013M02606",
        "NL91-ABNA-0417-1643-00",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ],
    "SSN": ["219-09-9999", "078-05-1120", "457 55 5462"],
    "IP": [
        "203.0.113.77",
        "198.51.100.4",
        "10.23.4.5",
        "2001:db8::ff00:42:8329",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "fe80::1ff:fe23:4567:890a",
        "::ffff:203.0.113.9",
    ],
    "KEY": [
        "sk-proj-abcdEFGH1234567890abcd",
        "sk-ant-api03-AbCdEfGhIjKlMnOpQrSt-uv",
        "AKIAIOSFODNN7EXAMPLE",
        "AIzaSyA0123456789abcdefghijklmnopqrstu",
        "ghp_abcdefghijklmnopqrst0123456789abcdef",
        "glpat-abcdefghij0123456789",
        "xoxb-123456789012-abcdefghij",
        "sk_live_abcdefghij0123456789",
        "hf_abcdefghijklmnopqrstuvwx",
        "npm_abcdefghijklmnopqrstuvwxyz0123456789",
        "pypi-AgEIcHlwaS5vcmcCJGFiY2RlZg",
        "SG.abcdefghijklmnopqrstuv.abcdefghijklmnopqrstuvwxyz0123456789abcdefg",
        "SK0123456789abcdef0123456789abcdef",
        "dop_v1_" + "0a" * 32,
        "dapi" + "0a" * 16,
        "123456789:AAabcdefghijklmnopqrstuvwxyz0123456",
        "gw_0a1b2c3d_" + "x" * 43,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_123",
        "abC8Q~0123456789abcdefghijklmnopqrstu",
        "MTA1234567890123456789012.GabcdE.abcdefghijklmnopqrstuvwxyz012345",
    ],
    "SECRET": [
        "password=hunter22",
        "DB_PASSWORD: hunter22",
        "postgres://app:hunter22@db/x",
        "https://a.example/x?token=hunter22&page=2",
        "https://a.example/x?sig=hunter22%2F",
        "--password hunter22",
        "Cookie: sid=hunter22; theme=dark",
        "my password is hunter22",
        "X-Amz-Signature=1&x=2&X-Amz-Signature=hunter22",
        "Passwort: hunter22",
        "пароль: hunter22",
        "AccountKey=hunter22==",
        "curl -u ann:hunter22 x",
        "api_key: hunter22",
        "<password>hunter22</password>",
    ],
}

STAY = """
order 1234567890|order #A-1001-2002|order 415-555-2671|invoice INV-2024-001234|PO 4500123456
payment pi_3MtwBwLkdIwHu7ix28a3tqPa|reservation 7391820456|booking ref QX7RTL|tracking 1Z999AA10123456784
tracking 9400 1000 0000 0000 0000 00|part 123-45-6789|ISBN 978-3-16-148410-0|EAN 4006381333931|SKU 1234-5678-90
1717171717|1717171717171|1700000000123456789|20240131123456|2024-01-31T12:34:56.123456+00:00
2024-01-31 12:34:56,123|01-02-2024|31.01.2024|12:34:56.789|00:1A:2B:3C:4D:5E|550e8400-e29b-41d4-a716-446655440000
0af7651916cd43dd8448eb211c80319c|00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
tr-0123456789abcdef0123456789abcdef|sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
d41d8cd98f00b204e9800998ecf8427e|call_abc123DEF456ghi789jkl0|chatcmpl-AbCdEfGhIjKlMnOp
resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b|v1.2.3|3.11.0rc1|version 1.2.3.4|Chrome/1.2.3.4|pkg==1.2.3.4
section 3.2.1.4|127.0.0.1:8080|255.255.255.0|::1|std::vector|a[1::2]|dead::beef|1.3.6.1.4.1.311|$1,234,567.89
1.234.567,89 EUR|1 234 567 items|3 x 4.50|48.137154, 11.576124|-33.8688, 151.2093|100 000 000 users
4 5 6 7 8 9 10 11 12|max_tokens: 1024|the password is incorrect|password: required|password: str = None
password=os.environ|token_count: 12|page_token: abc|password reset link|secret santa party|bearer of bad news
a phone case 12345678|git@github.com:org/repo|logo@2x.png|@types/node@18.0.0|user@localhost|sk-learn
task-1234567890abcdefghij|risk-assessment-of-the-whole-project|https://example.com:8080/a/b?page=2&key=name
4111 1111 1111 1112|DE89370400440532013001|000-12-3456|666-12-3456|AB12 CDEF|0x1234567890abcdef|1e+1000000000
#ff00aa|5-7 days, 10-12 items|-----BEGIN CERTIFICATE-----|-----BEGIN PUBLIC KEY-----|x@y|price @ store.com
seat 12A, gate 4|12/27|Q3 2024: 4,567,890 units|page 12 of 345
""".strip().replace("\n", "|").split("|")  # fmt: skip

CONTEXTS: dict[str, Callable[[str], str]] = {
    "alone": str,
    "English": lambda v: f"Hello, it is {v}, as I said. Thanks!",
    "German": lambda v: f"Für die Änderung gilt: {v}\nMit freundlichen Grüßen",
    "Japanese": lambda v: f"こちらは {v} です。",
    "lines": lambda v: f"first\n{v}\nlast",
    "JSON": lambda v: json.dumps({"note": v, "n": 1}),
    "JSON in JSON": lambda v: json.dumps({"arguments": json.dumps({"note": f"so\n{v}"}), "ok": True}),
    "JSON three deep": lambda v: json.dumps([json.dumps([json.dumps([f"\t{v}"])])]),
    "JSON beyond ASCII": lambda v: json.dumps({"note": f"é {v} 日本"}, ensure_ascii=False),
    "Python": lambda v: f"raise LookupError({v!r})",
    "log": lambda v: f"2024-01-31 12:34:56,123 ERROR tool: failed for {v} (attempt 2)",
    "Markdown": lambda v: f"| what | value |\n|---|---|\n| it | {v} |",
    "HTML": lambda v: f"<p>so <b>{v}</b></p>",
    "brackets": lambda v: f"({v}) [{v}] \u201c{v}\u201d",
}


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(b"k" * 32)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", GO)
def test_goes(redactor: Redactor, kind: str, context: str) -> None:
    """Each value of the kind is gone, JSON is still JSON, and redacting again changes nothing."""
    for value in GO[kind]:
        text = CONTEXTS[context](value)
        redacted = redactor.text(text, "s")
        core = "hunter22" if kind == "SECRET" else json.dumps(value)[1:-1]
        assert core not in redacted, text
        assert value not in redacted, text
        assert f"<{kind}:" in redacted, text
        if context.startswith("JSON"):
            json.loads(redacted)
        assert redactor.text(redacted, "s") == redacted, text


@pytest.mark.parametrize("context", CONTEXTS)
def test_stays(redactor: Redactor, context: str) -> None:
    """Ids, times, versions, prices, hashes and talk about secrets stay as they are."""
    for value in STAY:
        text = CONTEXTS[context](value)
        assert redactor.text(text, "s") == text
