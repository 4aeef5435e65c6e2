"""Every error leaves in OpenAI's envelope, so that an SDK's error classes work: made here, and nowhere else."""

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Scope

from app.errors import (
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    ServiceError,
    UnfitAnswer,
    UnsupportedMedia,
    from_retrieval,
)
from retrieval.errors import RetrievalError

log = logging.getLogger(__name__)

_BRANCH = re.compile(r"(constrained-)?(str|int|float|bool)|(constrained-)?list(\[.*\])?|\[key\]")
"""How pydantic names a branch of a union, in the middle of a field's path."""


_UNKNOWN = "There is no such field here; `/openapi.json` lists those there are"


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
    if isinstance(error, UnfitAnswer):
        # OpenAI's SDKs send a 502 again twice, and the model would say the same again.
        headers.append((b"x-should-retry", b"false"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    if isinstance(error, RateLimited):
        headers += error.headers
    return headers


def error_response(error: ServiceError, request: Request) -> Response:
    """An error as a response to `request`."""
    request_id = request.scope.get("state", {}).get("request_id")
    response = Response(envelope(error, request_id), status_code=error.status)
    response.raw_headers.extend(error_headers(error, request_id))
    return response


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Make every error of the app's routes leave in the envelope."""

    def handle(convert: Callable[[Any], ServiceError]) -> Callable[[Request, Any], Awaitable[Response]]:
        async def handler(request: Request, error: Any) -> Response:
            return error_response(convert(error), request)

        return handler

    async def handle_http(request: Request, error: Any) -> Response:
        refused = MethodNotAllowed(_allowed(request.scope, routers)) if error.status_code == 405 else _from_http(error)
        return error_response(refused, request)

    app.add_exception_handler(ServiceError, handle(lambda error: error))
    app.add_exception_handler(RetrievalError, handle(from_retrieval))
    app.add_exception_handler(RequestValidationError, handle(lambda error: invalid_fields(error.errors())))
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(Exception, handle(_from_bug))


def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a query parameter that a route has not: without one that is misspelt a list would be of everything.

    What is posted says what it wants by its body.
    """
    if request.method == "POST" or not request.query_params:
        return
    known = {field.alias for field in get_flat_params(request.scope["route"].dependant)}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"`{name}`: {_UNKNOWN}.", param=name)


def invalid_fields(problems: Sequence[Any]) -> InvalidRequest:
    """Turn pydantic's list of problems into one error about the first field; of a union it has one for each branch."""
    if problems[0]["type"] == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "")
        return InvalidRequest(f"The body is not valid JSON: {reason}.")
    field = _field(problems[0])
    reasons = dict.fromkeys(_reason(problem) for problem in problems if _field(problem) == field)
    common = "Input should be "
    if len(reasons) > 1:
        reason = common + " or ".join(reason.removeprefix(common) for reason in reasons)
    else:
        reason = next(iter(reasons))
    if not field:
        return InvalidRequest(f"The body: {reason}. Send it with `content-type: application/json`.")
    return InvalidRequest(f"`{field}`: {reason}.", param=field)


def _reason(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return _UNKNOWN
    return str(problem["msg"]).removeprefix("Value error, ")


def _field(problem: Any) -> str:
    first, *rest = [str(part) for part in problem["loc"]] or [""]
    parts = rest if first in ("body", "query", "path", "header") else [first, *rest]
    return ".".join(part for at, part in enumerate(parts) if not at or not _BRANCH.fullmatch(part))


def _allowed(scope: Scope, routers: Iterable[APIRouter]) -> str:
    """The methods that a path takes; Starlette itself names those of one route."""
    matching = [
        route
        for router in routers
        for route in router.routes
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE
    ]
    # A path that is spelt out is not the one with a parameter that it happens to fit.
    literal = [route for route in matching if not route.param_convertors]
    methods = {method for route in literal or matching for method in route.methods or ()}
    return ", ".join(sorted(methods))


def _from_http(error: HTTPException) -> ServiceError:
    match error.status_code:
        case 404:
            return NotFound("There is no such path; `/openapi.json` lists those there are.")
        case 413:
            return PayloadTooLarge(str(error.detail))
        case 415:
            return UnsupportedMedia(str(error.detail))
        case status if status < 500:
            return InvalidRequest(str(error.detail))
    return ServiceError("The request could not be served.")


def _from_bug(error: Exception) -> ServiceError:
    # The server's own middleware re-raises and logs it; the caller learns nothing of the inside.
    log.error("a request failed by a defect of ours: %s", type(error).__name__)
    return ServiceError("Something went wrong on our side; the request id helps us find it.")
