"""A running service as `hallmark-eval` asks it: by its public API, as any client would."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import httpx

from retrieval.documents import Hit, Passage, Scope, SearchMode, SearchResult
from retrieval.errors import RetrievalError
from retrieval.evaluation.answering import Answer, Cited

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 300.0
_NO_ROOM = (429, 503)
_MOST_TRIES = 20
_LONGEST_WAIT_SECONDS = 30.0


class EvaluatedService:
    """Searches, and answers by a release with its engine. Use it in an `async with` block.

    Where the service has no room, or its engine is away, a question waits for as long as it says and is asked again, 20
    times at most: what is measured is how good answers are, not how many there are at once.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        model: str = "",
        top_k: int = 5,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._model = model
        self._pause = pause
        self._top_k = top_k
        self._url = url.rstrip("/")
        self._seen: dict[str, set[str]] = {}
        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def described(self) -> dict[str, Any]:
        """Which releases answered, by the digests they gave: one, unless a rollout chose."""
        return {"model": self._model, **{name: ", ".join(sorted(seen)) for name, seen in self._seen.items()}}

    async def search(self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid") -> SearchResult:  # noqa: ARG002 - the key has its own
        """Find passages, by name of their document."""
        found = await self._call("/v1/search", {"query": query, "top_k": top_k, "mode": mode})
        hits = tuple(Hit(_passage(hit["passage"]), hit["score"]) for hit in found["hits"])
        return SearchResult(hits, found["index_version"])

    async def answer(self, question: str) -> Answer:
        """Ask for an answer."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "retrieval": {"top_k": self._top_k},
        }
        found = await self._call("/v1/chat/completions", body)
        self._seen.setdefault("release_digest", set()).add(found["system_fingerprint"])
        verdict = found.get("verdict") or {}
        refused = verdict.get("reason", "nothing_relevant") if verdict.get("abstained") else None
        return Answer(
            found["choices"][0]["message"]["content"] or "",
            tuple(_cited(each) for each in found.get("citations", ()) if each["status"] != "unsupported"),
            refused,
        )

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for tried in range(1, _MOST_TRIES + 1):
            try:
                response = await self._http.post(path, json=body)
                found: dict[str, Any] = response.json()
            except (httpx.HTTPError, ValueError) as error:
                raise RetrievalError(f"{self._url} cannot be asked: {type(error).__name__}.") from error
            wait = response.headers.get("retry-after", "")
            if response.status_code not in _NO_ROOM or not wait.isdigit() or tried == _MOST_TRIES:
                break
            await self._pause(min(float(wait), _LONGEST_WAIT_SECONDS))
        if response.status_code != 200:
            message = found.get("error", {}).get("message", "no reason given")
            raise RetrievalError(f"{self._url} refuses with status {response.status_code}: {message}")
        return found


def _passage(found: dict[str, Any]) -> Passage:
    return Passage(
        found["document_id"],
        found["document_version"],
        found["n"],
        found["text"],
        found["start"],
        found["end"],
        document_name=found["document_name"],
    )


def _cited(found: dict[str, Any]) -> Cited:
    path = tuple(found["heading"].split(" > ")) if found["heading"] else ()
    return Cited(
        found["answer_start"], found["answer_end"], found["document_name"], found["quote"], found["title"], path
    )
