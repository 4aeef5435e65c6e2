"""Sentence ends: the hard cases one by one, and the promises that hold for every text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.sentences import sentence_ends, sentences
from tests.stopwatch import Stopwatch


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    "expected",
    [
        ["The tower is 330 m tall.", "It was finished in 1889."],
        ["Use e.g. a queue, i.e. a bounded one.", "Then wait."],
        ["Dr. Smith and Mrs. Jones met Prof. Lee.", "They talked."],
        ["See Fig. 3 and No. 7, p. 12.", "The answer is no.", "It stays no."],
        ["He lives in the U.S. Army barracks.", "He came from the U.S.", "The flight was long."],
        ["J. R. R. Tolkien wrote it.", "Critics agreed."],
        ["It costs 3.5 euros in v1.2.3 of the list.", "Python 3.11 is needed."],
        ["Acme Inc. sells boxes, bags, etc. at the door.", "Prices vary."],
        ["Open https://example.com/a.b?c=d.", "Call os.path.join there.", "Use Node.js.", "Done."],
        ["Wait... what is this?", "Well…", "Fine."],
        ['He said "Go."', "She went.", "(They stayed.)", "End."],
        ['"Really?" she asked.', '"Yes!" he said.'],
        ["**Note.** Restart it.", "`max_tokens` is kept.", "*Why?*", "Because."],
        ["**Passage.** A piece of a document.", "It is short."],
        ["The limit is 30.[1]", "It resets daily. [2]", "See below [3].", "Also here.【4】", "End."],
        ["the flow is laminar .", "an experimental study was made , as before ."],
        ["It began at 5 p.m. on Jan. 5 and ended at 7 a.m.", "The rest slept."],
        ["Smith et al. showed it vs. a baseline, cf. Eq. (3).", "Good."],
        ["Is it?!", "Yes!!", "No."],
        ["Mgmt. of pkgs. is hard.", "It is."],
    ],
)
def test_sentences_are_found_in_running_text(expected: list[str]) -> None:
    assert split(" ".join(expected)) == expected


def test_a_heading_in_bold_on_a_line_of_its_own_is_a_sentence() -> None:
    assert split("**It starts here.**\nThen it goes on.") == ["**It starts here.**", "Then it goes on."]


@pytest.mark.parametrize("expected", [["今天天气很好。", "我们去公园吧！", "好吗？"], ["「はい。」", "彼は言った。"]])
def test_wide_full_stops_need_no_space(expected: list[str]) -> None:
    assert split("".join(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Steps:\n- Install it. Then run\n- Stop it", ["Steps:", "- Install it.", "Then run", "- Stop it"]),
        ("1. First thing\n2. Second thing", ["1. First thing", "2. Second thing"]),
        ("# Title\nText follows here", ["# Title", "Text follows here"]),
        ("A paragraph without stop\n\nAnother one", ["A paragraph without stop", "Another one"]),
        ("A paragraph without stop\r\n\r\nAnother one", ["A paragraph without stop", "Another one"]),
        ("Hard break  \nnext line", ["Hard break", "next line"]),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ["| a | b |", "|---|---|", "| 1 | 2 |"]),
        ("Name: Ann\nAge: 3", ["Name: Ann", "Age: 3"]),
        (
            "Every sentence is checked before it is sent. Set\n`check` to skip it",
            ["Every sentence is checked before it is sent.", "Set\n`check` to skip it"],
        ),
        (
            "A revoked key is refused at once, with status\n401. It stays revoked",
            ["A revoked key is refused at once, with status\n401.", "It stays revoked"],
        ),
    ],
)
def test_lines_that_mean_something_end_sentences(text: str, expected: list[str]) -> None:
    assert split(text) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n  "])
def test_a_wrapped_line_does_not_end_a_sentence(newline: str) -> None:
    text = f"The gateway keeps a bounded queue of requests for each{newline}Qdrant collection and refuses more."
    assert split(text) == [text]


def test_a_fenced_block_is_one_sentence() -> None:
    fence = "```python\nprint('One. Two.')\n\nprint(3)\n```"
    assert split(f"Run this:\n{fence}\nIt prints. Good.") == ["Run this:", fence, "It prints.", "Good."]


def test_a_fence_is_certain_once_its_closing_line_is() -> None:
    text = "```\na. B\n```"
    assert sentence_ends(text, final=False) == []
    assert sentence_ends(text + "\n", final=False) == [len(text)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It is so.", 0),
        ("It is so. ", 0),
        ("It is so. [", 0),
        ("It is so. Nex", 0),
        ("It is so. Next ", 1),
        ("It is so.\n\n", 1),
    ],
)
def test_a_full_stop_is_certain_once_the_next_word_is_complete(text: str, count: int) -> None:
    assert len(sentence_ends(text, final=False)) == count


pieces = st.lists(
    st.sampled_from(
        [
            "Word",
            "word",
            "e.g",
            "U.S",
            "No",
            "5",
            "3.5",
            ".",
            "...",
            "?",
            "!",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\r",
            "- ",
            "1.",
            "# ",
            "| ",
            "```",
            "~~~",
            "`",
            "[1]",
            "[1, 2]",
            "[",
            "]",
            '"',
            ")",
            "(",
            "。",
            "」",
            "的",
            "\f",
            "**",
            "A long enough line that wraps around ",
        ]
    ),
    max_size=40,
).map("".join)


@given(pieces)
def test_every_visible_character_is_in_exactly_one_sentence(text: str) -> None:
    spans = sentences(text)
    inside = [index for start, end in spans for index in range(start, end) if not text[index].isspace()]
    assert inside == [index for index, letter in enumerate(text) if not letter.isspace()]
    assert all(text[start:end] == text[start:end].strip() != "" for start, end in spans)


@given(pieces, st.integers(0, 200))
def test_what_is_certain_of_a_prefix_holds_for_the_whole(text: str, cut: int) -> None:
    early = sentence_ends(text[:cut], final=False)
    assert early == sentence_ends(text, final=True)[: len(early)]


@given(pieces, st.booleans())
def test_cutting_off_a_sentence_changes_nothing_for_the_rest(text: str, final: bool) -> None:
    ends = sentence_ends(text, final)
    if ends:
        assert ends == [ends[0]] + [ends[0] + end for end in sentence_ends(text[ends[0] :], final)]


@pytest.mark.parametrize(
    "unit",
    ["a\n", "a. b ", "e.g. ", ". [1, ", "\n", "```\n", "lower case words that wrap \n", "((((. ", "w" * 9, "[1] "],
)
def test_time_grows_with_the_length_only(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    watch = Stopwatch()
    sentences(text)
    assert watch.seconds < 2
