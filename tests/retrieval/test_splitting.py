"""Splitting: the promises that hold for every document, and the shapes that passages should have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.documents import Block, Page, ParsedDocument, ParseLimits, Passage
from retrieval.parsing import markdown, plain
from retrieval.splitting import split
from tests.stopwatch import Stopwatch


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def parsed_markdown(text: str) -> ParsedDocument:
    return markdown.read(text.encode(), ParseLimits())


def passages_of(source: ParsedDocument | str, target: int = 20, most: int = 24) -> list[Passage]:
    parsed = parsed_markdown(source) if isinstance(source, str) else source
    return split(
        parsed,
        document_id="d",
        document_version="v",
        document_name="d.md",
        count_tokens=count_words,
        target_tokens=target,
        max_tokens=most,
    )


def words(count: int, first: str = "Word") -> str:
    return " ".join([first, *(f"w{n}" for n in range(count - 2)), "end."])


pieces = st.lists(
    st.sampled_from(
        [
            "# One\n\n",
            "## Two\n\n",
            "### Three\n\n",
            "A short sentence. ",
            f"{words(9)} ",
            f"{words(40)}\n",
            "\n\n",
            "\r\n\r\n",
            "- item one\n",
            "- item two\n",
            "1. first\n",
            "```\ncode line\n\nmore code\n```\n",
            "```\n" + "x = 1 + 2 + 3\n" * 12 + "```\n",
            "| a | b |\n|---|---|\n",
            "| 1 | 2 |\n",
            "> quoted text\n",
            "***\n",
            "[ref]: http://x.y\n",
            "---\ntitle: T\n---\n",
            "x" * 50,
            "的。" * 30,
            "<!-- comment -->\n",
            "    indented\n",
        ]
    ),
    max_size=30,
).map("".join)


@given(pieces)
def test_every_visible_character_is_in_exactly_one_passage(text: str) -> None:
    if not text.strip():
        return
    parsed = parsed_markdown(text)
    found = passages_of(parsed)
    covered = [index for passage in found for index in range(passage.start, passage.end) if not text[index].isspace()]
    assert covered == [index for index, letter in enumerate(text) if not letter.isspace()]
    assert all(passage.text == parsed.text[passage.start : passage.end] for passage in found)
    assert [passage.n for passage in found] == list(range(1, len(found) + 1))


@given(pieces)
def test_no_passage_is_longer_than_allowed(text: str) -> None:
    assert all(len(passage.text.split()) <= 24 for passage in (passages_of(text) if text.strip() else []))


@given(pieces)
def test_blocks_lie_in_order_inside_the_source(text: str) -> None:
    if not text.strip():
        return
    ends = [0]
    for block in parsed_markdown(text).blocks:
        assert ends[-1] <= block.start < block.end <= len(text)
        ends.append(block.end)


def test_a_short_document_is_one_passage() -> None:
    (only,) = passages_of("# Title\n\nIntro here.\n\n## Part\n\nSome text.\n\n## Other\n\nMore text.\n")
    assert only.heading_path == ("Title",)


def test_a_document_of_the_longest_size_is_one_passage_and_one_slightly_longer_two_of_equal_size() -> None:
    assert len(passages_of(" ".join([words(8)] * 3))) == 1
    assert [len(passage.text.split()) for passage in passages_of(" ".join([words(7)] * 4))] == [14, 14]


def test_sections_keep_their_headings_and_never_share_a_passage_across_the_top_level() -> None:
    text = f"# One\n\n{words(4)}\n\n# Two\n\n{words(4)}\n\n## Inner\n\n{words(15)}\n"
    assert [(passage.heading_path, passage.text.split()[1]) for passage in passages_of(text)] == [
        (("One",), "One"),
        (("Two",), "Two"),
        (("Two", "Inner"), "Inner"),
    ]


def test_tiny_neighbours_under_one_parent_share_a_passage() -> None:
    text = f"# Top\n\n{words(18)}\n\n## A\n\nOne two.\n\n## B\n\nThree four.\n\n## C\n\n{words(19)}\n"
    found = passages_of(text)
    assert [passage.heading_path for passage in found] == [("Top",), ("Top",), ("Top", "C")]
    assert found[1].text.startswith("## A")
    assert found[1].text.endswith("Three four.")


def test_a_heading_is_never_left_behind() -> None:
    text = f"# Top\n\n## First\n\n{words(22)}\n\n{words(22)}\n\n## Next\n\n{words(20)}\n"
    found = passages_of(text)
    assert found[0].text.startswith(f"# Top\n\n## First\n\n{words(22)[:20]}")
    assert found[-1].text.startswith("## Next\n\nWord")


def test_a_long_paragraph_is_cut_at_sentence_ends() -> None:
    found = passages_of(" ".join(words(7, f"S{n}") for n in range(9)))
    assert all(passage.text.endswith("end.") and passage.text.startswith("S") for passage in found)


def test_a_sentence_longer_than_allowed_is_cut_between_words() -> None:
    text = " ".join(f"w{n}" for n in range(100))
    found = passages_of(text)
    assert " ".join(passage.text for passage in found) == text


def test_code_that_fits_stays_whole_and_longer_code_is_cut_at_lines() -> None:
    fence = "```\na b c d\n\ne f g h\n```"
    assert sum(fence in passage.text for passage in passages_of(f"{words(20)}\n\n{fence}\n\n{words(20)}")) == 1
    long = "```\n" + "a b c d e\n" * 12 + "```"
    lines = [line for passage in passages_of(long) for line in passage.text.split("\n")]
    assert lines == long.split("\n")


def test_a_long_empty_line_of_code_is_looked_at_once() -> None:
    watch = Stopwatch()
    found = passages_of("```\n" + "a b c d e\n" * 12 + " " * 20_000 + "\nf g\n```\n")
    assert found[-1].text.endswith("f g\n```")
    assert watch.seconds < 0.5


def test_later_parts_of_a_long_table_carry_its_head_row() -> None:
    table = "# Prices\n\n| name | price |\n|---|---|\n" + "".join(f"| item{n} | {n} |\n" for n in range(20))
    first, *later = passages_of(table)
    assert first.heading_path == ("Prices",)
    assert later
    assert all(passage.heading_path == ("Prices", "name | price") for passage in later)
    assert all(passage.text.startswith("| item") for passage in later)


def test_a_list_is_cut_between_items_and_stays_with_its_lead_in() -> None:
    items = "".join(f"- {words(6, f'Item{n}')}\n" for n in range(6))
    found = passages_of(f"{words(12)}\n\nDo this:\n\n{items}")
    assert [passage.text.split()[0] for passage in found if passage.text.startswith("- ")] in (
        [],
        ["-"] * (len(found) - 1),
    )
    assert not any(passage.text.endswith("this:") for passage in found)


def test_passages_name_the_page_on_which_they_begin() -> None:
    first, second = words(20), words(20)
    text = f"{first}\n\n{second}"
    at = len(first) + 2
    parsed = ParsedDocument(
        text,
        "T",
        (Block(0, len(first), "paragraph"), Block(at, len(text), "paragraph")),
        (Page(1, 0, len(first)), Page(2, at, len(text))),
    )
    assert [(passage.page, passage.document_title) for passage in passages_of(parsed)] == [(1, "T"), (2, "T")]


def test_long_headings_take_from_the_passage_so_that_nothing_is_cut_off_when_embedded() -> None:
    text = f"# {words(26)}\n\n" + " ".join([words(10)] * 20)
    assert all(len(passage.embedded_text.split()) <= 60 + 14 for passage in passages_of(text, 50, 60)[1:])


def test_marks_that_a_tokenizer_adds_count_once_for_a_passage() -> None:
    parsed = plain.read(" ".join([words(4)] * 5).encode(), ParseLimits())
    found = split(
        parsed,
        document_id="d",
        document_version="v",
        document_name="d",
        count_tokens=lambda texts: [len(text.split()) + 2 for text in texts],
        target_tokens=20,
        max_tokens=22,
    )
    assert len(found) == 1


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="target_tokens"):
        passages_of("text", 30, 20)


@pytest.mark.parametrize("unit", ["a\n\n", "- a\n", "a. B ", "x", "x y ", "# a\n\n", "| a |\n", "a\n"])
def test_time_grows_with_the_length_only(unit: str) -> None:
    parsed = plain.read((unit * (100_000 // len(unit))).encode(), ParseLimits())
    watch = Stopwatch()
    passages_of(parsed, 200, 240)
    assert watch.seconds < 3


@pytest.mark.parametrize("letters", ["0123456789abcdef" * 3_000, "สวัสดี" * 5_000, "Z" * 40_000])
def test_what_no_space_divides_is_cut_though_the_embedder_takes_it_for_one_token(letters: str) -> None:
    found = passages_of(f"A key follows.\n\n{letters}\n\nThat was the key.\n", target=200, most=240)
    assert max(len(passage.text) for passage in found) <= 240 * 4 + 100
    assert "".join(passage.text for passage in found[1:-1]) in letters


def test_an_address_is_not_unbroken() -> None:
    address = "https://example.com/" + "a-long/path-of?words=" * 12
    assert len(passages_of(f"See {address} for {words(18)}\n")) == 1
