"""Reads HTML: what a reader sees of the page's main part, without its navigation.

The main rule: hidden text is not text. Elements that are hidden by attribute or inline style, white ones and those of
no size included, are dropped with all they contain (it is where injected instructions hide); style sheets are not
evaluated.
"""

import re
from collections.abc import Iterator
from typing import Any

from selectolax.lexbor import LexborHTMLParser

from retrieval.documents import BlockKind, ParsedDocument, ParseLimits
from retrieval.errors import LimitExceeded, UnreadableDocument
from retrieval.parsing.draft import Draft, tidy, visible
from retrieval.parsing.plain import decode

_NOT_CONTENT = frozenset(
    (
        "audio",
        "button",
        "canvas",
        "datalist",
        "dialog",
        "embed",
        "footer",
        "head",
        "iframe",
        "input",
        "math",
        "nav",
        "noscript",
        "object",
        "script",
        "select",
        "style",
        "svg",
        "template",
        "textarea",
        "video",
    )
)
_NOT_CONTENT_ROLES = frozenset(("navigation", "contentinfo", "search", "menu", "menubar", "dialog", "alertdialog"))
_BLOCKS = frozenset(
    (
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "form",
        "header",
        "hgroup",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    )
)
_NOT_IN_CELLS = frozenset(("table", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "pre", "blockquote", "form"))
_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_ENDS = r"\s*(?:;|!|$)"
_NOTHING = rf"(?:0(?:\.0*)?|(?:0?\.\d+|1(?:\.0*)?)(?=\s*p[xt]))(?:px|pt|r?em|%)?{_ENDS}"
_UNSEEN = re.compile(
    rf"(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse)|(?<![\w-])opacity\s*:\s*(?:0|0?\.0\d*)%?{_ENDS}"
    rf"|font-size\s*:\s*{_NOTHING}|(?<![\w-])font\s*:[^;]*?(?<![\d.])(?:0?\.\d+|[01](?:\.0*)?)p[xt]\b|(?:text-indent|left|top)\s*:\s*-\d{{3,}}"
    rf"|(?<![\w-])(?:text-indent|left|top)\s*:\s*-9\d(?:\.\d*)?v[wh]\b|clip-path\s*:\s*inset\(\s*(?:50|100)%"
    rf"|(?<![\w-])(?:max-)?(?:width|height)\s*:\s*{_NOTHING}|clip\s*:\s*rect\(\s*[01](?:px)?\b|transform\s*:\s*scale\(\s*0\s*\)"
    rf"|(?<![\w-])color\s*:\s*transparent)",
    re.IGNORECASE,
)
_WHITE = re.compile(
    rf"(?<![\w-])color\s*:\s*(?:white|\#fff(?:[\da-f]|fff(?:[\da-f]{{2}})?)?|rgba?\(\s*255[\s,]+255[\s,]+255\b[^)]*\)){_ENDS}",
    re.IGNORECASE,
)
_WHITE_NAMES = frozenset(("white", "#fff", "#ffffff"))
_FOOTNOTE = re.compile(r"\[[^\[\]]{1,16}\]\Z")
_CHARSET = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?([A-Za-z0-9_.:-]{2,30})", re.IGNORECASE
)
_SPACES = re.compile(r"\s+")
# An unclosed tag nests everything after it; the parser's time grows with the square of the depth.
_TAG = re.compile(
    r"<(/?)(?!(?:area|base|br|col|dd|dt|hr|img|input|li|link|meta|option|p|source|tbody|td|tfoot|th|thead|tr|wbr)\b)[a-z][^<>]*?(/?)>",
    re.IGNORECASE,
)
_DEEPEST = 5_000
_SHORTEST_MAIN = 200


def read(content: bytes, limits: ParseLimits, charset: str | None = None) -> ParsedDocument:
    """Return the page's main text; its title is its first `<h1>`, or else its `<title>`."""
    html = decode(content, limits, charset or declared_charset(content))
    draft = Draft(limits.max_characters)
    title = write_page(html, draft)
    if not draft.length:
        raise UnreadableDocument("the page has no visible text: it may be made by scripts; save it from a browser")
    return draft.finish(title)


