"""Reads mail (EML): who wrote to whom, when and about what, and the text as a mail program shows it.

The main rule: of a text that comes in two forms the one that is shown counts, which is HTML. Attachments are named and
not read.
"""

import email
import email.policy
from email.message import EmailMessage, MIMEPart

from retrieval.documents import ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.draft import Draft, tidy
from retrieval.parsing.plain import write_text
from retrieval.parsing.webpage import write_page

_HEADERS = ("From", "To", "Cc", "Date")
_MOST_ATTACHMENTS = 100
# Each part is looked for the ends of all that it is in: time grows with the square of the depth.
_MOST_NESTED = 300


def read(content: bytes, limits: ParseLimits) -> ParsedDocument:
    """Return headers and text; the title is the subject.

    Raises:
        UnreadableDocument: It is not mail, or has neither text nor a subject.
        LimitExceeded: It has more parts with parts than any mail.
    """
    if content.lower().count(b"boundary") > _MOST_NESTED:
        reason = f"the mail has more than {_MOST_NESTED:,} parts with parts of their own: forward it without them"
        raise LimitExceeded(reason, "depth")
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    if not any(message[name] for name in ("From", "To", "Subject", "Date", "Received")):
        raise UnreadableDocument("the file is not a mail message: it has no headers")
    subject = _header(message, "Subject")
    draft = Draft(limits.max_characters)
    draft.heading(subject, 1)
    named = [f"{name}: {value}" for name in _HEADERS if (value := _header(message, name))]
    draft.block("\n".join(named), "paragraph")
    if not _write_body(message, draft) and not subject:
        raise UnreadableDocument("the mail has no text")
    names = [tidy(part.get_filename() or "") for part in message.iter_attachments()][:_MOST_ATTACHMENTS]
    if names := [name for name in names if name]:
        draft.block(f"Attachments: {', '.join(names)}", "paragraph")
    return draft.finish(subject)


def _header(message: EmailMessage, name: str) -> str:
    return " ".join(tidy(str(message[name] or "")).split())


def _write_body(message: EmailMessage, draft: Draft) -> bool:
    """Write the text of the form that is shown, and tell whether there is one."""
    for form in ("html", "plain"):
        part = message.get_body((form,))
        if part is None:
            continue
        before = draft.length
        text = _text(part)
        if form == "html":
            write_page(text, draft)
        else:
            write_text(text, draft)
        if draft.length > before:
            return True
    return False


def _text(part: MIMEPart) -> str:
    try:
        return str(part.get_content())
    except (LookupError, UnicodeError):  # A charset that is unknown, or not what it says.
        payload = part.get_payload(decode=True)
        return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
