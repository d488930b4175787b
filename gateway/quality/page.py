"""``GET /ops``: the figures as one page for people in operations.

Self-contained: no file, font or script from anywhere else, and a Content-Security-Policy that allows none.
"""

import secrets
from importlib.resources import files
from string import Template
from typing import Any

from litestar import MediaType, Request, Response, get
from litestar.datastructures import State as AppState

from gateway import __version__
from gateway.errors import ServiceUnavailable
from gateway.quality.funnel import STATE_COLOURS
from gateway.quality.markup import Html
from gateway.quality.rollups import report_of
from gateway.quality.sections import render_report, render_unavailable

_PAGE = Template(files("gateway.quality").joinpath("page.html").read_text(encoding="utf-8"))


@get(
    "/ops",
    opt={"scope": "ops"},
    tags=["Operations"],
    media_type=MediaType.HTML,
    summary="How good the answers are, as a page",
    description="For people: the figures of /v1/quality as a page that refreshes itself.",
)
async def ops_page(request: Request[Any, Any, AppState]) -> Response[str]:
    """Answer with the page; with status 503, and a page that says so, when the database is away."""
    try:
        main, status = render_report(await report_of(request), str(request.base_url)), 200
    except ServiceUnavailable as error:
        main, status = render_unavailable(str(error)), 503
    nonce = secrets.token_urlsafe(16)
    return Response(_page(main, nonce), status_code=status, headers=_headers(nonce))


def _page(main: Html, nonce: str) -> str:
    return _PAGE.substitute(main=main, nonce=nonce, version=__version__, state_colours=STATE_COLOURS)


def _headers(nonce: str) -> dict[str, str]:
    """Allow our own inline style and script, a fetch of the page itself, and nothing else."""
    policy = {
        "default-src": "'none'",
        "style-src": f"'nonce-{nonce}'",
        "script-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, or browsers ask for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",  # an address of ours is nothing that MLflow's host needs to learn
        "X-Content-Type-Options": "nosniff",
    }
