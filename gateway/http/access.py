"""Who may call which address: the guard of all routes, and the challenge that goes with a 401.

A route names what it is for by ``opt={"scope": "invoke"}`` (one of `gateway.storage.api_keys.SCOPES`); one that names
nothing is open to all.
"""

import base64
import binascii
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from gateway.errors import PermissionDenied, Unauthenticated
from gateway.storage.api_keys import Caller, KeyRing
from gateway.storage.schema import ANONYMOUS

Connection = ASGIConnection[Any, Any, Any, Any]


async def require_scope(connection: Connection, route_handler: BaseRouteHandler) -> None:
    """Let in who has the route's scope, and note who it is for `caller_of`.

    Raises:
        Unauthenticated: there is no valid key and one is needed.
        PermissionDenied: the key lacks the scope.
        ServiceUnavailable: the database is away.
    """
    scope = route_handler.opt.get("scope")
    if scope is None:
        return
    key_ring: KeyRing = connection.app.state.key_ring
    caller = await key_ring.caller(_key(connection))
    if not caller.may(scope):
        how = f"`gateway keys create <name> --scope {scope}` makes one that has it."
        if caller.key_id == ANONYMOUS:  # not a 403: it would keep browsers from asking for the key
            raise Unauthenticated(f"This address needs an API key with the scope {scope!r}: {how}")
        raise PermissionDenied(f"The API key {caller.name!r} lacks the scope {scope!r}: {how}")
    # Not `connection.state`, which is a copy.
    connection.scope["state"]["caller"] = caller


def caller_of(connection: Connection) -> Caller:
    """Return who makes the request; the route must name a scope."""
    caller: Caller = connection.scope["state"]["caller"]
    return caller


def visible_key(connection: Connection) -> str | None:
    """Return the key whose sessions and responses the caller sees; ``None``: those of all keys."""
    caller = caller_of(connection)
    return None if caller.may("admin") else caller.key_id


def challenge(connection: Connection) -> dict[str, str]:
    """Return the headers of a 401: how a key can be sent.

    For the pages of operations also as a password, since that is what a browser can ask for.
    """
    headers = {"WWW-Authenticate": "Bearer"}
    route_handler = connection.scope.get("route_handler")
    if route_handler is not None and route_handler.opt.get("scope") == "ops":
        # A line of its own: of several schemes in one line some browsers see only the first. A dict has a name once;
        # in HTTP, the case of a name means nothing.
        headers["www-authenticate"] = 'Basic realm="Agent Gateway"'
    return headers


def _key(connection: Connection) -> str | None:
    """Return the key that was sent: in ``X-API-Key``, as a bearer token, or as the password of HTTP Basic."""
    # First, since `Authorization` may be meant for a proxy on the way.
    if key := connection.headers.get("x-api-key", "").strip():
        return key
    scheme, _, credentials = connection.headers.get("authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return credentials.strip() or None
        case "basic":
            return _password(credentials)
    return None


def _password(credentials: str) -> str | None:
    try:
        _, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return password or None
