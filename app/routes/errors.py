"""Every error leaves in OpenAI's envelope, so that an SDK's error classes work: made here, and nowhere else."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app.errors import InvalidRequest, NotFound, PayloadTooLarge, ServiceError, UnsupportedMedia, from_retrieval
from retrieval.errors import RetrievalError

log = logging.getLogger(__name__)


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not."""

    status, code, kind = 405, "method_not_allowed", "invalid_request_error"

    def __init__(self, allowed: str) -> None:
        """`allowed` are the methods that the path takes, as the Allow header lists them."""
        super().__init__(f"This path takes {allowed}; `/openapi.json` says what for.")
        self.allowed = allowed


MAX_MESSAGE_CHARACTERS = 2_000
"""Enough for any message of ours; what quotes the caller is cut."""


def envelope(error: ServiceError, request_id: str | None) -> bytes:
    """The body of an error response."""
    return msgspec.json.encode(
        {
            "error": {
                "message": _sendable(error.message, MAX_MESSAGE_CHARACTERS),
                "type": error.kind,
                "code": error.code,
                "param": _sendable(error.param, 256) if error.param else None,
                "request_id": request_id,
            }
        }
    )


def _sendable(text: str, limit: int) -> str:
    """Cut a text, and replace what UTF-8 cannot hold: a caller's own field name can be half of a surrogate pair."""
    return text[:limit].encode(errors="replace").decode()


def error_headers(error: ServiceError, request_id: str | None) -> list[tuple[bytes, bytes]]:
    """The headers of an error response, without its length."""
    headers = [(b"content-type", b"application/json")]
    if request_id:
        headers.append((b"x-request-id", request_id.encode()))
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_seconds))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    return headers


def error_response(error: ServiceError, request: Request) -> Response:
    """An error as a response to `request`."""
    request_id = request.scope.get("state", {}).get("request_id")
    response = Response(envelope(error, request_id), status_code=error.status)
    response.raw_headers.extend(error_headers(error, request_id))
    return response


def install(app: FastAPI) -> None:
    """Make every error of the app's routes leave in the envelope."""

    def handle(convert: Callable[[Any], ServiceError]) -> Callable[[Request, Any], Awaitable[Response]]:
        async def handler(request: Request, error: Any) -> Response:
            return error_response(convert(error), request)

        return handler

    app.add_exception_handler(ServiceError, handle(lambda error: error))
    app.add_exception_handler(RetrievalError, handle(from_retrieval))
    app.add_exception_handler(RequestValidationError, handle(_from_validation))
    app.add_exception_handler(HTTPException, handle(_from_http))
    app.add_exception_handler(Exception, handle(_from_bug))


def _from_validation(error: RequestValidationError) -> ServiceError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(path[1:] if path[0] in ("body", "query", "path", "header") else path)
    if first["type"] == "json_invalid":
        return InvalidRequest("The body is not valid JSON.")
    return InvalidRequest(f"`{field}`: {first['msg']}.", param=field or None)


def _from_http(error: HTTPException) -> ServiceError:
    match error.status_code:
        case 404:
            return NotFound("There is no such path; `/openapi.json` lists those there are.")
        case 405:
            return MethodNotAllowed((error.headers or {}).get("Allow", ""))
        case 413:
            return PayloadTooLarge("The body is larger than this route accepts.")
        case 415:
            return UnsupportedMedia(str(error.detail))
        case status if status < 500:
            return InvalidRequest(str(error.detail))
    return ServiceError("The request could not be served.")


def _from_bug(error: Exception) -> ServiceError:
    # The server's own middleware re-raises and logs it; the caller learns nothing of the inside.
    log.error("a request failed by a defect of ours: %s", type(error).__name__)
    return ServiceError("Something went wrong on our side; the request id helps us find it.")
