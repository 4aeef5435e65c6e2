"""A response as OpenAI's newer API tells it: the search that was made, the answer, and what it rests on.

Everything of OpenAI's is there under its name; what an answer here has beyond it (whether a sentence is supported, the
quote, the link, the verdict, the release) stands beside it in fields of its own, which OpenAI's SDKs keep.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec
from msgspec import UNSET, UnsetType

from app.errors import ServiceError
from app.messages import FinishReason, Usage
from app.predictions import Prediction
from app.responses import AskedResponse, Extras
from app.routes.completions import CitationObject, Link, citation_object
from retrieval.citations import Citation, Verdict
from retrieval.documents import Hit

Status = Literal["completed", "failed", "in_progress", "cancelled", "incomplete"]
ErrorCode = Literal["server_error", "rate_limit_exceeded"]
Outcome = Literal["used", "empty", "irrelevant", "unavailable"]

_WHOLE: frozenset[str] = frozenset({"stop", "tool_calls"})


class FileCitation(CitationObject, tag_field="type", tag="file_citation", kw_only=True):
    """OpenAI's typed citation, with all that a citation here says; `index` is where its mark stands in the text."""

    index: int
    file_id: str
    filename: str


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """The answer's text; all citations are in its annotations."""

    text: str
    annotations: list[FileCitation]
    logprobs: list[dict[str, Any]] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """The answer."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FileSearchResult(msgspec.Struct, omit_defaults=True):
    """A passage that was found. Its text is left out where the document has been replaced or deleted since."""

    file_id: str
    filename: str
    score: float
    passage: int
    document_version: str
    start: int
    end: int
    url: str
    text: str | None = None
    page: int | None = None


class FileSearchCall(msgspec.Struct, tag_field="type", tag="file_search_call"):
    """The search; `results` are there if they were to be included."""

    id: str
    status: Literal["in_progress", "completed", "failed"]
    queries: list[str]
    results: list[FileSearchResult] | None = None


class InputDetails(msgspec.Struct):
    """Of the prompt's tokens; engines do not tell what of it they had cached."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Tokens as the engine counted them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)


class ResponseFailure(msgspec.Struct):
    """Why there is no whole answer; `error_code` of the response says it more exactly."""

    code: ErrorCode
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens", "content_filter"]


class TextForm(msgspec.Struct):
    """What form the text was asked for in."""

    format: dict[str, Any]


class ResponseVerdict(msgspec.Struct, omit_defaults=True):
    """Whether the answer was given, replaced by the passages' own words, or withheld, and why."""

    status: Literal["answered", "replaced", "abstained"]
    reason: str
    abstained: bool
    support: float | None = None
    """Not told of a response that is read again."""
    dropped_sentences: int | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response: what was asked, what came of it, and what it rests on."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    completed_at: int | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[FileSearchCall | OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: str | None
    store: bool
    temperature: float | None
    top_p: float | None
    text: TextForm
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    metadata: dict[str, Any]
    user: str | UnsetType = UNSET
    usage: ResponseUsage | UnsetType = UNSET
    release: str | UnsetType = UNSET
    """The release that answered, `name@number`."""
    retrieval: Outcome | UnsetType = UNSET
    """What came of the search, where there was one."""
    verdict: ResponseVerdict | UnsetType = UNSET
    fallback: str | UnsetType = UNSET
    """What answered because an engine could not: a release by its label, or `extractive`."""
    error_code: str | UnsetType = UNSET
    """Our own code of what went wrong."""


