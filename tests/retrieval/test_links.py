"""The filter of links: what leaves an answer that rests on documents, however its stream is cut."""

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retrieval.links import LinkFilter

EVIL = "https://evil.example/x?q=secret"
SOURCE = "Book at https://portal.example/help or www.portal.example, or read [more](https://portal.example/more)."


def streamed(text: str, cuts: list[int]) -> str:
    links = LinkFilter([SOURCE])
    places = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    pieces = [links.feed(text[left:right]) for left, right in pairwise(places)]
    return "".join([*pieces, links.finish()])


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        (f"See ![a chart]({EVIL}) here.", "See ![a chart] here."),
        (f"![a [nested] chart]( <{EVIL}> 'title' )", "![a [nested] chart]"),
        (f"[click]({EVIL})", "[click]"),
        ("[click](//evil.example)", "[click]"),
        ("[click](&#104;ttps://evil.example)", "[click]"),
        ("[click](javascript:alert(1))", "[click]"),
        ("![x](data:image/png;base64,AA==)", "![x]"),
        (f"[click](\n{EVIL})", "[click] (\n(link removed))"),
        (f"[click]({EVIL}", "[click] ((link removed)"),
        (f"![alt][id]\n\n[id]: {EVIL}", "![alt][id]\n\n[id] : (link removed)"),
        ("![id]\n\n[id]:\n //evil.example/x", "![id]\n\n[id] :\n //evil.example/x"),
        (f"<{EVIL}>", "(link removed)"),
        ("<eve@evil.example>", "(link removed)"),
        ("<javascript:x>", "(link removed)"),
        (f"go to {EVIL}.", "go to (link removed)."),
        ("go to www.evil.example, now", "go to (link removed), now"),
        ("HTTPS://EVIL.EXAMPLE/", "(link removed)"),
        ("&#104;ttps&colon;//evil.example", "&amp;#104;ttps&amp;colon;//evil.example"),
        (f'<img src="{EVIL}">!', "!"),
        (f'<img alt="<" src={EVIL}>', '‹img alt="<" src=(link removed)>'),
        (f'a <a href="{EVIL}">link</a>', "a link "),
        ("<div style='background:url(//evil.example)'>x</div>", "x</div>"),
        ("<script>x</script>", "x "),
        (f"<img\nsrc={EVIL}>", "‹img\nsrc=(link removed)>"),
        (f"`a\n{EVIL}`", "`a\n(link removed)`"),
        (f"\\`{EVIL} `", "\\`(link removed) `"),
        (f"| `a | {EVIL} | b` |", "| `a | (link removed) | b` |"),
        (f"- ```\n{EVIL}", "- ```\n(link removed)"),
        ("ht<b x=1>tps://evil.example", "ht tps://evil.example"),
        ("<<b x=1>img src=//evil.example>", "< img src=//evil.example>"),
        ("[a](b)(//evil.example)", "[a] (//evil.example)"),
        ("[a](b): //evil.example", "[a] : //evil.example"),
        (f"{EVIL}(//evil.example)", "(link removed)(//evil.example)"),
        (f"![{EVIL}](x)", "![(link removed)]"),
        ("[a]【1】(//evil.example)", "[a]【1】"),
        (f"see{EVIL}", "see(link removed)"),
    ],
)
def test_nothing_that_a_page_would_fetch_or_make_clickable_leaves(said: str, sent: str) -> None:
    links = LinkFilter([SOURCE])
    assert links.whole(said) == sent
    assert streamed(said, list(range(len(said)))) == sent


@pytest.mark.parametrize(
    "said",
    [
        "Kept for 30 days [1]. Great![2] [3]: The queue is bounded.",
        "a < b, 5 <6, x <= y and List<String> for <user>",
        f"Run `curl {EVIL}` now, or ``a ` {EVIL}``.",
        f"```bash\ncurl {EVIL}\n![x]({EVIL})\n```\nDone.",
        f"~~~\n{EVIL}\n~~~",
        "postgresql://user@host/db, redis://host:6379",
        "AT&T, Q&A, it&#39;s 5 &lt; 6",
        "array[0] and f(x)[1], [text] (aside), www. and https:// alone",
        "- item\n\n1. one\n\n> quote\n\n# Heading ~~struck~~ **bold** *it*",
        "\\[not a link\\](here) and C:\\temp",
    ],
)
def test_everything_else_leaves_as_it_came(said: str) -> None:
    links = LinkFilter([SOURCE])
    assert links.whole(said) == said
    assert streamed(said, list(range(len(said)))) == said
    assert links.removed == 0


