"""The service from outside, as the command line uses it: plain calls of the public API, nothing else."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx
import msgspec

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 300.0
WAIT_SECONDS = 20.0
"""How long an upload waits for its document before its job is looked at instead."""
LOOK_SECONDS = 2.0
MOST_TRIES = 600
"""Times that an upload is sent while there is no room for it."""


class ServiceFailure(Exception):
    """The service refused or could not be reached; the message is for the person at the terminal."""

    status: int | None = None
    """What the service answered with, if it did."""
    retry_after_seconds: float | None = None
    """When it said to come again, if it did."""


class Refusal(ServiceFailure):
    """The service will not have this one document; it may have others."""


class Client:
    """Talks to one service with one key; use it in a `with` block.

    Raises:
        ServiceFailure: the address or the key is none.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        if not (key.isascii() and key.isprintable()):
            raise ServiceFailure("The API key has a character that no key has: give it as it was printed.")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {key}"},
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise ServiceFailure(f"{self.url!r} is no address of a service: {_reason(error)}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def readiness(self) -> dict[str, str] | None:
        """What each part says of itself; None when nothing answers at the address."""
        try:
            checks = self._http.get("/readyz", timeout=CONNECT_SECONDS).json().get("checks", {})
        except (httpx.HTTPError, ValueError):
            return None
        return {str(name): str(state) for name, state in checks.items()}

    def wait_until_ready(
        self,
        timeout_seconds: float,
        *,
        on_wait: Callable[[str], None],
        alive: Callable[[], bool] = lambda: True,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wait until every part is ready, telling `on_wait` what is not; give up early when not `alive`.

        Raises:
            ServiceFailure: it is not ready in time; the message says what was missing.
        """
        deadline = time.monotonic() + timeout_seconds
        missing = "the service does not answer yet"
        while time.monotonic() < deadline and alive():
            checks = self.readiness()
            if checks is not None:
                waiting = {name: state for name, state in checks.items() if state != "ok"}
                if not waiting:
                    return
                missing = "; ".join(f"{name}: {state}" for name, state in waiting.items())
            on_wait(missing)
            pause(0.5)
        raise ServiceFailure(f"{self.url} did not become ready: {missing}.")

    def add(
        self,
        content: bytes,
        name: str,
        *,
        media_type: str = "",
        groups: list[str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> str:
        """Upload one file under `name`, for these groups, and wait until it is ingested; gives the outcome.

        Raises:
            Refusal: the file cannot be read.
            ServiceFailure: the service cannot be reached, or takes no documents with this key.
        """
        answer = self.upload(content, name, {"wait": WAIT_SECONDS}, media_type=media_type, groups=groups, pause=pause)
        return self._outcome(answer, pause)

    def add_url(self, url: str, *, groups: list[str] | None = None, pause: Callable[[float], None] = time.sleep) -> str:
        """Have the service fetch a document, and wait until it is ingested; gives and raises what `add` does."""
        asked = {"url": url, "groups": groups}
        return self._outcome(self._send(pause, params={"wait": WAIT_SECONDS}, json=asked), pause)

    def upload(
        self,
        content: bytes,
        name: str,
        query: dict[str, Any],
        *,
        media_type: str = "",
        etag: str = "",
        groups: list[str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> dict[str, Any]:
        """Send a file; where there is no room for it, again when there should be. Raises what `add` does."""
        file = ("file", content, media_type or "application/octet-stream")
        facts = {"name": name, "groups": json.dumps(groups), "etag": etag}
        return self._send(pause, params=query, files={"file": file}, data=facts)

    def _send(self, pause: Callable[[float], None], **options: Any) -> dict[str, Any]:
        for _ in range(MOST_TRIES):
            try:
                return self.call("POST", "/v1/documents", **options)
            except ServiceFailure as error:
                if error.status != 429:
                    raise
                refused = error
            pause(refused.retry_after_seconds or 1.0)
        raise refused

    def _outcome(self, answer: dict[str, Any], pause: Callable[[float], None]) -> str:
        if "outcome" in answer:
            return str(answer["outcome"])
        job = self.follow(answer["id"], pause=pause)
        for document in job["failed"]:
            raise Refusal(f"{document['error']['message']} ({document['error']['code']})")
        if job["state"] == "cancelled":
            raise Refusal("Its job was cancelled.")
        return next(str(outcome) for outcome, count in job["outcomes"].items() if count)

    def documents(self) -> Iterator[dict[str, Any]]:
        """The documents that the key sees."""
        after = None
        while True:
            page = self.call("GET", "/v1/documents", params={"limit": 500} | ({"after": after} if after else {}))
            yield from page["data"]
            after = page["next"]
            if after is None:
                return

    def live_index(self) -> dict[str, Any]:
        """The index version that answers, with what it is made of; raises ServiceFailure where none does."""
        for index in self.call("GET", "/v1/indexes")["data"]:
            if index["state"] == "live":
                return dict(index)
        raise ServiceFailure("The service has no index version that answers.")

    def follow(
        self,
        job_id: str,
        *,
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> dict[str, Any]:
        """Wait for the end of a job, telling how far it is."""
        seconds = 0.1
        while True:
            job = self.call("GET", f"/v1/jobs/{job_id}")
            tell(job)
            if job["finished_at"]:
                return job
            pause(seconds)
            seconds = min(LOOK_SECONDS, seconds * 1.5)

    def ask(self, question: str, *, model: str) -> dict[str, Any]:
        """Ask one question and wait for the whole answer."""
        return self.call("POST", "/v1/chat/completions", json=_question(question, model, stream=False))

    def stream(self, question: str, *, model: str) -> Iterator[dict[str, Any]]:
        """Ask one question and give the chunks of the answer as they come.

        Raises:
            ServiceFailure: the service cannot be reached, refuses, or does not come to the answer's end.
        """
        asked = _question(question, model, stream=True)
        with self._told(), self._http.stream("POST", "/v1/chat/completions", json=asked) as response:
            if response.status_code != 200:
                response.read()
                raise _failure(response)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk = msgspec.json.decode(line[6:].encode(), type=dict[str, Any])
                    if "error" in chunk:
                        raise ServiceFailure(str(chunk["error"]["message"]))
                    yield chunk
        raise ServiceFailure(f"{self.url} ended the answer without its end, as no Hallmark service does.")

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Call a route and give its JSON; `options` are httpx's.

        Raises:
            Refusal: the service finds the request at fault.
            ServiceFailure: the service cannot be reached, or refuses for another reason.
        """
        with self._told():
            response = self._http.request(method, path, **options)
            if response.status_code >= 400:
                raise _failure(response)
            return msgspec.json.decode(response.content, type=dict[str, Any])

    def lines(self, path: str, **options: Any) -> Iterator[bytes]:
        """Get a file of lines and give each as it comes, with its end; raises as `pieces` does."""
        rest = b""
        for piece in self.pieces(path, **options):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line + b"\n"

    def pieces(self, path: str, **options: Any) -> Iterator[bytes]:
        """Get a file and give it as it comes.

        Raises:
            ServiceFailure: the service cannot be reached, refuses, or broke off: then what came is not the whole.
        """
        with self._told(), self._http.stream("GET", path, **options) as response:
            if response.status_code != 200:
                response.read()
                raise _failure(response)
            yield from response.iter_bytes()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what can go wrong with a call in the words of who typed the command."""
        try:
            yield
        except httpx.UnsupportedProtocol as error:
            raise ServiceFailure(
                f"{self.url!r} is no address of a service: it must begin with http:// or https://."
            ) from error
        except httpx.RemoteProtocolError as error:
            raise ServiceFailure(f"{self.url} broke off: {_reason(error)}.") from error
        except httpx.HTTPError as error:
            raise ServiceFailure(
                f"{self.url} cannot be reached: {_reason(error)}. Start it with `hallmark serve`."
            ) from error
        except httpx.InvalidURL as error:
            raise ServiceFailure(f"This cannot be asked for: {_reason(error)}.") from error
        except UnicodeEncodeError as error:
            raise ServiceFailure("What was given is no text: it has characters that UTF-8 has not.") from error
        except msgspec.DecodeError as error:
            raise ServiceFailure(f"{self.url} does not answer as a Hallmark service does.") from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def _question(question: str, model: str, *, stream: bool) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "stream": stream}


def _failure(response: httpx.Response) -> ServiceFailure:
    kind = Refusal if response.status_code in (400, 413, 415, 422) else ServiceFailure
    try:
        error = response.json()["error"]
        failure = kind(f"{error['message']} ({error['code']}, status {response.status_code})")
    except (ValueError, KeyError, TypeError):
        failure = ServiceFailure(f"The service answered with status {response.status_code}.")
    failure.status = response.status_code
    retry_after = response.headers.get("retry-after", "")
    failure.retry_after_seconds = float(retry_after) if retry_after.isdigit() else None
    return failure
