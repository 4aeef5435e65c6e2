"""Takes links and images out of answers that rest on documents, so that no document sends a reader anywhere.

The main rule: nothing leaves that a chat page would fetch or make clickable, whatever a document told the model to
write: Markdown images and links, their definitions, HTML with attributes, addresses in angle brackets and bare ones.
An address of the sources stays as text, without its scheme; another, which may carry off what was said, goes. Code
stays where it is code for every reader: in fences at the start of a line, and in spans on one line.

What leaves depends on the text alone, never on how the stream was cut.
"""

import html
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

REMOVED = "(link removed)"
"""What stands in the place of an address that is not in the sources; no mark before or after makes a link of it."""

# Nothing that is to be taken for one thing is longer; what would be is text.
_LONGEST = 2_000
_SPECIAL = re.compile(
    r"\\[!-/:-@\[-`{-~]|`+|~{3,}|[\]】]\(|\]:|<|&(?:\#|colon|sol|period)|(?:https?|ftp)://|www\.", re.IGNORECASE
)
_UNFINISHED = re.compile(
    r"(?:\\|~{1,2}|[\]】]|h(?:t(?:tp?|tps?:?/?)?)?|f(?:tp?:?/?)?|w(?:ww?)?"
    r"|&(?:c(?:o(?:lo?)?)?|so?|p(?:e(?:r(?:io?)?)?)?)?)\Z"
)
_LONGEST_UNFINISHED = 8
_LAST = frozenset("\\~!]】htps:/fw&coleriHTPSFWCOLERI")
_TITLE = r"(?:\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\))"
_TARGET = re.compile(rf"[\]】]\([ \t]*(?P<to><[^<>\n]*>|(?:[^\s()<>]|\([^\s()]*\))*)(?:[ \t]+{_TITLE})?[ \t]*\)")
_DEFINITION = re.compile(r"\]:[ \t]*\n?[ \t]*(?P<to>\S*)")
_ADDRESS = re.compile(r"(?:(?:https?|ftp)://|www\.)(?P<rest>[^\s<>\"'`()\[\]{}|*\\]{0,2000})", re.IGNORECASE)
_AUTOLINK = re.compile(r"<(?P<to>[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*|[^\s<>@]+@[^\s<>@]+)>")
_TAG = re.compile(r"</?(?P<name>[A-Za-z][A-Za-z0-9-]*)(?P<rest>[^<>\n]*)>")
_ENTITY = re.compile(r"&(?:\#(?:x[0-9a-f]{0,7}|[0-9]{0,8})|colon|sol|period);?", re.IGNORECASE)
_OF_ADDRESSES = re.compile(r"[A-Za-z0-9:/.@]\Z")
_TRAILING = ".,;:!?_~"
_SCHEME = re.compile(r"(?:(?:https?|ftp)://)?(?:www\.)*", re.IGNORECASE)
# Elements that fetch, run or lead somewhere by themselves, whether or not they have attributes.
_ACTIVE = re.compile(
    r"(?:a|audio|base|body|embed|form|i?frame|ima?ge?|input|link|meta|object|picture|script|source|style|svg|video)\Z",
    re.IGNORECASE,
)
_MARKS_OF_ADDRESSES = frozenset("/:&\\<")

Step = tuple[int, str]
"""Where a construct ends, and what is written in its place."""


