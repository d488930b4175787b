r"""What the redactor looks for: one RE2 expression for each way of writing a kind of value.

The expressions run over UTF-8 bytes, in RE2's Latin-1 mode: linear time on any input, and no expression is inflated by
Unicode classes. An expression may be looser than what it is after; its ``find`` (`gateway.tracing.redaction.checks`)
then looks closely. In JSON that was put into a string, a line break is a backslash and an "n", which hides where a word
begins.
"""

from typing import NamedTuple

from gateway.tracing.redaction import checks
from gateway.tracing.redaction.checks import Find

ENTITY_KINDS = ("PERSON", "LOCATION", "GROUP")
"""Placeholders that the optional recognition of names makes (`gateway.evaluation.entities`)."""


class Pattern(NamedTuple):
    """One way of writing one kind of value."""

    kind: str
    """Upper-case label of the placeholder."""
    expression: str
    """RE2 expression, in ASCII. Its group ``value``, if it has one, is what is replaced; else the whole match is."""
    find: Find = checks.whole
    """Narrows that down, or extends it, given the bytes and the span: which parts really are such values."""
    weak: bool = False
    """It is only digits in groups: under a name that says "order number", it is one."""


def _word(text: str) -> str:
    """Return text beyond ASCII as an expression over its UTF-8 bytes."""
    return "".join(char if char.isascii() else "".join(f"\\x{byte:02x}" for byte in char.encode()) for char in text)


def _words(*texts: str) -> str:
    return "|".join(map(_word, texts))


_WIDE_COLON = "\uff1a"
_START = r"(?:\b|\\[nrt])"
_WIDE_BLANK = r"\xc2\xa0|\xe2\x80[\x80-\x8a\x90-\x93\xaf]"  # no-break and thin blanks, hyphens, dashes
_SEP = rf"(?:[ .-]|{_WIDE_BLANK})"
_PHONE_SEP = rf"(?:[ .()/-]|{_WIDE_BLANK})"
_COLON = rf"(?:[:=]+>?|{_word(_WIDE_COLON)})"
_QUOTES = r"[\"'\\]{0,8}"

# What makes the following text a secret: `password=`, `"db_password": `, `my password is `, `<password>`.
_GIVEN_AWAY = (
    r"(?:passw(?:or)?d(?:[_-]?hash)?[0-9]?|passphrase|passcode|pwd|passwort|kennwort|contrasena|senha|wachtwoord|haslo"
    r"|mot de passe|secret(?:[_ -]?(?:access[_ -]?)?key(?:[_ -]?base)?)?"
    r"|(?:api|private|access|account|encryption|signing|master|auth|subscription|service|webhook)[_ -]?key"
    r"|(?:access|auth|refresh|session|bearer|id|api|bot|client|csrf|xsrf|security|personal access|deploy)[_ -]?token)"
)
_SECRET_SAYS = (
    rf"(?i)(?:{_GIVEN_AWAY}\b"
    rf"|{_words('contraseña', 'hasło', 'пароль', 'Пароль', '密码', '密碼', 'パスワード', '비밀번호')})"
    rf"{_QUOTES}\s*(?:(?:is|ist|es|est|lautet|to)\b\s*:?|{_COLON}|>|{_words('是', 'は')})\s*"
)
_PHONE_SAYS = (
    r"(?i)(?:\b(?:(?:phone|mobile|telephone|fax|cell)[_ ]?(?:number|no|nr)?|contact (?:number|no)|tel|cellphone"
    r"|whatsapp|call me|reach me|text me|ring me|contact me|my number|telefon|telefonnummer|rufnummer"
    r"|handy|handynummer|mobil|telefono|telefone"
    r"|celular|cellulare|portable|movil|telefoon)(?:\b|_)"
    rf"|{_words('téléphone', 'teléfono', 'móvil', 'тел', 'Тел', 'телефон', 'Телефон', '电话', '電話', '手机', '전화')})"
)

