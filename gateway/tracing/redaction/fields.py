"""What the name of a field says of what stands under it: in JSON the name stands apart from the value."""

import re

import re2

_SENSITIVE = re2.compile(
    r"(?:.*_)?(?:passw(?:or)?d(?:_?hash)?[0-9]?|passphrase|passcode|pwd|passwort|kennwort|contrase(?:n|ñ)a|senha"
    r"|mot_de_passe|secret|(?:api|private|access|secret|account|encryption|signing|subscription)_?key(?:_?base)?|token"
    r"|authorization|cookie2?|credentials?|cvv2?|cvc2?|hmac|signature|connection_string"
    r"|(?P<phone>(?:phone|mobile|telephone|fax|telefon|telefono|telefone|celular|handynummer|whatsapp)"
    r"(?:_?(?:number|no|nr))?)|(?P<ssn>ssn|social_?security(?:_?(?:number|num|no|nr))?))"
)
_NO_SECRET = re2.compile(
    r"(?:.*_)?(?:(?:input|output|total|max|prompt|completion|cached?|page|next|continuation|sync|cursor|pagination)_token"
    r"|(?:thought|function|method|type)_signature)"
)
_ID = re2.compile(
    r"(?:.*_)?(?:order|invoice|tracking|shipment|parcel|reservation|booking|payment|transaction|part|sku|product|item"
    r"|serial|ticket|case|batch|lot|model|isbn|ean|upc|rma|confirmation|policy|contract|document|po|build|release|oid"
    r"|trace|span|request|run|version|firmware)(?:_?(?:id|no|nr|number|num|ref|code|key))?"
)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MAX_NAME_CHARACTERS = 64

ID = "ID"
"""What stands under such a name is an order's or a part's number, however much like a phone number it looks."""


def kind_of_field(name: str) -> str | None:
    """Return the kind of what stands under this name whatever it looks like, or `ID`; ``None``: it says nothing."""
    if len(name) > _MAX_NAME_CHARACTERS:
        return None
    words = _CAMEL_CASE.sub("_", name).lower().replace("-", "_").replace(" ", "_")
    match = None if _NO_SECRET.fullmatch(words) else _SENSITIVE.fullmatch(words)
    if match is None:
        return ID if _ID.fullmatch(words) else None
    return "PHONE" if match.group("phone") else "SSN" if match.group("ssn") else "SECRET"
