"""A response on the wire: whole, or as OpenAI's typed events in their order, numbered from 0."""

from collections.abc import Sequence
from time import time
from typing import Any

import msgspec

from app.calls import Conclusion
from app.errors import ServiceError
from app.gateway import Answering
from app.messages import Piece
from app.responses import AskedResponse
from app.routes.completions import Link
from app.routes.response_objects import FileSearchCall, OutputMessage, ResponseObject, Telling, ends_as

_encode = msgspec.json.Encoder().encode


class ResponseRendering:
    """Renders one answer."""

    def __init__(self, asked: AskedResponse, answering: Answering, link: Link) -> None:
        self._telling = telling = Telling(asked, answering.prediction, link)
        self._found = answering.found
        self._has_searched = telling.has_searched
        self._number = 0
        self._texts: list[str] = []
        at = {"item_id": telling.message_id, "output_index": int(self._has_searched), "content_index": 0}
        self._at = at
        delta = "response.output_text.delta"
        # Text is encoded between bytes that are made once a stream; nothing else is built per token.
        self._before_delta = f"event: {delta}\ndata: ".encode() + _encode({"type": delta, **at})[:-1] + b',"delta":'

    def whole(self, pieces: Sequence[Piece], conclusion: Conclusion) -> bytes:
        """The body of an answer that is not streamed."""
        return _encode(self._concluded("".join([piece.text for piece in pieces]), conclusion))

    def opening(self) -> bytes:
        """The events before the text: the response, the search that has been made, and the message that begins."""
        telling = self._telling
        begun = telling.response("in_progress")
        events = [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
        ]
        if self._has_searched:
            item = {"output_index": 0, "item_id": telling.search_id}
            begun_search, search = telling.search(self._found, is_begun=True), telling.search(self._found)
            steps = ["in_progress", "searching", *(["completed"] if search.status == "completed" else [])]
            events += [
                self._event("response.output_item.added", output_index=0, item=begun_search),
                *(self._event(f"response.file_search_call.{step}", **item) for step in steps),
                self._event("response.output_item.done", output_index=0, item=search),
            ]
        message = telling.message(None, status="in_progress")
        events += [
            self._event("response.output_item.added", output_index=self._at["output_index"], item=message),
            self._event("response.content_part.added", **self._at, part=telling.text("")),
        ]
        return b"".join(events)

    def chunks(self, pieces: Sequence[Piece]) -> bytes:
        """One event for the text that arrived together."""
        text = "".join([piece.text for piece in pieces])
        if not text:
            return b""
        self._texts.append(text)
        number = self._number
        self._number = number + 1
        return b'%s%s,"logprobs":[],"sequence_number":%d}\n\n' % (self._before_delta, _encode(text), number)

    def ending(self, conclusion: Conclusion) -> bytes:
        """The events after the text: its citations, the end of each part, and the response."""
        telling, text = self._telling, "".join(self._texts)
        events = [
            self._event(
                "response.output_text.annotation.added",
                **self._at,
                annotation_index=index,
                annotation=telling.annotation(citation),
            )
            for index, citation in enumerate(conclusion.citations)
        ]
        response = self._concluded(text, conclusion)
        events += [
            self._event("response.output_text.done", **self._at, text=text, logprobs=[]),
            self._event("response.content_part.done", **self._at, part=telling.text(text, conclusion.citations)),
            self._event("response.output_item.done", output_index=self._at["output_index"], item=response.output[-1]),
            self._event(f"response.{response.status}", response=response),
        ]
        return b"".join(events)

    def broken_off(self, error: ServiceError, _request_id: str) -> bytes:
        """The event that ends a stream that failed: the response with what of it was sent."""
        message = self._telling.message("".join(self._texts), status="incomplete")
        return self._event(
            "response.failed", response=self._telling.response("failed", self._output(message), error=error)
        )

    def _concluded(self, text: str, conclusion: Conclusion) -> ResponseObject:
        status = ends_as(conclusion.finish_reason)
        message = self._telling.message(text, conclusion.citations, status=status)
        return self._telling.response(
            status,
            self._output(message),
            completed_at=int(time()) if status == "completed" else None,
            finish_reason=conclusion.finish_reason,
            usage=conclusion.usage,
            verdict=conclusion.verdict,
        )

    def _output(self, message: OutputMessage) -> list[FileSearchCall | OutputMessage]:
        return [self._telling.search(self._found), message] if self._has_searched else [message]

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
