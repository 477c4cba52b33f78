"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lightning_rlhf.serving.bodies import BODIES
from lightning_rlhf.serving.explain import explain

#: OpenAI's type of an error, by status. Other statuses of the client are ``invalid_request_error``.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What was wrong and what to do, in one line.
        param: Name of the field that is wrong.
        code: OpenAI's short name of the error.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers
        self.message = " ".join(message.split())  # one line, whatever it quotes

    @property
    def body(self) -> dict[str, Any]:
        """The documented form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a response."""
        return json_response(self.body, self.status, self.headers)


class ClientLeft(Exception):
    """The client closed its connection before it had its answer. Nobody reads the response."""


def dumps(content: Any) -> bytes:
    """Writes JSON in UTF-8. A lone surrogate, which a request may hold, becomes an escape that JSON allows."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Makes a response of JSON."""
    return Response(dumps(content), status, headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error of an app the documented form."""

    async def own(request: Request, error: ApiError) -> Response:
        return error.response()

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors(), BODIES[request.url.path])
        return ApiError(400, message, param).response()

    async def http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        message = {
            400: "The body is not JSON, or is nested too deeply.",
            404: f"There is no {where}. docs/serve.md lists all routes.",
            405: f"{where} is not allowed. Use {Headers(error.headers).get('allow', 'another method')}.",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)

    async def unknown(request: Request, error: Exception) -> Response:
        return ApiError(500, f"The server failed ({type(error).__name__}). Its log says more.").response()

    for kind, handler in (
        (ApiError, own),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (ClientLeft, left),
        (Exception, unknown),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