def test_an_address_of_the_sources_stays_as_text_that_leads_nowhere() -> None:
    said = "Book at https://portal.example/help (or www.portal.example), and [more](https://portal.example/more)."
    links = LinkFilter([SOURCE])
    assert links.whole(said) == "Book at portal.example/help (or portal.example), and [more]."
    assert links.removed == 3


def test_hosts_that_are_allowed_may_be_linked_to() -> None:
    links = LinkFilter([], ["portal.example", ".docs.example"])
    kept = "![x](https://portal.example/a.png) [y](http://a.docs.example/b) https://portal.example/c <https://portal.example>"
    assert links.whole(kept) == kept
    others = (
        "[a](https://portal.example@evil.example) [b](https://docs.example) [c](https://portal.example.evil.example)"
    )
    assert links.whole(others) == "[a] [b] [c]"
    assert LinkFilter([], ["*"]).whole(f"[a]({EVIL})") == f"[a]({EVIL})"


def test_a_span_of_code_that_an_open_backtick_would_turn_into_text_is_not_taken_for_code() -> None:
    links = LinkFilter([])
    assert links.whole("a ` b.") + " " + links.whole(f"`{EVIL}`", at_line_start=False) == "a ` b. `(link removed)`"


def test_a_sentence_inside_a_line_begins_no_fence() -> None:
    said = f"```\n- {EVIL}\n```"
    assert LinkFilter([]).whole(said, at_line_start=False) == "```\n- (link removed)\n```"


def test_text_without_links_passes_at_once() -> None:
    links = LinkFilter([])
    assert [links.feed(piece) for piece in ("The queue", " of 64", " [1].", " Each\n", "# One")] == [
        "The queue",
        " of 64",
        " [1].",
        " Each\n",
        "# One",
    ]


PIECES = st.sampled_from(
    [
        *(
            "![",
            "[",
            "]",
            "](",
            "]:",
            "(",
            ")",
            "<",
            ">",
            "`",
            "``",
            "```",
            "~~~",
            "\n",
            "\n\n",
            " ",
            "\\",
            "|",
            "- ",
            "> ",
            '"',
            "=",
        ),
        *(
            "a",
            "b.",
            "x",
            "!",
            "&",
            "#",
            "&#104;",
            "&colon;",
            "//",
            ":",
            "/",
            "https://",
            "http",
            "www.",
            "s://",
            "ttp://evil.example",
        ),
        *(
            "evil.example",
            "portal.example",
            "https://portal.example/help",
            "img src=",
            "</a>",
            "<img ",
            "[id]: ",
            "'",
            "    ",
            *("ftp://", "(//evil.example)", " x=1>", "<b x=1>", "[1]", "【1】", "(b)", "ht", "<a"),
        ),
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)


@given(TEXTS, st.lists(st.integers(0, 80), max_size=8))
@example("xhttp://evil.example", [1])
@example("`a` ```\nb", [3, 4, 5])
@example("![a]", [4])
def test_what_leaves_does_not_depend_on_how_the_stream_was_cut(said: str, cuts: list[int]) -> None:
    assert streamed(said, cuts) == LinkFilter([SOURCE]).whole(said)


LIVE = {
    "html_inline": r"=|<(?:a|img|script)\b",
    "html_block": r"<\w[^>]*=|<(?:a|img|script)\b",
    "text": r"(?:https?|ftp)://\w|www\.\w",
}
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def live(tokens: list[Token]) -> list[str]:
    """What a page would fetch or make clickable of these."""
    found = []
    for token in tokens:
        if token.type in ("link_open", "image"):
            found.append(str(token.attrs))
        elif pattern := LIVE.get(token.type):
            found += re.findall(pattern, token.content)
        found += live(token.children or [])
    return found


@given(TEXTS)
def test_a_reader_of_markdown_finds_nothing_live_in_what_leaves(said: str) -> None:
    assert live(MARKDOWN.parse(LinkFilter([SOURCE]).whole(said))) == []
