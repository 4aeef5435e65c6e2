"""The door: nothing behind it runs for a request without a valid key, but for a few paths named here.

It stands in front of FastAPI as plain ASGI, so that a body is not read before its sender is known, and so that the
routes that answer can do so at the cost the hot path allows (see docs/decisions): those two paths never enter FastAPI
by their method, which documents them all the same.
"""

import re
from collections.abc import Awaitable, Iterable, Mapping
from time import perf_counter

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access import Access, Caller
from app.errors import PayloadTooLarge, ServiceError
from app.links import PassageLinks
from app.predictions import uuid7
from app.routes import reference
from app.routes.errors import MethodNotAllowed, envelope, error_headers
from observability.logs import Log, RequestIds, request_ids
from observability.metrics import Metrics

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/"}) | reference.PATHS
"""What anybody may ask: liveness, readiness, and the description of the API with the page that shows it."""

CHAT_PATH = "/v1/chat/completions"
RESPONSES_PATH = "/v1/responses"

FILE_PATHS = (
    "/v1/documents",
    "/v1/documents/sync",
    "/v1/datasets/{dataset}/imports",
    "/v1/drift/references",
    "/v1/features/{view}/rows",
    "/v1/lineage/datasets",
    "/v1/review/queues/{queue}/import",
)
"""What takes files, or as much as one: such a route asks for its scope before it reads, and reads off the loop."""

_IS_OF_FILES = re.compile("|".join(re.sub(r"\{\w+\}", "[^/]+", path) for path in FILE_PATHS)).fullmatch


class Front:
    """Authenticates, sends the routes that answer their requests, and FastAPI the rest."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        lanes: Mapping[str, ASGIApp],
        access: Access,
        links: PassageLinks,
        metrics: Metrics,
        log: Log,
        max_body_bytes: int,
        max_file_bytes: int,
        open_paths: Iterable[str] = (),
    ) -> None:
        """`lanes` answer POSTs, by path; what is largest is for every other route; `open_paths` need no key either."""
        self._app = app
        self._lanes = lanes
        self._access = access
        self._links = links
        self._metrics = metrics
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._max_file_bytes = max_file_bytes
        self._open = OPEN_PATHS | frozenset(open_paths)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Say what serves one connection event; no coroutine, which each step of an answer would have to pass."""
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        if scope["method"] == "POST" and (lane := self._lanes.get(scope["path"])) is not None:
            return lane(scope, receive, send)
        return self._ordinary(scope, receive, send)

    async def _ordinary(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, method = perf_counter(), 500, scope["method"]
        if method == "HEAD" and scope["path"] in self._open:
            # What probes of some load balancers send: the server leaves the body out.
            scope = {**scope, "method": "GET"}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = uuid7()
        request_ids.set(RequestIds(request_id=request_id))

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                if not any(name == b"x-request-id" for name, _ in headers):
                    headers.append((b"x-request-id", request_id.encode()))
            await send(message)

        caller: Caller | None = None
        try:
            if scope["path"] not in self._open:
                caller = state["caller"] = await self._identify(scope)
            if scope["path"] in self._lanes:
                raise MethodNotAllowed("POST")
            await self._app(scope, self._limited(scope, receive), noting)
        except ServiceError as error:
            await respond(noting, error, request_id)
        finally:
            seconds = perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.request(route, status, seconds)
            tenant = caller.tenant if caller else ""
            self._log.access(method, route, status, seconds, request_id=request_id, tenant=tenant)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Refuse a body by its own word, and give what cuts off one that does not say its length."""
        largest, setting = self._max_body_bytes, "max_body_bytes"
        if _IS_OF_FILES(scope["path"]):
            largest, setting = self._max_file_bytes, "max_document_bytes"
        message = f"A body may have {largest} bytes here (setting `limits.{setting}`)."
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > largest:
            raise PayloadTooLarge(message)
        size = 0

        async def counting() -> Message:
            nonlocal size
            event = await receive()
            size += len(event.get("body", b""))
            if size > largest:
                # Of what it meets while it reads a body FastAPI lets only this pass.
                raise HTTPException(413, message)
            return event

        return counting

    async def _identify(self, scope: Scope) -> Caller:
        headers = dict(scope["headers"])
        if b"authorization" not in headers and b"signature=" in scope["query_string"] and scope["method"] == "GET":
            path = scope.get("raw_path", scope["path"].encode()).decode("ascii")
            tenant = self._links.tenant(path.partition("?")[0], scope["query_string"])
            if tenant is not None:
                return Caller(key_id="link", tenant=tenant, scopes=frozenset({"passage"}))
        return await self._access.identify(headers)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header, by its lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def respond(
    send: Send, error: ServiceError, request_id: str | None, *, also: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send an error as the whole response, with these headers beside its own."""
    body = envelope(error, request_id)
    headers = [*error_headers(error, request_id), *also, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
