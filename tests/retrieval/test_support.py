"""Whether a passage says what a sentence says: numbers, words, negation, and the place they stand at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.documents import Hit, Passage
from retrieval.numerals import normal_number
from retrieval.support import Evidence, Support
from retrieval.terms import stem, terms
from tests.stopwatch import Stopwatch

SCALES = ("hundred", "thousand", "million", "trillion", "k")

RETENTION = (
    "Predictions are kept for 30 days. After that their content is erased and the metadata stays for one year. "
    "The period is set by `HALLMARK_RETENTION_DAYS`. Adapters are not deleted by a rollback."
)
LOG = "The log is a queue in front of one writer thread. At 64 producers it takes 10,000 rows a second."


def hit(text: str, n: int = 1, *, dense: float | None = None, title: str = "") -> Hit:
    return Hit(Passage("doc", "v", n, text, 0, len(text), document_title=title), 1.0, dense_score=dense)


def best(claim: str, *texts: str, question: str = "") -> Support:
    return Evidence(question, [hit(text, n) for n, text in enumerate(texts, 1)]).support(terms(claim))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000 rows", "1000 rows"),
        ("7 days", "seven days"),
        ("twenty-five rows", "25 rows"),
        ("3 million rows", "3,000,000 rows"),
        ("200ms", "200 milliseconds"),
        ("**30** days", "30 days"),
        ("30 ** days", "30 days"),
        ("twenty - five ms", "25 milliseconds"),
        ("30 %", "30 percent"),
        ("the 10th", "10"),
        ("v1.2.3", "1.2.3"),
        ("it deletes", "deleted"),
        ("deletion", "delete"),
        ("policies", "policy"),
        ("configuration", "configured"),
        ("normalise", "normalized"),
        ("Denmark's", "Denmark"),
        ("die \u00d6ffnungszeit", "die O\u0308ffnungszeit"),
        ("\ubcf4\uc99d \uae30\uac04", "\u1107\u1169\u110c\u1173\u11bc \u1100\u1175\u1100\u1161\u11ab"),
        ("the o\ufb03ce of the \ufb01rst \ufb02oor", "the office of the first floor"),
        ("a fi\u00adnal of\u200bfer", "a final offer"),
        ("\uff12\uff14 months", "24 months"),
        ("$1,000.00", "$1,000"),
        ("2024-03-05", "5 March 2024"),
        ("05.03.2024", "5.3.2024"),
        ("log-2024-03-05", "log, 5 March 2024"),
        ("1 000 000 users", "1,000,000 users"),
        ("10 000 users", "10,000 users"),
        ("1\u202f500 users", "1500 users"),
        ("1'000'000 users", "1000000 users"),
        ("1.234,56 Euro", "1234.56 Euro"),
        ("12,34,567 users", "1,234,567 users"),
        ("5 million users", "5M users"),
        ("5 mn users", "5 million users"),
        ("3 bn users", "3 billion users"),
    ],
)
def test_the_same_fact_has_the_same_terms(one: str, other: str) -> None:
    assert terms(one).vocabulary == terms(other).vocabulary


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3.10", "3.1"),
        ("30", "300"),
        ("5 °C", "-5 °C"),
        ("30 %", "30 days"),
        ("MAX_SIZE", "MAX_AGE"),
        ("1.5", "15"),
        ("10³", "103"),
        ("5 m", "5 M"),
        ("version 1.2.2024.1", "version 1.2.2024"),
        ("2024-13-05", "5 March 2024"),
        ("12 300 rows", "12,300 rows"),
    ],
)
def test_different_values_have_different_terms(one: str, other: str) -> None:
    assert terms(one).vocabulary != terms(other).vocabulary


def test_numbers_are_written_one_way() -> None:
    assert [normal_number(each) for each in ("1,234,567.5", "−3", "2,5", "v2.0")] == ["1234567.5", "-3", "2.5", "2.0"]


@pytest.mark.parametrize(
    ("passage", "claim"),
    [
        ("The licence is 1.000 Euro.", "1000 Euro"),
        ("The licence is 1.000 Euro.", "1.000 Euro"),
        ("It stores 2.0 TB.", "2 TB"),
        ("At 05:30 it starts.", "At 5:30"),
        ("At 5:30 it starts.", "At 05:30"),
    ],
)
def test_a_number_that_can_be_read_in_two_ways_supports_both(passage: str, claim: str) -> None:
    assert best(claim, passage).missing == frozenset()


@given(st.text())
def test_any_text_has_terms_and_stems_are_stable_in_case(text: str) -> None:
    read = terms(text)
    assert set(read.words) <= read.vocabulary
    assert read.hard <= read.vocabulary
    assert read.negated | read.affirmed == set(read.words)


@given(st.lists(st.sampled_from(["1", "2,3", "12,34,567", "1.5", ",", ".", "v", "-", "−", "twenty", "one", *SCALES])))
def test_any_number_has_terms(pieces: list[str]) -> None:
    for joint in ("", " "):
        assert terms(joint.join(pieces)).hard is not None


def test_amounts_that_cannot_be_multiplied_stand_as_they_are_written() -> None:
    assert "1,2,3" in terms("1,2,3 million users").numbers
    assert "1.5,3" in terms("1.5,3 million").numbers
    assert terms("9" * 2_000_000 + " million").numbers == {"9" * 2_000_000}
    assert terms("1.5 million").numbers == {"1500000"}


@pytest.mark.parametrize("unit", ["1 ", "1 x ", "1 thousand ", "1 " + "thousand " * 50, "a-", "a-a@", "for a", "n't "])
def test_terms_take_time_by_the_length_of_the_text_only(unit: str) -> None:
    watch = Stopwatch()
    terms("1 " + unit * (100_000 // len(unit)))
    assert watch.seconds < 1


@given(st.from_regex(r"[a-z]{1,12}", fullmatch=True))
def test_a_stem_is_never_empty(word: str) -> None:
    assert stem(word)


def test_a_negation_reaches_the_next_words_of_its_clause_only() -> None:
    read = terms("Adapters are not deleted, and releases stay.")
    assert read.negated == {stem("deleted")}
    assert terms("It is kept no longer than 30 days.").negations == 0


def test_a_negation_cut_off_its_verb_is_read_as_one() -> None:
    assert terms("Adapters do n't expire.").negated == {"expir"}


def test_a_sentence_of_the_passage_is_fully_supported_where_it_stands() -> None:
    found = best("Predictions are kept for 30 days.", LOG, RETENTION)
    assert (found.hit, found.share, found.missing, found.contradicted) == (1, 1.0, frozenset(), False)
    assert RETENTION[found.start : found.end] == "Predictions are kept for 30 days."


def test_a_number_that_stands_nowhere_is_missing() -> None:
    assert best("Predictions are kept for 90 days.", RETENTION).missing == {"90"}


def test_an_identifier_that_stands_nowhere_is_missing() -> None:
    assert best("Set `HALLMARK_RETENTION_HOURS`.", RETENTION).missing == {"hallmark_retention_hours"}


@pytest.mark.parametrize(
    "claim",
    ["Predictions are not kept for 30 days.", "Adapters are deleted by a rollback.", "Predictions are never kept."],
)
def test_denying_what_the_passage_states_or_the_reverse_is_a_contradiction(claim: str) -> None:
    assert best(claim, RETENTION).contradicted


def test_agreeing_with_a_denial_is_none() -> None:
    assert not best("A rollback does not delete adapters.", RETENTION).contradicted


def test_two_neighbouring_sentences_are_quoted_when_the_claim_needs_both() -> None:
    found = best("Predictions are kept for 30 days and their metadata stays for one year.", RETENTION)
    assert RETENTION[found.start : found.end].startswith("Predictions are kept")
    assert RETENTION[found.start : found.end].endswith("one year.")


def test_words_of_the_question_do_not_support_a_wrong_value() -> None:
    question = "How long are predictions kept after the content is erased?"
    wrong = best("Predictions are kept for weeks after the content is erased.", RETENTION, question=question)
    right = best("Predictions are kept for 30 days after the content is erased.", RETENTION, question=question)
    assert wrong.share < 0.6 < right.share


def test_a_title_supports_what_the_text_leaves_out() -> None:
    with_title = Evidence("", [hit("It is kept for 30 days.", title="Audit log")]).support(terms("Audit log: 30 days"))[
        0
    ]
    assert with_title.share == 1.0


def test_two_passages_support_together_what_neither_does_alone() -> None:
    claim = terms("Predictions are kept for 30 days and the log takes 10,000 rows a second.")
    evidence = Evidence("", [hit(RETENTION), hit(LOG, 2)])
    found = evidence.support(claim)
    assert all(each.missing for each in found)
    share, pair = evidence.joint(claim, found)
    assert share > 0.8
    assert {each.hit for each in pair} == {0, 1}


def test_two_passages_do_not_support_a_number_that_neither_has() -> None:
    claim = terms("Predictions are kept for 30 days and the log takes 99,000 rows a second.")
    evidence = Evidence("", [hit(RETENTION), hit(LOG, 2)])
    assert evidence.joint(claim, evidence.support(claim))[0] == 0.0


def test_a_place_that_lacks_the_subject_of_the_question_fits_it_less() -> None:
    evidence = Evidence("What is the retention period for audit logs?", [hit(RETENTION, title="Retention")])
    about = Evidence("What is the retention period for predictions?", [hit(RETENTION, title="Retention")])
    assert evidence.focus(0, 0, 33).words < 0.2 < about.focus(0, 0, 33).words


def test_a_cosine_counts_where_it_is_known() -> None:
    far = Evidence("How long are predictions kept?", [hit(RETENTION, dense=0.1)]).focus(0, 0, 33).whole
    near = Evidence("How long are predictions kept?", [hit(RETENTION, dense=0.8)]).focus(0, 0, 33).whole
    assert far is not None
    assert near is not None
    assert far < near
    assert Evidence("How long are predictions kept?", [hit(RETENTION)]).focus(0, 0, 33).whole is None


def test_the_likeliest_sentence_comes_first_and_headings_last() -> None:
    text = "# Keeping predictions\n\nPredictions are kept for 30 days.\n\nThe log is a file."
    candidates = Evidence("How long are predictions kept?", [hit(text)]).candidates()
    assert text[candidates[0].start : candidates[0].end] == "Predictions are kept for 30 days."


@given(st.text(max_size=200), st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=3), st.text(max_size=80))
def test_support_is_a_share_and_its_place_lies_in_the_passage(claim: str, texts: list[str], question: str) -> None:
    evidence = Evidence(question, [hit(text, n) for n, text in enumerate(texts, 1)])
    for found in evidence.support(terms(claim)):
        assert -1e-9 <= found.share <= 1 + 1e-9
        assert 0 <= found.start <= found.end <= len(texts[found.hit])


def test_the_order_of_the_passages_does_not_change_what_they_support() -> None:
    claim = terms("Predictions are kept for 30 days.")
    forth = Evidence("How long?", [hit(RETENTION), hit(LOG, 2)]).support(claim)
    back = Evidence("How long?", [hit(LOG, 2), hit(RETENTION)]).support(claim)
    assert [each.share for each in forth] == [each.share for each in back]
