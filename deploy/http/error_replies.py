"""Errors over HTTP: OpenAI's JSON body for every one of them, without a stack trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from offramp.controller.errors import OfframpError, OverloadedError, RequestError
from offramp.deploy.clients.quotas import QuotaError
from offramp.deploy.http.backend import WorkerLostError
from offramp.deploy.http.limits import DeadlineError
from offramp.deploy.http.served_models import UnavailableError
from offramp.deploy.http.shapes.reply_shapes import ErrorFields, ErrorReply
from offramp.worker.engine.service import RETRY_AFTER_S

FAILURES = {
    DeadlineError: (504, "deadline"),
    WorkerLostError: (503, "worker_lost"),
    OfframpError: (500, "decode_failed"),
}
"""What went wrong here, not in the request: the status and code of the first that fits."""


def error_body(message: str, kind: str, param: str | None, code: str | None) -> ErrorReply:
    """Make a body of OpenAI's error shape."""
    return ErrorReply(error=ErrorFields(message=message, type=kind, param=param, code=code))


def error_reply(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a response; its code is the status's own name by default."""
    code = code or HTTPStatus(status).phrase.lower().replace(" ", "_")
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def overload_reply(error: OverloadedError) -> Response:
    """Tell a client to come back."""
    headers = {"Retry-After": str(error.retry_after_s)}
    kind = code = "overloaded"
    return error_reply(429, str(error), kind=f"{kind}_error", code=code, headers=headers)


def unavailable_reply(error: UnavailableError) -> Response:
    """Tell a client that nobody answers for now."""
    code = error.trouble.replace(" ", "_")
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return error_reply(503, str(error), kind="server_error", code=code, headers=headers)


def quota_reply(error: QuotaError) -> Response:
    """Tell a client that it has asked for what it may, in OpenAI's words."""
    headers = {"Retry-After": str(error.retry_after_s)}
    return error_reply(
        429, str(error), kind=error.unit, code="rate_limit_exceeded", headers=headers
    )


def _invalid_reply(problem: Mapping[str, Any]) -> Response:
    """Name what pydantic refuses of a body."""
    place = problem["loc"][1:]
    if problem["type"] == "extra_forbidden":  # in a namespace that is ours: say which one
        field: str | None = ".".join(map(str, place))
        message = f"{field}: is unknown here. Leave it out; /openapi.json has those that are known."
    else:
        # Of a body that is no JSON, the location is a number of bytes.
        named = place[: 2 if place[:1] == ("offramp",) else 1]  # in our namespace, say which one
        field = ".".join(part for part in named if isinstance(part, str)) or None
        message = f"{field or 'body'}: {problem['msg']}."
    return error_reply(400, message, param=field, code="invalid_value")


def _nearest(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What pydantic refuses first; of a field that may be of several types, by the one it is of."""
    alike = [each for each in problems if each["loc"][:2] == problems[0]["loc"][:2]]
    return max(alike, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the routes."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_reply(400, str(error), param=error.field, code="invalid_value")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        said = request.headers.get("content-type", "")
        if isinstance(error.body, bytes) and "json" not in said:
            message = f"body: is sent as {said!r:.60}. Send content-type: application/json."
            return error_reply(400, message, code="invalid_value")
        return _invalid_reply(_nearest(error.errors()))

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> Response:
        return overload_reply(error)

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> Response:
        return unavailable_reply(error)

    @app.exception_handler(QuotaError)
    async def spent(_: Request, error: QuotaError) -> Response:
        return quota_reply(error)

    @app.exception_handler(OfframpError)
    async def failed(_: Request, error: OfframpError) -> Response:
        status, code = next(said for kind, said in FAILURES.items() if isinstance(error, kind))
        return error_reply(status, str(error), kind="server_error", code=code)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        return error_reply(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return error_reply(500, "the worker failed", kind="server_error", code="internal_error")