class ResponseEvent(msgspec.Struct):
    """An event of a stream, of one of OpenAI's types; the rest of it depends on the type."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    """With the events of the response as a whole."""


class Telling:
    """Makes the objects of one response, live or from the record."""

    def __init__(self, asked: AskedResponse, prediction: Prediction, link: Link) -> None:
        self._asked = asked
        self._prediction = prediction
        self._link = link
        self._extras = asked.responses or Extras()
        self.message_id = f"msg_{prediction.id}"
        self.search_id = f"fs_{prediction.id}"

    @property
    def has_searched(self) -> bool:
        """Whether the passages were searched for this answer."""
        return self._prediction.retrieval_outcome in get_args(Outcome)

    def search(self, hits: Sequence[Hit], *, is_begun: bool = False) -> FileSearchCall:
        """The search, as it began or with what it found."""
        prediction = self._prediction
        queries = [prediction.question] if prediction.question else []
        if is_begun:
            return FileSearchCall(self.search_id, "in_progress", queries)
        status: Literal["completed", "failed"] = (
            "failed" if prediction.retrieval_outcome == "unavailable" else "completed"
        )
        results = [self._result(hit) for hit in hits] if self._extras.with_results else None
        return FileSearchCall(self.search_id, status, queries, results)

    def message(
        self,
        text: str | None,
        citations: Sequence[Citation] = (),
        *,
        status: Literal["in_progress", "completed", "incomplete"],
    ) -> OutputMessage:
        """The answer; without a text its content has not begun."""
        content = [] if text is None else [self.text(text, citations)]
        return OutputMessage(self.message_id, status, "assistant", content)

    def text(self, text: str, citations: Sequence[Citation] = ()) -> OutputText:
        """The answer's text with its annotations."""
        return OutputText(text, [self.annotation(citation) for citation in citations])

    def annotation(self, citation: Citation) -> FileCitation:
        """A citation."""
        passage = citation.passage
        facts = msgspec.structs.asdict(citation_object(citation, self._link))
        return FileCitation(
            index=citation.marker_start, file_id=passage.document_id, filename=passage.document_name, **facts
        )

    def response(
        self,
        status: Status,
        output: Sequence[FileSearchCall | OutputMessage] = (),
        *,
        completed_at: int | None = None,
        finish_reason: FinishReason | None = None,
        usage: Usage | None = None,
        verdict: Verdict | None = None,
        error: ServiceError | None = None,
    ) -> ResponseObject:
        """The response as it stands."""
        asked, prediction, extras = self._asked, self._prediction, self._extras
        outcome: Any = prediction.retrieval_outcome
        return ResponseObject(
            id=prediction.id,
            created_at=int(prediction.created_at.timestamp()),
            status=status,
            completed_at=completed_at,
            error=failure_of(error) if error is not None else None,
            incomplete_details=_incomplete(finish_reason) if status == "incomplete" else None,
            instructions=asked.messages[0].text if extras.instructed else None,
            max_output_tokens=asked.max_completion_tokens or asked.max_tokens,
            model=asked.model,
            output=list(output),
            previous_response_id=extras.previous_response_id,
            store=prediction.store,
            temperature=asked.temperature,
            top_p=asked.top_p,
            text=TextForm(extras.format),
            tool_choice=extras.tool_choice,
            tools=extras.tools,
            metadata=prediction.metadata or {},
            user=prediction.user or UNSET,
            usage=usage_of(usage) if usage else UNSET,
            release=prediction.release_name or UNSET,
            retrieval=outcome if self.has_searched else UNSET,
            verdict=_verdict(verdict) if verdict else UNSET,
            fallback=prediction.fallback or UNSET,
            error_code=error.code if error is not None else UNSET,
        )

    def _result(self, hit: Hit) -> FileSearchResult:
        passage = hit.passage
        return FileSearchResult(
            file_id=passage.document_id,
            filename=passage.document_name,
            score=round(hit.score, 6),
            passage=passage.n,
            document_version=passage.document_version,
            start=passage.start,
            end=passage.end,
            url=self._link(passage),
            text=passage.text or None,
            page=passage.page,
        )


def ends_as(finish_reason: FinishReason | str | None) -> Literal["completed", "incomplete"]:
    """The status of an answer that ended so."""
    return "completed" if finish_reason in _WHOLE else "incomplete"


def failure_of(error: ServiceError) -> ResponseFailure:
    """An error in OpenAI's few words for one."""
    return ResponseFailure("rate_limit_exceeded" if error.status == 429 else "server_error", error.message)


def usage_of(usage: Usage) -> ResponseUsage:
    """The tokens under the names that they have here."""
    return ResponseUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


def _incomplete(finish_reason: FinishReason | None) -> IncompleteDetails:
    return IncompleteDetails("content_filter" if finish_reason == "content_filter" else "max_output_tokens")


def _verdict(verdict: Verdict) -> ResponseVerdict:
    return ResponseVerdict(
        verdict.status,
        verdict.reason,
        verdict.status == "abstained",
        round(verdict.support, 4),
        verdict.dropped_sentences,
    )
