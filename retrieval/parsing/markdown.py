"""Reads Markdown: the file is the source text, and the block structure comes from CommonMark's own rules and tables.

The main rule: only blocks are parsed, by line; a block's offsets are those of its lines, so code fences, front
matter and anything unusual stay exactly where they are.
"""

import re
from itertools import accumulate

from markdown_it import MarkdownIt
from markdown_it.token import Token

from retrieval.documents import Block, BlockKind, ParsedDocument, ParseLimits
from retrieval.parsing.draft import Headings
from retrieval.parsing.plain import decode

_KINDS: dict[str, BlockKind] = {
    "heading_open": "heading",
    "paragraph_open": "paragraph",
    "bullet_list_open": "list",
    "ordered_list_open": "list",
    "blockquote_open": "quote",
    "table_open": "table",
    "fence": "code",
    "code_block": "code",
    "html_block": "paragraph",
}
_LINE = re.compile(r"[^\n\r]*(?:\r\n?|\n|\Z)")
_FRONT_MATTER = re.compile(
    r"---[ \t]*(?:\r\n?|\n)(?P<body>.*?)(?:\r\n?|\n)(?:---|\.\.\.)[ \t]*(?=[\r\n]|\Z)", re.DOTALL
)
_TITLE_FIELD = re.compile(r"^title:[ \t]*(['\"]?)(?P<title>[^\r\n]+?)\1[ \t]*\r?$", re.MULTILINE)
_ATTRIBUTES = re.compile(r"(?<!\s)\s*+\{\s*+[#.:][^{}]*+\}\s*$")
_LINK = re.compile(r"!?\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
_EMPHASIS = re.compile(r"(?<![\w\\])(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)|(\*\*|\*)(?=\S)(.+?)(?<=\S)\3")
_LONGEST_HEADING = 300


def read(content: bytes, limits: ParseLimits, charset: str | None = None) -> ParsedDocument:
    """Return the file with its blocks; its title is the front matter's, or else its first top-level heading."""
    text = decode(content, limits, charset)
    start, title, blocks = _front_matter(text)
    lines = [start, *(start + end for end in accumulate(len(line) for line in _LINE.findall(text[start:])))]
    headings = Headings()
    for token, inline in _block_tokens(text[start:]):
        assert token.map
        kind = _KINDS[token.type]
        first, end = _trim(text, lines[token.map[0]], lines[min(token.map[1], len(lines) - 1)])
        if first == end:
            continue
        path = headings.path
        if kind == "heading":
            heading = _plain(inline)
            path = headings.enter(int(token.tag[1]), heading)
            title = title or (heading if token.tag == "h1" else None)
        blocks.append(Block(first, end, kind, path))
    return ParsedDocument(text, title, tuple(blocks))


def _front_matter(text: str) -> tuple[int, str | None, list[Block]]:
    """Return where the Markdown proper begins, the title the front matter gives, and the front matter as a block."""
    found = _FRONT_MATTER.match(text)
    if not found or not re.search(r"^[\w-]+:", found["body"], re.MULTILINE):
        return 0, None, []
    title = _TITLE_FIELD.search(found["body"])
    return found.end(), title["title"].strip() if title else None, [Block(0, found.end(), "paragraph")]


def _block_tokens(text: str) -> list[tuple[Token, str]]:
    """Return the outermost block tokens, each with the raw inline text that follows it."""
    parser = MarkdownIt("commonmark").enable("table")
    # Inline markup is not needed, and its hostile cases are the expensive ones.
    parser.core.ruler.enableOnly(["normalize", "block"])
    tokens = parser.parse(text)
    return [
        (token, following.content)
        for token, following in zip(tokens, [*tokens[1:], *tokens[-1:]], strict=True)
        if token.level == 0 and token.map and token.type in _KINDS
    ]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span without blank lines around it; the first line keeps its indentation."""
    piece = text[start:end]
    stripped = piece.strip()
    return (start, start) if not stripped else (start + piece.index(stripped), start + len(piece.rstrip()))


def _plain(heading: str) -> str:
    """Return a heading's text without Markdown and without the attributes some dialects put after it."""
    text = _ATTRIBUTES.sub("", heading[:_LONGEST_HEADING])
    text = _TAG.sub("", _LINK.sub(r"\1", text))
    text = _EMPHASIS.sub(lambda found: found[2] or found[4], text).replace("`", "")
    return " ".join(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text).split())
