"""The page that a browser shows at `/`: one file, which may run nothing but its own script and ask nobody but us."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

_HEADERS = {"Cache-Control": "no-cache", "Vary": "Accept", "Referrer-Policy": "no-referrer"}


class Page:
    """Answers `/`: browsers with the page, others with a line of text."""

    def __init__(self, line: str) -> None:
        """line: what those get that don't ask for HTML."""
        self._line = line
        self._html = files("mlx_paged.server").joinpath("page.html").read_text("utf-8")
        self._policy = policy_of(self._html)

    def respond(self, request: Request) -> Response:
        """Answer a request."""
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(self._line, headers=_HEADERS)
        return HTMLResponse(self._html, headers=_HEADERS | {"Content-Security-Policy": self._policy})


def policy_of(html: str) -> str:
    """Write the Content-Security-Policy of a page: its own style and script, its own server, and nothing else."""

    def hash_of(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hash_of('script')}",
            f"style-src {hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
