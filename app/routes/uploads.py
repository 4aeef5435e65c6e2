"""Uploads as they come: JSON or a form, decoded without holding up other requests."""

import binascii
from typing import Any

import msgspec
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from app.routes.bodies import read_as
from app.routes.errors import invalid_fields
from app.routes.schemas import MOST_NAME_CHARACTERS
from app.routes.upload_schemas import DocumentUpload
from retrieval.jobs import LINK

_SMALL_BYTES = 65_536
"""A body that is read quicker than a thread is asked to."""
_STEP = 4 * 65_536
_FORM_FIELD_BYTES = 1_000_000
"""Largest field of a form that is not the file."""


class Upload(msgspec.Struct, frozen=True):
    """An uploaded document, whatever form it came in."""

    name: str
    content: bytes
    media_type: str | None
    metadata: dict[str, Any] | None
    groups: list[str] | None
    etag: str = ""


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """Read the document that a request brings; raises InvalidRequest, UnsupportedMedia or PayloadTooLarge."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _read_form(request)
    elif kind in ("application/json", ""):
        body = await request.body()
        upload = _read_json(body) if len(body) < _SMALL_BYTES else await run_in_threadpool(_read_json, body)
    else:
        raise UnsupportedMedia(f"`content-type` is {kind!r}; send application/json or multipart/form-data.")
    if len(upload.content) > max_bytes:
        raise PayloadTooLarge(f"A document may have {max_bytes} bytes (setting `limits.max_document_bytes`).")
    return upload


async def _read_form(request: Request) -> Upload:
    async with request.form(max_files=1, max_fields=8, max_part_size=_FORM_FIELD_BYTES) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("`file`: the form needs a file under this name.", param="file")
        media_type = file.content_type if file.content_type != "application/octet-stream" else None
        facts = {
            "name": form.get("name") or file.filename or "",
            "media_type": media_type,
            "metadata": _read_field(form, "metadata", "null", "object"),
            "groups": _read_field(form, "groups", "null", "array"),
            "etag": form.get("etag"),
        }
        content = await file.read()
    try:
        asked = DocumentUpload.model_validate(facts)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None
    return _upload(asked, content, asked.media_type)


def _upload(asked: DocumentUpload, content: bytes, media_type: str | None) -> Upload:
    if asked.name is None:
        raise InvalidRequest("`name`: give the document a name.", param="name")
    return Upload(asked.name, content, media_type, asked.metadata, asked.groups, asked.etag or "")


def _read_field(form: FormData, name: str, absent: str, kind: str) -> Any:
    field = form.get(name) or absent
    try:
        return msgspec.json.decode(field if isinstance(field, str) else b"")
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"`{name}`: this form field must hold a JSON {kind}.", param=name) from error


def _read_json(body: bytes) -> Upload:
    asked = read_as(DocumentUpload, body)
    if sum(each is not None for each in (asked.text, asked.content_base64, asked.url)) != 1:
        raise InvalidRequest("Send the document as `text`, `content_base64` or `url`, one of them.", param="text")
    if asked.url is not None:
        return _read_link(asked, asked.url)
    if asked.text is not None:
        kind = asked.media_type or ("" if "." in (asked.name or "") else "text/plain")
        # It is characters already: what a page says of its bytes, or `media_type` of the file, is no longer so.
        return _upload(asked, _encoded(asked.text, "text"), f"{kind.partition(';')[0].strip()};charset=utf-8")
    try:
        content = _from_base64(asked.content_base64 or "")
    except ValueError as error:
        raise InvalidRequest("`content_base64` is not base64.", param="content_base64") from error
    return _upload(asked, content, asked.media_type)


def _read_link(asked: DocumentUpload, url: str) -> Upload:
    if asked.media_type is not None or asked.etag is not None:
        param = "media_type" if asked.media_type is not None else "etag"
        raise InvalidRequest(f"`{param}` is what the server at `url` says: leave it out.", param=param)
    name = asked.name or url.partition("#")[0]
    if len(name) > MOST_NAME_CHARACTERS:
        raise InvalidRequest(f"`name`: give one; the URL has over {MOST_NAME_CHARACTERS} characters.", param="name")
    return _upload(asked.model_copy(update={"name": name}), _encoded(url, "url"), LINK)


def _encoded(text: str, param: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"`{param}` has half of a surrogate pair.", param=param) from error


def _from_base64(text: str) -> bytes:
    """Decode step by step: one call for the whole would keep the interpreter's lock, and every other request waiting.

    Raises:
        ValueError: it is not base64.
    """
    pieces = [binascii.a2b_base64(text[at : at + _STEP], strict_mode=True) for at in range(0, len(text), _STEP)]
    if any(len(piece) != _STEP // 4 * 3 for piece in pieces[:-1]):
        raise ValueError("padding in the middle")
    return b"".join(pieces)
