"""How an answer looks on the wire: OpenAI's completion objects and stream chunks, with the citations beside them.

Text is encoded piece by piece between bytes that are made once a stream; nothing else is built per token.
"""

from collections.abc import Callable, Sequence
from time import time
from typing import Any, Literal

import msgspec

from app.calls import Conclusion
from app.chat import ChatRequest, CitationStyle
from app.errors import ServiceError
from app.messages import FinishReason, Piece, Usage, whole_tool_calls
from app.predictions import Prediction
from app.routes.errors import envelope
from retrieval.citations import Citation, Verdict
from retrieval.documents import Passage

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode

Link = Callable[[Passage], str]


def citation_object(citation: Citation, link: Link) -> "CitationObject":
    """One entry of the `citations` field."""
    passage = citation.passage
    return CitationObject(
        n=citation.n,
        status=citation.status,
        support=round(citation.support, 4),
        score=round(citation.score, 6),
        answer_start=citation.answer_start,
        answer_end=citation.answer_end,
        document_id=passage.document_id,
        document_version=passage.document_version,
        document_name=passage.document_name,
        title=title_of(passage),
        heading=passage.heading,
        passage=passage.n,
        page=passage.page,
        source_start=citation.source_start,
        source_end=citation.source_end,
        quote=citation.quote,
        url=link(passage),
    )


def annotation(citation: Citation, link: Link) -> dict[str, Any]:
    """OpenAI's typed annotation; its span is the `[n]` in the answer."""
    passage = citation.passage
    return {
        "type": "url_citation",
        "url_citation": {
            "start_index": citation.marker_start,
            "end_index": citation.marker_end,
            "title": title_of(passage),
            "url": link(passage),
        },
    }


def openwebui_events(conclusion: Conclusion, link: Link) -> list[dict[str, Any]]:
    """Open WebUI's source events, which its chat page shows with the quotes and stores with the message.

    The page takes `[n]` for the n-th source that arrives, one for each distinct `metadata.source`. So there is one for
    every number up to the highest cited, also for a passage in between that the answer does not cite.
    """
    cited: dict[int, Citation] = {}
    for citation in conclusion.citations:
        cited.setdefault(citation.n, citation)
    events = []
    for n in range(1, max(cited, default=0) + 1):
        if n in cited:
            events.append(_source_event(cited[n].passage, cited[n].quote, cited[n].support, link))
        else:
            passage = conclusion.passages[n - 1]
            events.append(_source_event(passage, passage.text, 0.0, link))
    return events


def _source_event(passage: Passage, quote: str, support: float, link: Link) -> dict[str, Any]:
    url = link(passage)
    metadata = {"source": url, "name": title_of(passage), "page": passage.page}
    return {
        "type": "source",
        "data": {
            "source": {"id": url, "name": title_of(passage)},
            "document": [quote],
            "metadata": [metadata],
            "distances": [round(support, 4)],
        },
    }


def title_of(passage: Passage) -> str:
    """What to call a passage's source for a person: the document and the page."""
    name = passage.document_title or passage.document_name
    return f"{name}, page {passage.page}" if passage.page else name


def broken_off(error: ServiceError, request_id: str) -> bytes:
    """The event that ends a stream that failed."""
    return b"event: error\ndata: " + envelope(error, request_id) + b"\n\n"


