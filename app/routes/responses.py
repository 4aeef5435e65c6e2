"""`/v1/responses`: OpenAI's newer form of a chat, asked and read again.

Asking is a form of the route that answers (see `app.routes.chat`). What is read again comes from the record, with each
passage as it still stands, or without its text where its document was replaced or deleted.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast
from uuid import UUID

import msgspec
from fastapi import APIRouter, Request, Response

from app.access import Caller
from app.chat import ChatRequest, CitationStyle
from app.errors import NotFound, PayloadTooLarge, ServiceError
from app.gateway import Answering
from app.messages import Usage
from app.predictions import Prediction
from app.predictions.keeping import Pseudonym
from app.responses import (
    AskedResponse,
    as_chat,
    decode_response_request,
    in_our_words,
    our_field,
    recorded,
    turns_after,
)
from app.routes.completions import Link
from app.routes.dependencies import CallerDep, Services, ServicesDep, errors, own_address
from app.routes.forms import Headers, Read
from app.routes.front import RESPONSES_PATH
from app.routes.predictions import prediction_of
from app.routes.response_events import ResponseRendering
from app.routes.response_objects import ResponseObject, ResponseVerdict, Status, Telling, ends_as
from retrieval.citations import Citation
from retrieval.documents import Hit, Passage
from retrieval.errors import DocumentChanged, DocumentNotFound

routes = APIRouter()


class Record(Protocol):
    """Where predictions are found: this process's log, and what all replicas share."""

    async def get(self, tenant: str, prediction_id: str, /) -> Prediction | None:
        """Find one of the tenant's predictions."""
        ...


class ResponsesForm:
    """OpenAI's responses; `records` are asked in turn for the one that a request goes on from.

    `max_body_bytes` is the largest conversation that is gone on from, with what is asked; `pseudonym` gives the name
    that a user of a tenant is kept by.
    """

    path = RESPONSES_PATH

    def __init__(
        self,
        *records: Record,
        collection: str,
        max_body_bytes: int,
        remote_images: bool = False,
        pseudonym: Pseudonym | None = None,
    ) -> None:
        self._records = records
        self._collection = collection
        self._max_body_bytes = max_body_bytes
        self._remote_images = remote_images
        self._pseudonym = pseudonym

    async def read(self, sent: bytes, caller: Caller) -> Read:
        """Read a request; what goes on record is the chat request that it is answered as."""
        request = decode_response_request(sent)
        previous = None
        if request.previous_response_id is not None:
            previous = await self._previous(request.previous_response_id, caller)
        before = turns_after(previous) if previous is not None else []
        asked = as_chat(request, before, collection=self._collection, remote_images=self._remote_images)
        body = msgspec.json.encode(asked)
        # Each response of a chain records all turns, so that without a limit n of them record the square of n.
        if previous is not None and len(body) > self._max_body_bytes:
            raise PayloadTooLarge(
                f"`previous_response_id`: with the turns before, this conversation has {len(body)} bytes, and may "
                f"have {self._max_body_bytes} (setting `limits.max_body_bytes`). Begin a new one: send what it needs "
                "of them in `input`.",
                param="previous_response_id",
            )
        return asked, body, previous.conversation if previous is not None else None

    async def _previous(self, response_id: str, caller: Caller) -> Prediction:
        for record in self._records if _is_id(response_id) else ():
            found = await record.get(caller.tenant, response_id)
            if found is not None:
                if found.key_id != caller.key_id or not self._is_of_user(found, caller):
                    caller.require("predictions:read")  # It leads to what somebody else was told.
                return found
        raise NotFound(
            f"`previous_response_id`: there is no response {response_id[:64]!r}.", param="previous_response_id"
        )

    def _is_of_user(self, prediction: Prediction, caller: Caller) -> bool:
        """Whether it was told to the user that the key acts for; one that acts for nobody may go on from all of its."""
        if caller.user is None or prediction.user == caller.user:
            return True
        return self._pseudonym is not None and prediction.user == self._pseudonym(caller.tenant, caller.user)

    def style(self, _: Headers, request: ChatRequest) -> CitationStyle:
        """How the caller wants citations: as annotations, unless they say otherwise."""
        return (request.retrieval and request.retrieval.style) or "annotations"

    def rendering(self, answering: Answering, *, link: Link, style: CitationStyle) -> ResponseRendering:  # noqa: ARG002 - marks are in the text.
        """Begin to render an answer."""
        return ResponseRendering(cast("AskedResponse", answering.request), answering, link)

    def explain(self, error: ServiceError, request: ChatRequest | None) -> None:
        """Make an error name the fields as they are called here, and a filter as that of the tool if it came by it."""
        error.message, error.param = in_our_words(error.message), our_field(error.param)
        extras = request.responses if isinstance(request, AskedResponse) else None
        if error.param == "retrieval.filter" and extras and any(tool.get("filters") for tool in extras.tools):
            error.param = "tools[0].filters"


