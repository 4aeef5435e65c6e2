"""What leaves the checker: supported sentences with the passage's own words behind them, and nothing else."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.citations import AnswerChecker, CheckPolicy, Citation
from retrieval.documents import Hit, Passage
from retrieval.errors import IndexUnavailable
from retrieval.links import LinkFilter
from tests.properties import examples

SOURCE = """# Retention

Predictions are kept for 30 days. After that their content is erased, and the metadata stays for one year. The period \
is set by `HALLMARK_RETENTION_DAYS`.

# The log

The log is a queue in front of one writer thread with group commit into SQLite. With PostgreSQL configured, the local \
SQLite file is the outbox.

# Releases

A release is immutable. Rolling back moves a pointer in one transaction; requests in flight finish on the release they \
started with. Adapters are not deleted by a rollback."""
KEPT = "How long are predictions kept?"


def hits(*, dense: tuple[float | None, ...] = (0.6, 0.5, 0.4)) -> list[Hit]:
    """Return the three sections of SOURCE as found passages."""
    found = []
    starts = [SOURCE.index("Predictions are"), SOURCE.index("The log is"), SOURCE.index("A release is")]
    heads = ("Retention", "The log", "Releases")
    for n, (start, head, cosine) in enumerate(zip(starts, heads, dense, strict=True), 1):
        end = SOURCE.find("\n\n", start) if n < 3 else len(SOURCE)
        passage = Passage("handbook", "v1", n, SOURCE[start:end], start, end, heading_path=(head,))
        found.append(Hit(passage, 1.0 / n, dense_score=cosine))
    return found


async def checked(
    question: str, answer: str, *, found: Sequence[Hit] | None = None, cuts: Sequence[int] = (), **options: Any
) -> tuple[str, AnswerChecker]:
    """Feed `answer`, cut at `cuts`; return what came out and the checker."""
    checker = AnswerChecker(question, hits() if found is None else found, **options)
    bounds = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    out = [await checker.feed(answer[start:end]) for start, end in pairwise(bounds)]
    out.append(await checker.finish())
    return "".join(out), checker


def texts(out: str, citations: Sequence[Citation]) -> list[tuple[int, str, str]]:
    return [(each.n, out[each.marker_start : each.marker_end], each.quote) for each in citations]


async def test_a_supported_sentence_gets_the_citation_the_engine_left_out() -> None:
    out, checker = await checked(KEPT, "Predictions are kept for 30 days.")
    assert out == "Predictions are kept for 30 days [1]."
    (citation,) = checker.citations
    assert out[citation.answer_start : citation.answer_end] == out
    assert out[citation.marker_start : citation.marker_end] == "[1]"
    assert citation.quote == SOURCE[citation.source_start : citation.source_end] == "Predictions are kept for 30 days."
    assert (citation.status, citation.score, citation.passage.n) == ("supported", 1.0, 1)
    assert checker.verdict.label == "answered"


async def test_the_engines_citation_stays_only_where_its_passage_supports_the_sentence() -> None:
    out, checker = await checked(KEPT, "Predictions are kept for 30 days [2]. After that, the content is erased [1].")
    assert out == "Predictions are kept for 30 days [1]. After that, the content is erased [1]."
    assert {citation.passage.n for citation in checker.citations} == {1}


async def test_of_two_passages_that_support_a_sentence_the_engines_choice_is_cited() -> None:
    other = Hit(Passage("faq", "v1", 1, "Yes: predictions are kept for 30 days.", 0, 38), 0.2, dense_score=0.5)
    out, checker = await checked(KEPT, "Predictions are kept for 30 days [4].", found=[*hits(), other])
    assert out == "Predictions are kept for 30 days [1]."
    assert checker.citations[0].passage == other.passage


async def test_numbers_follow_the_order_of_first_citation_and_name_one_passage_each() -> None:
    answer = (
        "Rolling back moves a pointer in one transaction [3]. The log is a queue in front of one writer thread [2]."
    )
    out, checker = await checked("What does rolling back do, and what is the log?", answer)
    assert out == answer.replace("[3]", "[1]")
    assert [(citation.n, citation.passage.n) for citation in checker.citations] == [(1, 3), (2, 2)]


async def test_an_invented_number_is_dropped_and_reported() -> None:
    out, checker = await checked(KEPT, "Predictions are kept for 30 days [1][7].")
    assert out == "Predictions are kept for 30 days [1]."
    assert checker.verdict.invented_numbers == (7,)


async def test_an_unsupported_sentence_is_withheld() -> None:
    out, checker = await checked(
        KEPT, "Predictions are kept for 30 days. They are stored on Mars.\n\nNobody reads them."
    )
    assert out == "Predictions are kept for 30 days [1]."
    assert checker.verdict.dropped_sentences == 2


async def test_a_paragraph_break_survives_a_withheld_sentence() -> None:
    answer = "Predictions are kept for 30 days. They live on Mars.\n\nAfter that their content is erased."
    expected = "Predictions are kept for 30 days [1].\n\nAfter that their content is erased [1]."
    assert (await checked(KEPT, answer))[0] == expected
    answer = "Predictions are kept for 30 days.\n\nThey live on Mars. After that their content is erased."
    assert (await checked(KEPT, answer))[0] == expected


async def test_an_unsupported_sentence_is_marked_where_the_policy_says_so() -> None:
    answer = "They are stored on Mars [2]. Predictions are kept for 30 days."
    out, checker = await checked(KEPT, answer, policy=CheckPolicy(unsupported="mark"))
    assert out == "They are stored on Mars [1]. Predictions are kept for 30 days [2]."
    assert [citation.status for citation in checker.citations] == ["unsupported", "supported"]
    assert [out[start:end] for start, end in checker.verdict.unsupported] == ["They are stored on Mars [1]."]


@pytest.mark.parametrize(
    "answer",
    [
        "Predictions are kept for 90 days.",
        "Predictions are not kept for 30 days.",
        "Predictions are kept on Mars for ever.",
        "How long are predictions kept?",
        "Sure! Here is the answer:",
        "",
    ],
)
async def test_an_answer_without_a_supported_sentence_is_replaced_by_the_passages_own(answer: str) -> None:
    out, checker = await checked(KEPT, answer)
    assert out == "Predictions are kept for 30 days [1]."
    assert checker.verdict.status == "replaced"
    assert checker.citations[0].quote == "Predictions are kept for 30 days."


async def test_the_fallback_can_be_an_abstention() -> None:
    out, checker = await checked(KEPT, "On Mars.", fallback="abstain", abstention="Not in the sources.")
    assert (out, checker.verdict.label, checker.citations) == (
        "Not in the sources.",
        "abstained:unsupported_answer",
        [],
    )


async def test_the_fallback_can_be_to_keep_the_answer_and_say_so() -> None:
    out, checker = await checked(KEPT, "Sure! They are on Mars.", fallback="keep")
    assert out == "Sure! They are on Mars."
    assert checker.verdict.label == "answered:unsupported_answer"
    assert [out[start:end] for start, end in checker.verdict.unsupported] == ["They are on Mars."]


@pytest.mark.parametrize("answer", ["30 days", "**30 days**", "one year for the metadata"])
async def test_a_short_answer_is_checked_at_the_place_that_answers_the_question(answer: str) -> None:
    out, checker = await checked(KEPT, answer)
    assert checker.verdict.label == "answered", out
    assert checker.citations[0].passage.n == 1


@pytest.mark.parametrize("answer", ["30 days.", "The retention period for audit logs is 30 days.", "On Mars.", ""])
async def test_a_question_about_something_else_gets_no_answer_from_a_near_miss(answer: str) -> None:
    out, checker = await checked("What is the retention period for audit logs?", answer, abstention="No.")
    assert (out, checker.verdict.status) == ("No.", "abstained")


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "The sources do not say how long predictions are kept.",
        "The retention period is not mentioned in the provided passages.",
        "There is no information about that.",
        "Unknown.",
    ],
)
async def test_the_engines_own_abstention_is_recognised(answer: str) -> None:
    out, checker = await checked("How long is a year on Mars?", answer)
    assert (out, checker.verdict.label, checker.citations) == (answer, "abstained:engine_abstained", [])


async def test_an_abstention_beside_an_answer_is_passed_on_without_a_citation() -> None:
    answer = "Predictions are kept for 30 days. The sources do not mention feedback."
    out, checker = await checked(KEPT, answer)
    assert out == "Predictions are kept for 30 days [1]. The sources do not mention feedback."
    assert checker.verdict.label == "answered"


async def test_a_denial_that_a_passage_supports_is_not_an_abstention() -> None:
    out, checker = await checked("What is not deleted by a rollback?", "Adapters are not deleted by a rollback.")
    assert (out, checker.verdict.label) == ("Adapters are not deleted by a rollback [1].", "answered")


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Are adapters deleted by a rollback?", "No.", "No [1]."),
        ("Are adapters deleted by a rollback?", "Yes.", "Adapters are not deleted by a rollback [1]."),
        ("Is a release immutable?", "Yes", "Yes [1]"),
        ("Is a release immutable?", "No.", "A release is immutable [1]."),
        ("Is a release immutable?", "Yes, a release is immutable.", "Yes, a release is immutable [1]."),
        ("Is a release immutable?", "No, a release is immutable.", "A release is immutable [1]."),
        ("Are predictions kept for 60 days?", "No, they are kept for 30 days.", "No, they are kept for 30 days [1]."),
        ("Are predictions kept for 60 days?", "Yes, they are kept for 30 days.", "They are kept for 30 days [1]."),
    ],
)
async def test_yes_and_no_stay_only_where_a_passage_bears_them_out(question: str, answer: str, expected: str) -> None:
    out, _ = await checked(question, answer)
    assert out == expected


async def test_a_pleasantry_goes_with_an_answer_and_not_alone() -> None:
    out, checker = await checked(KEPT, "Sure! Predictions are kept for 30 days. Anything else I can help with?")
    assert out == "Sure! Predictions are kept for 30 days [1]."
    assert checker.verdict.dropped_sentences == 0


async def test_a_list_is_checked_item_by_item() -> None:
    answer = "- Predictions: 30 days\n- Feedback: 5 years\n- Metadata: one year [1]"
    out, _ = await checked(KEPT, answer)
    assert out == "- Predictions: 30 days [1]\n- Metadata: one year [1]"


async def test_code_is_checked_as_a_whole_and_never_written_into() -> None:
    answer = "```sh\nHALLMARK_RETENTION_DAYS=30 make run[1]\n```\n"
    out, checker = await checked("How is the period of predictions set?", answer.replace(" make run[1]", ""))
    assert out == "```sh\nHALLMARK_RETENTION_DAYS=30\n```"
    (citation,) = checker.citations
    assert citation.marker_start == citation.marker_end == len(out)
    out, checker = await checked("How is the period of predictions set?", "```sh\nrm -rf /var/lib/mars\n```")
    assert "rm -rf" not in out


async def test_a_sentence_that_two_passages_support_together_cites_both_as_weak() -> None:
    answer = "Rolling back moves a pointer in one transaction, and the log is written into SQLite by one writer thread."
    out, checker = await checked("What does rolling back do, and where is the log?", answer)
    assert out == answer[:-1] + " [1][2]."
    assert {(citation.passage.n, citation.status) for citation in checker.citations} == {(2, "weak"), (3, "weak")}


async def test_a_marker_can_be_written_as_a_link() -> None:
    out, checker = await checked(
        KEPT, "It is 30 days [1].", marker=lambda n, passage: f"[[{n}]](https://gw/{passage.id})"
    )
    assert out == "It is 30 days [[1]](https://gw/handbook/1)."
    (citation,) = checker.citations
    assert out[citation.marker_start : citation.marker_end] == "[[1]](https://gw/handbook/1)"


async def test_checking_at_the_end_changes_no_character() -> None:
    answer = "  Sure! Predictions are kept for 30 days [1][9].\n\nThey are on Mars [2]. Metadata stays for one year."
    out, checker = await checked(KEPT, answer, check="end", cuts=range(len(answer)))
    assert out == answer
    assert texts(out, checker.citations) == [
        (1, "[1]", "Predictions are kept for 30 days."),
        (2, "[2]", "The log is a queue in front of one writer thread with group commit into SQLite."),
        (1, "", "After that their content is erased, and the metadata stays for one year."),
    ]
    assert [each.status for each in checker.citations] == ["supported", "unsupported", "supported"]
    assert checker.verdict.invented_numbers == (9,)
    assert [out[start:end] for start, end in checker.verdict.unsupported] == ["They are on Mars [2]."]
    assert checker.verdict.label == "answered"


async def test_checking_at_the_end_tells_a_wrong_marker_on_a_right_sentence() -> None:
    _, checker = await checked(KEPT, "Predictions are kept for 30 days [2].", check="end")
    assert [(each.n, each.status) for each in checker.citations] == [(2, "unsupported"), (1, "supported")]


async def test_checking_at_the_end_says_when_nothing_was_supported() -> None:
    _, checker = await checked(KEPT, "They are on Mars.", check="end")
    assert checker.verdict.label == "answered:unsupported_answer"
    _, checker = await checked(KEPT, "I don't know.", check="end")
    assert checker.verdict.label == "abstained:engine_abstained"


async def test_a_sentence_leaves_as_soon_as_it_is_complete() -> None:
    checker = AnswerChecker(KEPT, hits())
    assert await checker.feed("Predictions are kept for 30 days") == ""
    assert await checker.feed(". After") == ""
    assert await checker.feed(" that") == "Predictions are kept for 30 days [1]."


async def test_the_cosine_decides_on_a_borderline_sentence() -> None:
    asked: list[tuple[str, list[str]]] = []

    def similarity(cosine: float) -> Any:
        async def cosines(text: str, others: list[str]) -> list[float]:
            asked.append((text, others))
            return [cosine] * len(others)

        return cosines

    answer = "The metadata stays a full calendar year."
    near, _ = await checked("What happens to the metadata?", answer, similarity=similarity(0.9), fallback="abstain")
    far, _ = await checked("What happens to the metadata?", answer, similarity=similarity(0.1), fallback="abstain")
    assert near == "The metadata stays a full calendar year [1]."
    assert far == "The sources do not answer this question."
    assert asked[0][1] == ["After that their content is erased, and the metadata stays for one year."]


async def test_an_embedder_that_is_down_leaves_the_decision_to_the_words() -> None:
    async def broken(text: str, others: list[str]) -> list[float]:
        raise IndexUnavailable("down")

    out, _ = await checked(KEPT, "On Mars.", similarity=broken)
    assert out == "Predictions are kept for 30 days [1]."


async def test_no_passages_support_nothing() -> None:
    out, checker = await checked(KEPT, "Predictions are kept for 30 days [1].", found=[])
    assert (out, checker.verdict.label) == ("The sources do not answer this question.", "abstained:unsupported_answer")


FRAGMENTS = [
    "Predictions are kept for 30 days", "After that their content is erased", "They are stored on Mars", "30 days",
    "The log is a queue in front of one writer thread", "Sure!", "Yes, ", "I don't know.", "According to passage 2, ",
    "According to [1], ", "e.g. ", "`rows[1]`", "\n```py\nx = rows[1]\n```\n", "```\nHALLMARK_RETENTION_DAYS",
    "- ", "1. ",
    "| a | b |\n", "# Heading\n", "\n\n", "\n", " ", ". ", ".", "?", "。", "[", "]", "[1]", " [1, 2]", "[1][3].",
    "【2】",
    "[^3]", "[99]", "保存期間は30日です", "é\u0301", "👩‍👩‍👧", "\x00", "\r\n",
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=14).map("".join)
QUESTIONS = st.sampled_from([KEPT, "Is a release immutable?", "What is the log?", ""])
OPTIONS = st.sampled_from(
    [
        {},
        {"check": "end"},
        {"fallback": "keep"},
        {"fallback": "abstain"},
        {"policy": CheckPolicy(unsupported="mark")},
        {"policy": CheckPolicy(unsupported="mark", fallback="keep")},
    ]
)


@examples(300)
@given(ANSWERS, QUESTIONS, OPTIONS, st.lists(st.integers(0, 200), max_size=12))
async def test_the_output_is_the_same_however_the_stream_is_cut(
    answer: str, question: str, options: dict[str, Any], cuts: list[int]
) -> None:
    whole = await checked(question, answer, **options)
    for bounds in (cuts, range(1, len(answer))):
        out, checker = await checked(question, answer, cuts=bounds, **options)
        assert out == whole[0]
        assert checker.citations == whole[1].citations
        assert checker.verdict == whole[1].verdict


@examples(300)
@given(ANSWERS, QUESTIONS, OPTIONS)
async def test_every_citation_is_true_to_its_source_and_to_the_answer(
    answer: str, question: str, options: dict[str, Any]
) -> None:
    out, checker = await checked(question, answer, **options)
    found = [hit.passage for hit in hits()]
    numbers: dict[int, Passage] = {}
    for each in checker.citations:
        assert each.passage in found
        assert each.quote
        assert each.quote == SOURCE[each.source_start : each.source_end]
        assert each.passage.start <= each.source_start < each.source_end <= each.passage.end
        assert 0 <= each.answer_start < each.answer_end <= len(out)
        assert each.answer_start <= each.marker_start <= each.marker_end <= each.answer_end
        assert numbers.setdefault(each.n, each.passage) == each.passage
        if options.get("check") != "end":
            assert out[each.marker_start : each.marker_end] in ("", f"[{each.n}]")
    if options.get("check") == "end":
        assert out == answer
    else:
        assert list(numbers) == list(range(1, len(numbers) + 1))
        assert checker.verdict.status == "abstained" or out or options


@pytest.mark.parametrize("check", ["sentence", "end"])
async def test_links_are_taken_out_and_no_mark_that_goes_leaves_one(check: Any) -> None:
    kept = "Predictions are kept for 30 days"
    answer = f"{kept} ht[9]tps://evil.example/x and <[9]img src=//evil.example> [1](//evil.example)."
    out, checker = await checked(KEPT, answer, check=check, links=LinkFilter([SOURCE]), fallback="keep")
    assert "https://" not in out
    assert "<img" not in out
    assert "](" not in out
    for citation in checker.citations:
        assert out[citation.marker_start : citation.marker_end] in ("[1]", "")


@given(st.lists(st.integers(0, 120), max_size=6))
async def test_without_links_a_stream_says_the_same_however_it_was_cut(cuts: list[int]) -> None:
    answer = (
        "Predictions are kept for 30 days [1] ![x](https://evil.example). See <a href='//evil.example'>it</a> `a<b`."
    )
    outs = {check: await checked(KEPT, answer, check=check, links=LinkFilter([])) for check in ("sentence", "end")}
    for check, (whole, _) in outs.items():
        assert (await checked(KEPT, answer, cuts=cuts, check=check, links=LinkFilter([])))[0] == whole