_TOKENS = (
    r"sk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic, OpenRouter, Langfuse and others
    r"|[rsp]k_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/=]{16,}"  # Stripe
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|gl(?:pat|ptt|dt|rt|cbt|soat|ft|agent|imt|oas|rtr)-[A-Za-z0-9_.-]{16,}"
    r"|(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z0-9]{16}|LTAI[A-Za-z0-9]{16,}|AKID[A-Za-z0-9]{28,}"
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}|1//0[A-Za-z0-9_-]{30,}"
    r"|xox[abeoprs](?:\.xox[a-z])?-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{20,}"
    r"|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|(?:AC|SK)[0-9a-f]{32}\b|key-[0-9a-f]{32}\b|[0-9a-f]{32}-us[0-9]{1,2}\b"
    r"|dapi[a-f0-9]{32}(?:-[0-9])?|do[opr]_v1_[a-f0-9]{64}|dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}"
    r"|[0-9]{8,10}:[A-Za-z0-9_-]{35}\b"  # Telegram
    r"|[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40}|mfa\.[A-Za-z0-9_-]{60,}"  # Discord
    r"|gw_[0-9a-f]{8}_[A-Za-z0-9_-]{43}"  # ours
    r"|gsk_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{30,}|pplx-[A-Za-z0-9]{20,}|nvapi-[A-Za-z0-9_-]{20,}"
    r"|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|sq0[a-z]{3}-[A-Za-z0-9_-]{22,}|EAA[A-Za-z0-9]{40,}|xkeysib-[a-f0-9-]{32,}"
    r"|lin_(?:api|oauth)_[A-Za-z0-9]{20,}|ntn_[A-Za-z0-9]{30,}|secret_[A-Za-z0-9]{40,}|figd_[A-Za-z0-9_-]{20,}"
    r"|hvs\.[A-Za-z0-9_-]{20,}|glsa_[A-Za-z0-9]{32}_[a-f0-9]{8}|sntry[su]_[A-Za-z0-9+/=_-]{20,}|NRAK-[A-Z0-9]{20,}"
    r"|sb[ps]_[a-f0-9]{40}|dp\.(?:pt|st|ct|sa)\.[A-Za-z0-9._-]{30,}|PMAK-[a-f0-9-]{50,}|ATATT3[A-Za-z0-9_=-]{20,}"
    r"|lsv2_(?:pt|sk)_[A-Za-z0-9_]{20,}|pcsk_[A-Za-z0-9_]{30,}|pat[A-Za-z0-9]{14}\.[0-9a-f]{64}|tvly-[A-Za-z0-9-]{16,}"
    r"|pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.-]{20,}|rubygems_[a-f0-9]{40,}|HRKU-[A-Za-z0-9_-]{20,}|dt0c01\.[A-Z0-9.]{40,}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{50,}|PuTTY-User-Key-File-[0-9]: (?s:.*)|A{20}[A-Za-z0-9%]{30,}"
    r"|[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}"  # Microsoft Entra
)
_HOOKS = (
    r"hooks\.slack\.com(?:\\*/)(?:services|workflows)(?:\\*/)(?P<value>[A-Za-z0-9/\\_-]{16,})",
    r"discord(?:app)?\.com(?:\\*/)api(?:\\*/)webhooks(?:\\*/)(?P<value>[0-9]{10,}\\*/[A-Za-z0-9_-]{20,})",
)
_QUERY = (
    r"(?i)[?&;](?:amp;)?(?:[a-z0-9_.\[\]-]*(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|signature|credential|session[_-]?id|sessid|otp)|sig|auth|key|code|jwt|hmac|policy|key-pair-id)"
    r"=(?P<value>[^&\s\"'\\#<>;,]+)"
)