def _is_id(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


@routes.get(
    "/v1/responses/{response_id}",
    operation_id="get_response",
    tags=["chat"],
    response_class=Response,
    responses={
        200: {
            "description": "The response as it stands.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ResponseObject"}}},
        },
        **errors(404, 503),
    },
)
async def get_response(services: ServicesDep, caller: CallerDep, request: Request, response_id: UUID) -> Response:
    """Show a response again, from the record, if its content is kept.

    The search's results are told as they were asked for; a passage whose document was replaced or deleted has no text.
    """
    prediction = await prediction_of(services, caller, response_id)
    asked = recorded(prediction)
    base = services.public_url or own_address(request)

    def link(passage: Passage) -> str:
        path = services.links.path(caller.tenant, passage.document_id, passage.n, passage.document_version)
        return base + path

    hits = await _hits(services, caller, prediction)
    told = _told(Telling(asked, prediction, link), prediction, hits)
    return Response(msgspec.json.encode(told), media_type="application/json")


def _told(telling: Telling, prediction: Prediction, hits: Mapping[str, Hit]) -> ResponseObject:
    """The response as the record has it."""
    finish: Any = prediction.finish_reason
    status: Status = "failed"
    match prediction.outcome:
        case "finished":
            status = ends_as(finish)
        case "open":
            status = "in_progress"
        case "cancelled":
            status = "cancelled"
    error = None
    if status == "failed":
        error = ServiceError(f"The answer did not come to its end: {prediction.error_code or prediction.outcome}.")
    citations = [_citation(facts, hits, prediction) for facts in prediction.citations or ()]
    message = telling.message(
        prediction.answer or "", citations, status="completed" if status == "completed" else "incomplete"
    )
    seconds = prediction.total_seconds
    ended = int(prediction.created_at.timestamp() + seconds) if seconds is not None else None
    prompt, completion = prediction.prompt_tokens, prediction.completion_tokens
    usage = Usage(prompt or 0, completion or 0, (prompt or 0) + (completion or 0)) if completion is not None else None
    response = telling.response(
        status,
        [*([telling.search(list(hits.values()))] if telling.has_searched else []), message],
        completed_at=ended if status == "completed" else None,
        finish_reason=finish,
        usage=usage,
        error=error,
    )
    changes: dict[str, Any] = {}
    if prediction.error_code is not None:
        changes["error_code"] = prediction.error_code
    if prediction.verdict is not None:
        verdict, _, reason = prediction.verdict.partition(":")
        changes["verdict"] = ResponseVerdict(cast("Any", verdict), reason or "none", verdict == "abstained")
    return msgspec.structs.replace(response, **changes) if changes else response


async def _hits(services: Services, caller: Caller, prediction: Prediction) -> dict[str, Hit]:
    """What was found, by passage id, with the passages as they stand, of documents that the caller sees."""
    scope = caller.sees()
    found = {}
    for facts in prediction.passages or ():
        try:
            passage = await services.retriever.passage(
                scope, facts["document_id"], facts["n"], version=facts["document_version"]
            )
            is_same = (passage.start, passage.end) == (facts["start"], facts["end"])
        except (DocumentNotFound, DocumentChanged):
            is_same = False
        if not is_same:
            passage = _bare(facts["document_id"], facts["document_version"], facts["n"], facts["start"], facts["end"])
        found[facts["id"]] = Hit(passage, facts["score"])
    return found


def _bare(document_id: str, version: str, n: int, start: int = 0, end: int = 0) -> Passage:
    """A passage of a document that is not there as it was: its name goes by the document's id."""
    return Passage(document_id, version, n, "", start, end, document_name=document_id)


def _citation(facts: Mapping[str, Any], hits: Mapping[str, Hit], prediction: Prediction) -> Citation:
    """A citation as it was, its mark found in the answer's text."""
    hit = hits.get(facts["passage_id"])
    if hit is None:
        n = int(facts["passage_id"].rpartition("/")[2])
        hit = Hit(_bare(facts["document_id"], facts["document_version"], n), 0.0)
    start, end = facts["answer_start"], facts["answer_end"]
    mark = f"[{facts['n']}]"
    at = (prediction.answer or "").find(mark, start, end + len(mark) + 1)
    return Citation(
        n=facts["n"],
        answer_start=start,
        answer_end=end,
        marker_start=at if at >= 0 else end,
        marker_end=at + len(mark) if at >= 0 else end,
        passage=hit.passage,
        source_start=facts["source_start"],
        source_end=facts["source_end"],
        quote=facts.get("quote") or "",
        score=hit.score,
        status=facts["status"],
        support=facts["support"],
    )
