"""``GET /reference``: the API as a page, by Swagger UI.

Nothing is loaded from elsewhere: its files come from the package ``swagger-ui-py`` and are served from here.
"""

import secrets
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from litestar import MediaType, Request, Response, get
from litestar.datastructures import State
from litestar.exceptions import NotFoundException

_PAGE = Template(files("gateway.http").joinpath("reference.html").read_text(encoding="utf-8"))
# Not by importing the package, which would import web frameworks that we do not use.
_SWAGGER_UI = distribution("swagger-ui-py")
_VERSION = _SWAGGER_UI.version
_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon-32x32.png": "image/png"}
_FILES = {name: Path(str(_SWAGGER_UI.locate_file(f"swagger_ui/static/{name}"))).read_bytes() for name in _TYPES}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'self' 'nonce-{nonce}'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@get("/reference", media_type=MediaType.HTML, tags=["Reference"], summary="The API as a page")
async def reference(request: Request[Any, Any, State]) -> Response[str]:
    """Answer with a page that shows this document, and on which requests can be tried out."""
    nonce = secrets.token_urlsafe(16)
    # Relative, so that the page also works below a proxy's prefix.
    root = "../" if request.scope["raw_path"].endswith(b"/") else ""
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(_PAGE.substitute(nonce=nonce, root=root, version=_VERSION), headers=headers)


@get("/reference/{name:str}", include_in_schema=False)
async def reference_file(name: str) -> Response[bytes]:
    """Answer with a file of the page, which asks for it with its version."""
    if name not in _FILES:
        raise NotFoundException
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(_FILES[name], media_type=_TYPES[name], headers=headers)
