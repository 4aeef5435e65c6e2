"""Reads mail (EML): who wrote to whom, when and about what, and the text as a mail program shows it.

The main rule: of a text that comes in two forms the one that is shown counts, which is HTML; texts that stand one below
the other count each, and so does a mail that was forwarded within. Attachments are named and not read.
"""

import email
import email.policy
import re
from collections.abc import Iterable
from email.errors import MessageError
from email.message import Message
from typing import Any

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.draft import Draft, tidy
from retrieval.parsing.plain import encodings_of, to_text, write_text
from retrieval.parsing.webpage import declared_charset, write_page

_HEADERS = ("From", "To", "Cc", "Date")
_MOST_ATTACHMENTS = 100
# Each part is looked for the ends of all that it is in: time grows with the square of the depth.
_MOST_NESTED = 300
_BOUNDARY = re.compile(rb";[\s\x1c-\x1f]*+boundary", re.IGNORECASE)
# What the library's parser of headers stumbles with over malformed ones.
_MALFORMED = (MessageError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return headers and text; the title is the subject.

    Raises:
        UnreadableDocument: It is not mail, or has neither text nor a subject.
        LimitExceeded: It has more parts with parts than any mail.
    """
    if sum(1 for _ in _BOUNDARY.finditer(content)) > _MOST_NESTED:
        reason = f"the mail has more than {_MOST_NESTED:,} parts with parts of their own: forward it without them"
        raise LimitExceeded(reason, "depth")
    # The older policy leaves headers as they are, so that a malformed one is no failure of the whole.
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    if not any(message[name] for name in ("From", "To", "Subject", "Date", "Received")):
        raise UnreadableDocument("the file is not a mail message: it has no headers")
    draft = Draft(limits.max_characters)
    writer = _Writer(draft)
    subject = _header(message, "Subject")
    if not writer.mail(message) and not subject:
        raise UnreadableDocument("the mail has no text")
    if names := writer.attachments[:_MOST_ATTACHMENTS]:
        draft.block(f"Attachments: {', '.join(names)}", "paragraph")
    return draft.finish(subject)


class _Writer:
    """Writes what a mail program shows, part by part, and gathers the names of what it offers to save."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.attachments: list[str] = []

    def mail(self, message: "Message[Any, Any]", level: int = 1) -> bool:
        """Write a mail under its subject, and tell whether it has text."""
        self._draft.heading(_header(message, "Subject"), level)
        named = [f"{name}: {value}" for name in _HEADERS if (value := _header(message, name))]
        self._draft.block("\n".join(named), "paragraph")
        return self._part(message)

    def _part(self, part: "Message[Any, Any]") -> bool:
        """Write a part with all that it shows, and tell whether there was any text."""
        before, kind = self._draft.length, part.get_content_type()
        inner: list[Message[Any, Any]] = part.get_payload() if part.is_multipart() else []  # type: ignore[assignment]
        if part.get_content_disposition() == "attachment":
            self._name(part, inner)
        elif kind == "message/rfc822" and inner:
            self.mail(inner[0], 2)
        elif kind == "multipart/alternative":
            # HTML is what is shown, wherever it stands.
            any(self._part(each) for each in sorted(inner, key=_has_page, reverse=True))
        elif kind == "multipart/related":
            self._all(inner[:1])  # The others are its pictures.
        elif kind.startswith("multipart/"):
            self._all(inner)
        elif kind == "text/html":
            write_page(_text(part, is_page=True), self._draft)
        elif kind == "text/plain":
            write_text(_text(part), self._draft)
        else:
            self._name(part, inner)
        return self._draft.length > before

    def _all(self, parts: "Iterable[Message[Any, Any]]") -> None:
        for each in parts:
            self._part(each)

    def _name(self, part: "Message[Any, Any]", inner: "list[Message[Any, Any]]") -> None:
        """Note what an attachment is called; a mail without a name by its subject."""
        name = tidy(_shown("Subject", part.get_filename() or ""))
        if name := name or (_header(inner[0], "Subject") if inner else ""):
            self.attachments.append(name)


def _has_page(part: "Message[Any, Any]") -> bool:
    return any(inner.get_content_type() == "text/html" for inner in part.walk())


def _header(message: "Message[Any, Any]", name: str) -> str:
    raw = next((value for known, value in message.raw_items() if known.lower() == name.lower()), "")
    return " ".join(tidy(_shown(name, str(raw))).split())


def _shown(name: str, raw: str) -> str:
    """Return a header's value with encoded words decoded, or as it stands where it is malformed."""
    value = " ".join(raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split())
    try:
        return str(email.policy.default.header_factory(name, value))
    except _MALFORMED:
        return value


def _text(part: "Message[Any, Any]", *, is_page: bool = False) -> str:
    payload = part.get_payload(decode=True)
    content = payload if isinstance(payload, bytes) else b""
    charset = part.get_content_charset() or (declared_charset(content) if is_page else None)
    try:
        return to_text(content, charset)
    except UnreadableDocument:  # It is not what it says; most of it may be.
        encoding = next(iter(encodings_of(charset)), "utf-8")
        try:
            return content.decode(encoding, "replace")
        except LookupError:
            return content.decode("utf-8", "replace")