def declared_charset(content: bytes) -> str | None:
    """Return the charset that a page names in its head; a page that can name UTF-16 in ASCII is in UTF-8."""
    declared = _CHARSET.search(content[:4096])
    charset = declared[1].decode("ascii") if declared else None
    return "utf-8" if charset and charset.lower().startswith("utf-16") else charset


def write_page(html: str, draft: Draft) -> str | None:
    """Write a page's main part, and return its first `<h1>`, or else its `<title>`.

    Raises:
        LimitExceeded: Its elements are nested too deeply.
    """
    _refuse_deep_nesting(html)
    tree = LexborHTMLParser(html)
    _Writer(draft).write(_main(tree))
    heading = next((each for each in tree.css("h1") if not _unseen_within(each)), None)
    title = tree.css_first("title")
    named = _text(heading) if heading is not None else ""
    return named or (tidy(title.text()) if title is not None else None)


def _refuse_deep_nesting(html: str) -> None:
    depth = 0
    for found in _TAG.finditer(html):
        depth = max(0, depth - 1) if found[1] else depth + (not found[2])
        if depth > _DEEPEST:
            raise LimitExceeded(f"the page nests more than {_DEEPEST:,} elements: simplify it", "depth")


def _main(tree: Any) -> Any:
    """Return the element that holds the page's main part, or the body."""
    for element in tree.css("main, [role=main]"):
        if not _unseen_within(element) and len(_text(element)) >= _SHORTEST_MAIN:
            return element
    return tree.body if tree.body is not None else tree.root


def _unseen(node: Any) -> bool:
    """Tell whether an element and all it contains is not part of what a reader came for."""
    if node.tag in _NOT_CONTENT:
        return True
    if node.tag == "sup" and _FOOTNOTE.match(node.text().strip()):
        return True
    attributes = node.attributes
    if not attributes:
        return False
    if "hidden" in attributes or (attributes.get("aria-hidden") or "").lower() == "true":
        return True
    if (attributes.get("role") or "").lower() in _NOT_CONTENT_ROLES:
        return True
    style = attributes.get("style") or ""
    if style and _UNSEEN.search(style):
        return True
    is_white = _WHITE.search(style) if style else (attributes.get("color") or "").lower() in _WHITE_NAMES
    return bool(is_white) and not _has_background(node)


def _unseen_within(node: Any) -> bool:
    """Tell whether an element, or one that it stands in, is unseen; a body is not asked: scripts show it in the end."""
    while node is not None and node.tag not in ("body", "html"):
        if node.is_element_node and _unseen(node):
            return True
        node = node.parent
    return False


def _has_background(node: Any) -> bool:
    """Tell whether an element stands on a colour of its own or of an outer element, as far as attributes say."""
    while node is not None:
        attributes = node.attributes if node.is_element_node else None
        if attributes and ("bgcolor" in attributes or "background" in (attributes.get("style") or "").lower()):
            return True
        node = node.parent
    return False


def _text(node: Any) -> str:
    """Return the visible text inside a node, on as many lines as it has breaks."""
    parts = []
    for inner in _seen(node):
        if inner.is_text_node:
            parts.append(_SPACES.sub(" ", inner.text_content or ""))
        else:
            parts.append("\n" if inner.tag == "br" else " " if inner.tag in _BLOCKS else "")
    return tidy("".join(parts))


def _lines(node: Any) -> str:
    """Return the visible text inside a node with the spaces and lines that it has."""
    parts = []
    for inner in _seen(node):
        if inner.is_text_node:
            parts.append(inner.text_content or "")
        elif inner.tag == "br":
            parts.append("\n")
    return "".join(parts)


def _seen(node: Any) -> Iterator[Any]:
    """Yield the texts and elements inside a node that a reader sees, in order."""
    stack = [node.first_child]
    while stack:
        child = stack.pop()
        if child is None:
            continue
        stack.append(child.next)
        if child.is_text_node:
            yield child
        elif child.is_element_node and not _unseen(child):
            yield child
            stack.append(child.first_child)


