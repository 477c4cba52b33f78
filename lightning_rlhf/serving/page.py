"""The chat page: its files, with headers that let it run nothing and load nothing from elsewhere."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
#: Scripts and styles come from this server alone; HTML is made by DOMPurify alone; there are no frames and no forms.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",  # it asks whether a file has changed, each time
}
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}  # the system's table may say otherwise


def page_paths() -> list[str]:
    """The paths of the page's files, which need no key."""
    return ["/", *(f"/static/{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*") if path.is_file())]


def page_routes() -> APIRouter:
    """Makes the routes. The files are read once; no request names a path on the disk."""
    router = APIRouter()
    files = {path: _load(STATIC / path.removeprefix("/static/") if path != "/" else STATIC / "index.html")
             for path in page_paths()}  # fmt: skip

    @router.get("/")
    @router.get("/static/{path:path}")
    async def page(request: Request) -> Response:
        if request.url.path not in files:
            raise HTTPException(404)
        content, headers = files[request.url.path]
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return router


def _load(path: Path) -> tuple[bytes, dict[str, str]]:
    content = path.read_bytes()
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    kind += "; charset=utf-8" if kind.startswith("text/") else ""
    return content, {**_HEADERS, "content-type": kind, "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
