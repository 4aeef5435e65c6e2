"""Calls of a model on a server: bounded in time and in tries, with errors that say what to do. The home of httpx here.

The main rule: no text of a caller, and nothing that a server answers to it, gets into an error or a log line.
"""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from retrieval.errors import IndexUnavailable

_T = TypeVar("_T")
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_HINTS = {
    401: "check its token",
    403: "check its token",
    404: "check its URL and which kind of server it is",
    413: "it takes fewer texts, or shorter ones, than it was sent",
    422: "it takes no texts like these: let it truncate, or make passages smaller",
}


class RemoteModel:
    """A server that embeds or ranks; `what` names it in errors. Use it in an `async with` block.

    `timeout_seconds` is for a call with all its tries: a request that waits longer is of no use to anybody.
    """

    def __init__(
        self,
        url: str,
        *,
        what: str,
        token: str | None = None,
        timeout_seconds: float = 5.0,
        retries: int = 2,
        connections: int = 8,
    ) -> None:
        self.url = url.rstrip("/")
        self._what = f"The {what} at {self.url}"
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._places = asyncio.Semaphore(connections)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(headers=self._headers, timeout=self._timeout_seconds, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    async def call(self, path: str, body: Mapping[str, Any] | None, shape: type[_T]) -> _T:
        """Post `body`, or get where there is none, and read the answer as `shape`.

        Raises:
            IndexUnavailable: it does not answer in time, refuses, or answers something else.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds), self._places:
                content = await self._tried(path, body)
        except TimeoutError:
            raise IndexUnavailable(f"{self._what} did not answer within {self._timeout_seconds:g} s.") from None
        try:
            return msgspec.json.decode(content, type=shape)
        except msgspec.MsgspecError:
            raise self.wrong("what it answers has another form") from None

    def wrong(self, reason: str) -> IndexUnavailable:
        """The error that says what is wrong with what the server answers."""
        return IndexUnavailable(f"{self._what} cannot be used: {reason}.")

    async def _tried(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        for tries_left in range(self._retries, -1, -1):
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** (self._retries - tries_left), _LONGEST_PAUSE_SECONDS)
            try:
                response = await self._send(path, body)
            except httpx.HTTPError as error:
                failure = IndexUnavailable(f"{self._what} does not answer: {type(error).__name__}.")
            else:
                if response.status_code == 200:
                    return response.content
                hint = _HINTS.get(response.status_code, "see its log")
                failure = self.wrong(f"it answers with status {response.status_code}; {hint}")
                if response.status_code not in _RETRIED:
                    raise failure
                pause = max(pause, _retry_after(response))
            if not tries_left:
                raise failure
            await asyncio.sleep(pause)
        raise AssertionError

    async def _send(self, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        if self._http is None:
            raise IndexUnavailable(f"{self._what} is not open.")
        if body is None:
            return await self._http.get(self.url + path)
        content = msgspec.json.encode(body)
        return await self._http.post(self.url + path, content=content, headers={"content-type": "application/json"})


def _retry_after(response: httpx.Response) -> float:
    """The seconds that a server asks to be left alone for, as far as anybody waits."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), _LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0