class _Writer:
    """Walks the tree without recursion and writes blocks: inline text gathers until a block begins or ends."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._inline: list[str] = []
        self._lists: list[int | None] = []
        self._items: list[str] = []
        self._marker = ""
        self._quotes = 0

    def write(self, root: Any) -> None:
        stack: list[tuple[Any, bool]] = [(root, True)]
        while stack:
            node, entering = stack.pop()
            if not entering:
                self._leave(node.tag)
            elif node.is_text_node:
                self._inline.append(_SPACES.sub(" ", node.text_content or ""))
            elif node.is_element_node and not _unseen(node) and not self._whole(node):
                self._enter(node)
                if node.tag in _BLOCKS:
                    stack.append((node, False))
                children = []
                child = node.first_child
                while child is not None:
                    children.append((child, True))
                    child = child.next
                stack.extend(reversed(children))
        self._flush()

    def _whole(self, node: Any) -> bool:
        """Write an element that is one block whatever it contains, and tell whether it was one."""
        tag = node.tag
        if tag in _HEADINGS:
            self._flush()
            if self._lists:
                self._inline.append(_text(node))
                self._flush()
            else:
                self.draft.heading(_text(node), _HEADINGS[tag])
        elif tag == "pre" and not self._lists:
            self._flush()
            self.draft.block(visible(_lines(node)).strip("\n"), "code")
        elif tag == "table" and not self._lists and not any(inner.tag in _NOT_IN_CELLS for inner in _inside(node)):
            self._flush()
            self._table(node)
        elif tag == "br":
            self._inline.append("\n")
        else:
            return False
        return True

    def _table(self, table: Any) -> None:
        caption = table.css_first("caption")
        if caption is not None and not _unseen(caption):
            self.draft.block(_text(caption), "paragraph")
        rows = [
            [_text(cell) for cell in _children(row) if cell.tag in ("td", "th") and not _unseen(cell)]
            for row in table.css("tr")
            if not _unseen(row) and not _unseen(row.parent)
        ]
        if any(len(row) > 1 for row in rows):
            self.draft.rows(rows)
        else:
            for row in rows:
                self.draft.block("\n".join(row), "paragraph")

    def _enter(self, node: Any) -> None:
        tag = node.tag
        if tag not in _BLOCKS:
            return
        self._flush()
        if tag in ("ul", "ol"):
            start = (node.attributes.get("start") or "1") if tag == "ol" else ""
            self._lists.append(int(start) if start.isdecimal() and len(start) < 7 else 1 if start else None)
        elif tag == "li":
            number = self._lists[-1] if self._lists else None
            self._marker = "- " if number is None else f"{number}. "
            if number is not None:
                self._lists[-1] = number + 1
        elif tag == "blockquote":
            self._quotes += 1

    def _leave(self, tag: str) -> None:
        self._flush()
        if tag in ("ul", "ol"):
            self._lists.pop()
            if not self._lists:
                self.draft.block("\n".join(self._items), "list")
                self._items.clear()
        elif tag == "blockquote":
            self._quotes -= 1

    def _flush(self) -> None:
        text = tidy("".join(self._inline))
        self._inline.clear()
        if not text:
            return
        marker, self._marker = self._marker, ""
        if self._lists:
            indent = "  " * min(len(self._lists) - 1, 8)
            self._items.append(f"{indent}{marker or '  '}{' '.join(text.split())}")
        else:
            kind: BlockKind = "quote" if self._quotes else "paragraph"
            self.draft.block(marker + text, kind)


def _children(node: Any) -> list[Any]:
    found = []
    child = node.first_child
    while child is not None:
        found.append(child)
        child = child.next
    return found


def _inside(node: Any) -> list[Any]:
    """Return the elements inside a node, the node itself left out."""
    return [inner for inner in node.traverse() if inner.mem_id != node.mem_id]