PATTERNS = (
    Pattern(
        "KEY",
        r"(?s)-----? ?BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)? ?----.*?"
        r"(?:-----? ?END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)? ?-----?|\z)",
    ),
    Pattern(  # its beginning cut off
        "KEY",
        r"(?:[A-Za-z0-9+/]{32,}={0,2}(?:\s|\\+[nr])*)*[A-Za-z0-9+/]*={0,2}(?:\s|\\+[nr])*-----END [A-Z0-9 ]*PRIVATE KEY"
        r"(?: BLOCK)?-----",
    ),
    Pattern("KEY", _START + r"(?P<value>eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){2,4}|eyJhbGciOi[A-Za-z0-9_-]{10,})"),
    Pattern("KEY", rf"{_START}(?P<value>{_TOKENS})", checks.token),
    *(Pattern("KEY", expression) for expression in _HOOKS),
    Pattern("KEY", r"(?i)\bbearer\s+(?P<value>[A-Za-z0-9._~+/-]{16,}=*)", checks.secret),
    Pattern(
        "KEY",
        rf"(?i)authorization{_QUOTES}\s*[:=]\s*{_QUOTES}(?:(?:digest|oauth|signature|hawk|hmac|aws4-hmac-sha256)\s+"
        r"(?P<value>[^\r\n]{8,})|(?:[a-z0-9-]+\s+)?[^\s\"'\\,;<>]{8,})",
        checks.authorization,
    ),
    Pattern(
        "SECRET",
        r":(?:\\*/){2}[^\s/:@\"'\\<>]*:(?P<value>[^\s/@\"'\\<>]+(?:@[^\s/@\"'\\<>]+)*)@",
        checks.secret,
    ),
    Pattern("SECRET", _QUERY, checks.query),
    Pattern(
        "SECRET",
        rf"(?i){_START}(?:set-)?cookie2?{_QUOTES}\s*:\s*{_QUOTES}(?P<value>[^\s=;\"'\\<>]+=[^\r\n\"'\\<>]+)",
        checks.secret,
    ),
    Pattern("SECRET", _SECRET_SAYS, checks.secret_after),
    Pattern(
        "SECRET",
        r"(?i)(?:^|\\[nrt]|[^\w-])--?(?:[a-z0-9]+-)*(?:password|passwd|pass|secret|token|api-?key|access-key)(?:=|\s+)",
        checks.secret_after,
    ),
    Pattern("SECRET", r"(?:\s-u|--user)[ =]?[\"']?[^\s:\"'/]+:(?P<value>[^\s\"'<>]+)", checks.secret),
    Pattern("SECRET", rf"(?i)[\"'](?:[a-z0-9]+[_-])*token\\*[\"']\s*{_COLON}\s*", checks.token_after),
    Pattern("SECRET", rf"(?i)(?:\b|_)token\s*{_COLON}\s*(?P<value>[A-Za-z0-9._~+/=-]{{12,}})", checks.mixed),
    Pattern(
        "SECRET",
        rf"(?i)\b(?:cvv|cvc|cvv2|cvc2|csc){_QUOTES}\s*(?:(?:code|number)\s*)?(?:is\b|{_COLON})?\s*{_QUOTES}(?P<value>[0-9]{{3,4}})\b",
    ),
    Pattern(
        "EMAIL",
        r"[A-Za-z0-9._%+\x80-\xff-]+(?:@|%40|&#64;|&#x40;)[A-Za-z0-9\x80-\xff-]+(?:\.[A-Za-z0-9\x80-\xff-]+)+",
        checks.email,
    ),
    Pattern("IBAN", _START + rf"(?P<value>[A-Za-z]{{2}}[0-9]{{2}}{_SEP}?[A-Za-z0-9]{{4}})", checks.iban),
    Pattern(
        "CARD", _START + r"(?P<value>[0-9](?:(?:[ -]|\xc2\xa0|\xe2\x80[\x90-\x93\xaf])?[0-9]){12,})\b", checks.card
    ),
    Pattern("SSN", _START + rf"(?P<value>[0-9]{{3}}{_SEP}[0-9]{{2}}{_SEP}[0-9]{{4}})\b", checks.ssn, weak=True),
    Pattern(
        "SSN",
        r"(?i)\b(?:ssn|social[ _-]?security(?:[ _-]?(?:number|num|no|nr))?|seguro social)(?:\b|_)[\s:.#=\"'\\_]{0,8}"
        rf"(?:(?:number|no|is|es)\b[\s:.#=\"'\\]{{0,8}}){{0,3}}(?P<value>[0-9]{{3}}{_SEP}?[0-9]{{2}}{_SEP}?[0-9]{{4}})\b",
        checks.ssn,
    ),
    Pattern(
        "IP",
        r"(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}"
        r"|(?:[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{1,4}){0,6})?::(?:[0-9A-Fa-f]{1,4}[:.]){0,7}[0-9A-Fa-f]{0,4}",
        checks.ipv6,
    ),
    Pattern("IP", _START + r"(?P<value>[0-9]{1,3}(?:\.[0-9]{1,3}){3})\b", checks.ipv4, weak=True),
    Pattern(
        "PHONE",
        rf"(?:^|\\[nrt]|[^\w)])(?P<value>(?:\+|%2[Bb]){_PHONE_SEP}?[1-9](?:{_PHONE_SEP}{{0,3}}[0-9]){{8,14}})\b",
        checks.phone,
    ),
    Pattern(
        "PHONE",
        _START + rf"(?P<value>00 ?[1-9][0-9]{{0,2}}[ /.-](?:{_PHONE_SEP}{{0,2}}[0-9]){{6,12}}|00[1-9][0-9]{{10,13}})\b",
        checks.phone,
        weak=True,
    ),
    Pattern(
        "PHONE", rf"(?:^|\\[nrt]|[^\w)])(?P<value>\+[1-9][0-9]{{0,2}}{_SEP}[0-9]{{3}}{_SEP}[0-9]{{4}})\b", checks.phone
    ),
    Pattern(
        "PHONE",
        rf"(?P<value>(?:\([0-9]{{3}}\) ?|\b[0-9]{{3}}(?:[.-]|{_WIDE_BLANK})|\\[nrt][0-9]{{3}}[.-])"
        rf"[0-9]{{3}}{_SEP}[0-9]{{4}})\b",
        checks.phone,
        weak=True,
    ),
    Pattern("PHONE", r"\b(?P<value>[2-9][0-9]{2} [2-9][0-9]{2} [0-9]{4})\b", checks.phone, weak=True),
    Pattern(
        "PHONE",
        r"(?:^|\\[nrt]|[^\w)])(?P<value>\(0?[1-9][0-9]{0,3}\) ?[0-9]{2,5}(?:[ -]?[0-9]{2,5}){1,3})\b",
        checks.phone,
        weak=True,
    ),
    Pattern(
        "PHONE",
        _START + r"(?P<value>0[1-9][0-9]{1,3}[ /-][0-9]{3,4}[ -]?[0-9]{3,5}"
        r"|0[1-9]-[0-9]{4}-[0-9]{4}|0[1-9](?:[ .-][0-9]{2}){4}|0[1-9][0-9] [0-9]{3} [0-9]{2} [0-9]{2})\b",
        checks.phone,
        weak=True,
    ),
    Pattern(
        "PHONE",
        _PHONE_SAYS + rf"(?:[\s:.#=\"'\\_]|{_word(_WIDE_COLON)}){{0,8}}"
        r"(?:(?:number|no|nr|is|ist|es|est|at|on|under|unter)\b[\s:.#=\"'\\]{0,8}){0,3}"
        rf"(?P<value>\(?[0-9](?:{_PHONE_SEP}{{0,2}}[0-9]){{6,14}})\b",
        checks.phone,
    ),
)
KINDS = (*dict.fromkeys(pattern.kind for pattern in PATTERNS), *ENTITY_KINDS)