class Completion:
    """Renders one answer, whole or as a stream."""

    def __init__(self, request: ChatRequest, prediction: Prediction, *, link: Link, style: CitationStyle) -> None:
        self._prediction = prediction
        self._link = link
        self._style = style
        self._with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        self._head: dict[str, Any] = {
            "id": prediction.id,
            "object": "chat.completion.chunk" if prediction.stream else "chat.completion",
            "created": int(time()),
            "model": request.model,
            "system_fingerprint": prediction.release_digest,
        }
        if prediction.stream:
            opening = b"data: " + _encode(self._head)[:-1] + b',"choices":[{"index":0,"delta":'
            self._before_text = opening + b'{"content":'
            self._before_delta = opening
            self._role = opening + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'

    def opening(self) -> bytes:
        """The first chunk of a stream: the role."""
        return self._role

    def chunks(self, pieces: Sequence[Piece]) -> bytes:
        """The chunks of the pieces that arrived together."""
        parts: list[bytes] = []
        for piece in pieces:
            if piece.tool_calls is None and piece.logprobs is None:
                if piece.text:
                    parts += (self._before_text, _encode(piece.text), b'},"logprobs":null,"finish_reason":null}]}\n\n')
                continue
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.tool_calls:
                delta["tool_calls"] = piece.tool_calls
            logprobs = _encode(piece.logprobs)
            parts += (self._before_delta, _encode(delta), b',"logprobs":', logprobs, b',"finish_reason":null}]}\n\n')
        return b"".join(parts)

    def ending(self, conclusion: Conclusion) -> bytes:
        """The chunks that end a stream: citations, finish reason, usage if asked for, and the end mark."""
        parts: list[bytes] = []
        if self._style == "openwebui":
            parts += [
                self._chunk({"choices": [], "event": event}) for event in openwebui_events(conclusion, self._link)
            ]
        choice: dict[str, Any] = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": conclusion.finish_reason}
        if conclusion.citations and self._style != "openwebui":
            annotations = [annotation(citation, self._link) for citation in conclusion.citations]
            parts.append(
                self._chunk({"choices": [{**choice, "delta": {"annotations": annotations}, "finish_reason": None}]})
            )
        parts.append(self._chunk({"choices": [choice], **self._evidence(conclusion)}))
        if self._with_usage:
            parts.append(self._chunk({"choices": [], "usage": conclusion.usage}))
        parts.append(DONE)
        return b"".join(parts)

    def broken_off(self, error: ServiceError, request_id: str) -> bytes:
        """The event that ends a stream that failed."""
        return broken_off(error, request_id)

    def whole(self, pieces: Sequence[Piece], conclusion: Conclusion) -> bytes:
        """The body of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join([piece.text for piece in pieces])}
        tool_calls = [call for piece in pieces for call in piece.tool_calls or ()]
        if tool_calls:
            message["tool_calls"] = whole_tool_calls(tool_calls)
            message["content"] = message["content"] or None
        if conclusion.citations:
            message["annotations"] = [annotation(citation, self._link) for citation in conclusion.citations]
        content = [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.get("content") or ()]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": content} if content else None,
            "finish_reason": conclusion.finish_reason,
        }
        return _encode({**self._head, "choices": [choice], "usage": conclusion.usage, **self._evidence(conclusion)})

    def _chunk(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + _encode({**self._head, **fields}) + b"\n\n"

    def _evidence(self, conclusion: Conclusion) -> dict[str, Any]:
        """What is said beside the answer about what it rests on; nothing when retrieval was off and its engine up."""
        prediction = self._prediction
        evidence: dict[str, Any] = {"fallback": prediction.fallback} if prediction.fallback else {}
        outcome = prediction.retrieval_outcome
        if outcome == "off":
            return evidence
        evidence["retrieval"] = outcome
        if conclusion.rewritten is not None:
            evidence["search_query"] = conclusion.rewritten
        if conclusion.verdict is not None:
            evidence["verdict"] = _verdict(conclusion.verdict)
        evidence["citations"] = [citation_object(citation, self._link) for citation in conclusion.citations]
        return evidence


def _verdict(verdict: Verdict) -> "VerdictObject":
    return VerdictObject(
        status=verdict.status,
        reason=verdict.reason,
        abstained=verdict.status == "abstained",
        support=round(verdict.support, 4),
        dropped_sentences=verdict.dropped_sentences,
    )


class UrlCitation(msgspec.Struct):
    """Where a mark in the answer leads; the span is that of the mark."""

    start_index: int
    end_index: int
    title: str
    url: str


class Annotation(msgspec.Struct):
    """OpenAI's typed annotation."""

    type: Literal["url_citation"]
    url_citation: UrlCitation


class CalledFunction(msgspec.Struct):
    """The function to call; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A tool that the model wants called."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(msgspec.Struct):
    """The answer; the span of an annotation is the `[n]` in the content."""

    role: Literal["assistant"]
    content: str | None
    annotations: list[Annotation] = []
    tool_calls: list[ToolCall] = []


class ChatChoice(msgspec.Struct):
    """The one choice."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: dict[str, Any] | None = None


class CitationObject(msgspec.Struct):
    """Which words of the answer rest on which words of which document; `quote` is `source[source_start:source_end]`."""

    n: int
    status: Literal["supported", "weak", "unsupported"]
    support: float
    score: float
    answer_start: int
    answer_end: int
    document_id: str
    document_version: str
    document_name: str
    title: str
    heading: str
    passage: int
    page: int | None
    source_start: int
    source_end: int
    quote: str
    url: str


class VerdictObject(msgspec.Struct):
    """Whether the answer was given, replaced by the passages' own words, or withheld, and why."""

    status: Literal["answered", "replaced", "abstained"]
    reason: Literal[
        "none", "nothing_relevant", "unsupported_answer", "engine_abstained", "empty_answer", "engine_unavailable"
    ]
    abstained: bool
    support: float
    dropped_sentences: int


class ChatCompletion(msgspec.Struct):
    """A whole answer; `retrieval`, `verdict` and `citations` are there unless retrieval was off."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    retrieval: Literal["used", "empty", "irrelevant", "unavailable"] | None = None
    search_query: str | None = None
    """What was searched for, where the engine put the last question into words of its own."""
    verdict: VerdictObject | None = None
    citations: list[CitationObject] = []
    fallback: str | None = None
    """What answered because an engine could not: a release by its label, or `extractive`."""


class ChatDelta(msgspec.Struct):
    """What a chunk adds; all annotations come together, before the finish reason."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    annotations: list[Annotation] = []
    tool_calls: list[dict[str, Any]] = []


class ChatChunkChoice(msgspec.Struct):
    """The one choice of a chunk."""

    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletionChunk(msgspec.Struct):
    """A piece of a streamed answer; the one with the finish reason says what the answer rests on."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    retrieval: Literal["used", "empty", "irrelevant", "unavailable"] | None = None
    search_query: str | None = None
    """What was searched for, where the engine put the last question into words of its own."""
    verdict: VerdictObject | None = None
    citations: list[CitationObject] = []
    fallback: str | None = None
    """What answered because an engine could not, with the finish reason."""
    event: dict[str, Any] | None = None
    """Open WebUI's source event, for its own chat page."""