class LinkFilter:
    """Filters one answer: `feed` and `finish` for a stream, `whole` for a sentence that is complete.

    `sources` are the texts whose addresses may be told; `allowed` are the hosts that links and images may lead to:
    `docs.example.com`, `.example.com` for all below it, `*` for any.
    """

    def __init__(self, sources: Iterable[str], allowed: Sequence[str] = ()) -> None:
        self.removed = 0
        """How many links and images were taken out, or made text."""
        self._sources = sources
        self._allowed = allowed
        self._pending = ""
        self._before = (
            "\n"  # The last character that was decided about: what a line or a word begins with depends on it.
        )
        self._fence = ""
        # An open backtick makes code of what follows up to the next one, and text of what seemed to be code.
        self._has_open_tick = False

    def feed(self, text: str) -> str:
        """Take what comes next of a stream; return what may be sent now."""
        if not (self._pending or self._fence or _may_be_special(text) or _unfinished(text)):
            self._before = text[-1:] or self._before
            return text
        return self._scan(text, final=False)

    def finish(self) -> str:
        """Take the end of the stream; return what was held back."""
        return self._scan("", final=True)

    def whole(self, text: str, *, at_line_start: bool = True) -> str:
        """Filter a text that is complete; what is open at its end stays open for nothing that follows."""
        if not _may_be_special(text):
            return text
        self._before, self._fence = "\n" if at_line_start else " ", ""
        return self._scan(text, final=True)

    def _scan(self, more: str, *, final: bool) -> str:
        """Return what can be decided of what is pending and `more`, filtered; the rest waits for what follows."""
        text = self._before + self._pending + more
        out: list[str] = []
        at = 1
        while at < len(text):
            if self._fence:
                end, is_closed = self._code_end(text, at, final)
                out.append(text[at:end])
                at = end
                if not is_closed:
                    break
                self._fence = ""
                continue
            found = _SPECIAL.search(text, at)
            if found is None:
                end = len(text) if final else max(at, len(text) - _unfinished(text))
                out.append(text[at:end])
                at = end
                break
            out.append(text[at : found.start()])
            at = found.start()
            step = self._step(text, found, final)
            if step is None:
                break
            out.append(step[1])
            at = step[0]
        self._before, self._pending = text[at - 1], text[at:]
        return "".join(out)

    def _step(self, text: str, found: re.Match[str], final: bool) -> Step | None:
        """Decide about the construct that begins at `found`; None when it takes what follows to do so."""
        mark, at = found[0], found.start()
        if mark[0] == "\\":
            return found.end(), mark
        if mark[0] in "`~":
            return self._code(text, found, final)
        if mark[-1] == "(":
            return self._target(text, at, final)
        decide = {"<": self._angle, "]": self._definition, "&": self._entity}.get(mark[0], self._address)
        return decide(text, at, final)

    def _target(self, text: str, at: int, final: bool) -> Step | None:
        target = _TARGET.match(text, at, at + _LONGEST)
        if target is None:
            return (at + 2, f"{text[at]} (") if _is_over(text, at, final) else None
        if target.end() == len(text) and not final:
            return None
        # What follows must not take the place of the target.
        gap = " " if text[target.end() : target.end() + 1] in ("(", "[", ":") else ""
        return target.end(), self._kept(target["to"], target[0], text[at] + gap)

    def _definition(self, text: str, at: int, final: bool) -> Step | None:
        definition = _DEFINITION.match(text, at, at + _LONGEST)
        assert definition
        if definition.end() == len(text) and not final and len(text) - at < _LONGEST:
            return None
        is_one = not _MARKS_OF_ADDRESSES.isdisjoint(definition["to"]) and not self._is_allowed(definition["to"])
        self.removed += is_one
        return at + 2, "] :" if is_one else "]:"

    def _address(self, text: str, at: int, final: bool) -> Step | None:
        address = _ADDRESS.match(text, at)
        assert address
        if address.end() == len(text) and not final and len(address["rest"]) < _LONGEST:
            return None
        to = address[0].rstrip(_TRAILING)
        if at + len(to) <= address.start("rest"):
            return address.start("rest"), text[at : address.start("rest")]
        return at + len(to), self._kept(to, to, self._told(to))

    def _angle(self, text: str, at: int, final: bool) -> Step | None:
        follows = text[at + 1 : at + 2]
        if not follows and not final:
            return None
        if not (follows.isascii() and follows.isalpha()) and follows not in ("/", "!", "?"):
            return at + 1, "<"
        if link := _AUTOLINK.match(text, at, at + _LONGEST):
            return link.end(), self._kept(link["to"], link[0], self._told(link["to"]))
        if tag := _TAG.match(text, at, at + _LONGEST):
            is_harmless = not _ACTIVE.match(tag["name"]) and "=" not in tag["rest"]
            self.removed += not is_harmless
            # What stood around it must not become one.
            return tag.end(), tag[0] if is_harmless else "" if text[at - 1].isspace() else " "
        is_none = "<" in text[at + 1 :] or ">" in text[at:] or _is_over(text, at, final)
        return (at + 1, "‹") if is_none else None

    def _entity(self, text: str, at: int, final: bool) -> Step | None:
        """Show a character reference that would become a part of an address; leave the others to be read."""
        entity = _ENTITY.match(text, at)
        assert entity
        if entity.end() == len(text) and not final:
            return None
        is_hiding = _OF_ADDRESSES.match(html.unescape(entity[0].rstrip(";").lower() + ";"))
        return entity.end(), f"&amp;{entity[0][1:]}" if is_hiding else entity[0]

    def _code(self, text: str, found: re.Match[str], final: bool) -> Step | None:
        """Leave code alone: begin a fence, or pass over a span."""
        at, run = found.start(), found[0]
        if found.end() == len(text) and not final:
            return None
        line_end = text.find("\n", at, at + _LONGEST)
        is_certain = final or line_end >= 0 or len(text) - at >= _LONGEST
        line = text[found.end() : line_end if line_end >= 0 else at + _LONGEST]
        if len(run) >= 3 and text[at - 1] == "\n":
            if not is_certain:
                return None
            if (run[0] == "~" or "`" not in line) and (line_end >= 0 or len(text) - at < _LONGEST):
                self._fence = run
                return found.end() + len(line), run + line
        if run[0] == "~":
            return found.end(), run
        closing = re.search(rf"(?<!`){run}(?!`)", line)
        if not is_certain and (closing is None or closing.end() == len(line)):
            return None
        # The cells of a table are cut before their code is looked for.
        if closing and not self._has_open_tick and "|" not in line[: closing.start()]:
            return found.end() + closing.end(), run + line[: closing.end()]
        self._has_open_tick = True
        return found.end(), run

    def _code_end(self, text: str, at: int, final: bool) -> tuple[int, bool]:
        """Return how far a fenced block goes in `text`, and whether it ends there."""
        mark, length = re.escape(self._fence[0]), len(self._fence)
        found = re.compile(rf"\n {{0,3}}{mark}{{{length},}}[ \t]*(?=\n{'|$' if final else ''})").search(text, at)
        if found:
            return found.end(), True
        unfinished = None if final else re.compile(rf"\n {{0,3}}{mark}*[ \t]*\Z").search(text, at)
        return (unfinished.start() if unfinished else len(text)), False

    def _kept(self, to: str, written: str, otherwise: str) -> str:
        """Return a link as it was written if it may lead where it does."""
        if self._is_allowed(to):
            return written
        self.removed += 1
        return otherwise

    def _told(self, to: str) -> str:
        """Return an address as text, if it is one of the sources'."""
        return _SCHEME.sub("", to, count=1) if any(to in source for source in self._sources) else REMOVED

    def _is_allowed(self, to: str) -> bool:
        if not self._allowed:
            return False
        try:
            parts = urlsplit(to.strip("<>"))
            host = (parts.hostname or "").lower()
        except ValueError:
            return False
        if parts.scheme.lower() not in ("http", "https") or "@" in parts.netloc or "\\" in to or not host.isascii():
            return False
        return any(
            name == "*" or host == name or (name.startswith(".") and host.endswith(name)) for name in self._allowed
        )


def _may_be_special(text: str) -> bool:
    """Tell whether a text may have something special: nearly every one has not, and this takes less than a pattern."""
    return (
        "](" in text
        or "<" in text
        or "`" in text
        or "://" in text
        or "]:" in text
        or "\\" in text
        or "&" in text
        or "~~~" in text
        or "】" in text
        or ("w" in text and "www." in text.lower())
        or ("W" in text and "www." in text.lower())
    )


def _unfinished(text: str) -> int:
    """Return how many characters at the end of `text` may be the first of something special."""
    if text[-1:] not in _LAST:
        return 0
    found = _UNFINISHED.search(text[-_LONGEST_UNFINISHED:].lower())
    return len(found[0]) if found else 0


def _is_over(text: str, at: int, final: bool) -> bool:
    """Tell whether what begins at `at` is over: it stands on one line, and is not longer than the longest."""
    return final or len(text) - at >= _LONGEST or "\n" in text[at:]
