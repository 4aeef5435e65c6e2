"""The markers an engine writes: which count, what remains of a sentence without them, and where they end up."""

import pytest

from retrieval.markers import claim_text, place, read_markers, split_lead_in
from tests.stopwatch import Stopwatch


def numbers(text: str) -> list[tuple[int, ...]]:
    return [marker.numbers for marker in read_markers(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is so [1].", [(1,)]),
        ("It is so [1,2] [3].", [(1, 2), (3,)]),
        ("It is so [ 1 ].", [(1,)]),
        ("It is so[1][2].", [(1,), (2,)]),
        ("It is so【1】.", [(1,)]),
        ("It is so【3†handbook.md】.", [(3,)]),
        ("It is so [^1].", [(1,)]),
        ("It is so [1; 4].", [(1, 4)]),
        ("It is so [2-4].", [(2, 3, 4)]),
        ("It is so [1](https://made.up/).", [(1,)]),
        ("In [2024] it was [0] and [x].", []),
        ("Take `rows[1]` and ``a`[2]`` and [3].", [(3,)]),
        ("```python\nrows[1]\n```", []),
    ],
)
def test_every_way_of_writing_a_marker_is_read_and_code_is_not(text: str, expected: list[tuple[int, ...]]) -> None:
    assert numbers(text) == expected


def test_a_marker_covers_its_invented_link() -> None:
    (marker,) = read_markers("So [1](https://made.up/) it is.")
    assert "So [1](https://made.up/) it is."[marker.start : marker.end] == "[1](https://made.up/)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 30 days [1].", "30 days"),
        ("2. 30 days", "30 days"),
        ("According to the passage, it is 30 days.", "it is 30 days."),
        ("According to passage 2 and [3], it is 30 days.", "it is 30 days."),
        ("Based on the provided context, 30 days.", "30 days."),
        ("In 1999, it began.", "In 1999, it began."),
        ("In 12, it began.", "In 12, it began."),
        ("In section 3, it began.", "In section 3, it began."),
    ],
)
def test_a_claim_is_the_sentence_without_bullet_markers_and_lead_in(text: str, expected: str) -> None:
    assert " ".join(claim_text(text, read_markers(text)).split()).rstrip(" .") == expected.rstrip(" .")


def test_a_lead_in_with_numbers_becomes_their_citation() -> None:
    assert split_lead_in("According to passage 2, the log is SQLite.") == ("The log is SQLite.", (2,))
    assert split_lead_in("- According to [3], it is.") == ("- It is.", (3,))


def test_a_row_of_numbers_after_a_lead_in_is_read_once() -> None:
    watch = Stopwatch()
    for count in (20, 5_000):
        text = "From the text " + "1 " * count + "logs are kept."
        assert split_lead_in(text) == (text, ())
        assert claim_text(text, []) == text
        assert watch.seconds < 0.25


def test_final_punctuation_is_looked_for_at_the_end_only() -> None:
    text = "So it is" + "…" * 20_000 + " it is."
    watch = Stopwatch()
    assert place(text, [], {}, [1]) == [text[:-1] + " ", 1, "."]
    assert watch.seconds < 0.5


def test_a_lead_in_without_a_number_stays() -> None:
    for text in ("According to the context, it is.", "In 12, it began.", "From 3 to 5, nothing."):
        assert split_lead_in(text) == (text, ())


def rendered(text: str, *, keep: bool = False, added: tuple[int, ...] = ()) -> str:
    markers = read_markers(text)
    shown = {index: marker.numbers for index, marker in enumerate(markers)} if keep else {}
    return "".join(part if isinstance(part, str) else f"[{part}]" for part in place(text, markers, shown, added))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Kept for 30 days.", "Kept for 30 days [9]."),
        ("Kept for 30 days", "Kept for 30 days [9]"),
        ("Kept for 30 days?!", "Kept for 30 days [9]?!"),
        ('He said "30 days."', 'He said "30 days [9]."'),
        ("**30 days.**", "**30 days [9].**"),
        ("**30 days**", "**30 days [9]**"),
        ("| Predictions | 30 days |", "| Predictions | 30 days [9] |"),
        ("Run `make`.", "Run `make` [9]."),
        ("保存期間は30日です。", "保存期間は30日です [9]。"),
    ],
)
def test_an_added_marker_stands_before_the_final_punctuation(text: str, expected: str) -> None:
    assert rendered(text, added=(9,)) == expected


def test_markers_that_are_not_shown_leave_no_gap() -> None:
    assert rendered("A [1], b [2] and c [3]. [4]") == "A, b and c."


def test_markers_inside_a_sentence_stay_and_those_at_its_end_move_before_the_stop() -> None:
    assert rendered("A is 5 [1] and b is 7. [2]", keep=True) == "A is 5 [1] and b is 7 [2]."


def test_the_same_number_is_not_written_twice_at_the_end() -> None:
    assert rendered("It is 5 [1][1]. [1]", keep=True, added=(1,)) == "It is 5 [1]."
