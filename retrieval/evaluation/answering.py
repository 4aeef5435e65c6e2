"""What answers rest on, and when there is none: figures of citations and of abstention.

The main rule: words and numbers decide, by the same rules as the check of answers, and gold answers where a set has
them; no model judges. A claim is a sentence of an answer that could be right or wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retrieval.abstention import CheckPolicy, says_nothing
from retrieval.citations import AnswerChecker, relevance
from retrieval.documents import Hit, Passage
from retrieval.evaluation.measures import Figure, figure
from retrieval.evaluation.searching import SCOPE, Progress, Search, at_once
from retrieval.evaluation.sets import Question
from retrieval.judging import Similarity
from retrieval.markers import claim_text, read_markers
from retrieval.sentences import sentences
from retrieval.support import Evidence, Support
from retrieval.terms import terms


@dataclass(frozen=True, slots=True)
class Cited:
    """A citation: the span of the answer, and what it quotes of which document."""

    start: int
    end: int
    document: str
    quote: str
    title: str = ""
    heading_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its citations; `refused` says why there is none, as `nothing_relevant`."""

    text: str
    citations: tuple[Cited, ...] = ()
    refused: str | None = None


class Answerer(Protocol):
    """What is measured: the extractive answerer, or a running service with its engine."""

    async def answer(self, question: str) -> Answer:
        """Answer a question, or refuse to."""
        ...


class Passages(Search, Protocol):
    """What the extractive answerer needs of retrieval."""

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        """Cosine of `text` to each of `texts`."""
        ...


class Extractive:
    """Answers by the passages alone, as the service does in place of an engine that says nothing supported."""

    def __init__(self, search: Passages, *, top_k: int = 5, policy: CheckPolicy | None = None) -> None:
        self._search = search
        self._similarity: Similarity = search.similarity
        self._top_k = top_k
        self._policy = policy or CheckPolicy()

    async def answer(self, question: str) -> Answer:
        """Give the sentence of the passages that answers best, or a few."""
        found = await self._search.search(SCOPE, question, top_k=self._top_k)
        judged = relevance(question, found.hits, self._policy)
        if not judged.relevant:
            return Answer("", refused="nothing_relevant")
        checker = AnswerChecker(question, judged.hits, self._policy, similarity=self._similarity)
        text = await checker.finish()
        if checker.verdict.status == "abstained":
            return Answer(text, refused="unsupported_answer")
        return Answer(
            text,
            tuple(_cited(each.answer_start, each.answer_end, each.passage, each.quote) for each in checker.citations),
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and what was answered."""

    question: Question
    answer: Answer


async def ask(answerer: Answerer, questions: Sequence[Question], progress: Progress | None = None) -> list[Asked]:
    """Ask every question."""
    answers = await at_once([answerer.answer(each.text) for each in questions], progress, "questions")
    return [Asked(question, answer) for question, answer in zip(questions, answers, strict=True)]


def citation_figures(asked: Sequence[Asked]) -> list[Figure]:
    """How well answers to answerable questions are cited.

    By the checker: of the citations those whose quote supports their sentence (precision), and of the claims those
    that their citations together support (recall; Gao and others 2023, with words in place of a model). By the gold:
    of the answers those that cite a document that answers, and of the questions those answered rightly, with a right
    document cited.
    """
    precise: list[bool] = []
    recalled: list[bool] = []
    sourced: list[bool] = []
    right: list[bool] = []
    policy = CheckPolicy()
    for each in asked:
        if each.question.kind != "answerable":
            continue
        has_source = any(cited.document in each.question.documents for cited in each.answer.citations)
        if each.answer.refused is None:
            claims = _claims(each, policy)
            precise += [each_is for claim in claims for each_is in claim.precise]
            recalled += [claim.supported for claim in claims]
            if each.question.documents:
                sourced.append(has_source)
        if each.question.answers:
            right.append(_holds(each.answer, each.question) and (has_source or not each.question.documents))
    return [
        figure("citation_precision", precise),
        figure("citation_recall", recalled),
        figure("right_source", sourced),
        figure("answered_right", right),
    ]


def abstention_figures(asked: Sequence[Asked]) -> list[Figure]:
    """Of the questions without an answer those refused, near misses and other fields apart; of the others as well.

    `..._before_engine` counts those that were refused because nothing relevant was found.
    """
    found = []
    for name, kind in (
        ("false_abstention", "answerable"),
        ("near_miss_abstention", "near_miss"),
        ("off_topic_abstention", "off_topic"),
    ):
        refusals = [each.answer.refused for each in asked if each.question.kind == kind]
        found.append(figure(name, [refused is not None for refused in refusals]))
        found.append(figure(f"{name}_before_engine", [refused == "nothing_relevant" for refused in refusals]))
    return [each for each in found if each.n]


@dataclass(frozen=True, slots=True)
class _Claim:
    supported: bool
    precise: tuple[bool, ...]


def _claims(asked: Asked, policy: CheckPolicy) -> list[_Claim]:
    """Judge each sentence that claims something by what its citations quote."""
    question, answer = asked.question.text, asked.answer
    found = []
    for start, end in sentences(answer.text):
        cited = [each for each in answer.citations if each.start < end and start < each.end]
        said = answer.text[start:end]
        claim = terms(claim_text(said, read_markers(said)))
        evidence = Evidence(question, [_hit(each) for each in cited])
        if not claim.words or (not cited and says_nothing(said, claim, question, evidence.question)):
            continue
        supports = evidence.support(claim)
        precise = {each.hit: _holds_up(each) and each.share >= policy.weak_share for each in supports}
        share, pair = evidence.joint(claim, supports)
        alone = any(_holds_up(each) and each.share >= policy.supported_share for each in supports)
        found.append(
            _Claim(
                alone or (len(pair) == 2 and share >= policy.supported_share),
                tuple(precise[hit] for hit in range(len(cited))),
            )
        )
    return found


def _holds_up(support: Support) -> bool:
    return not support.missing and not support.contradicted


def _hit(cited: Cited) -> Hit:
    passage = Passage(
        cited.document,
        "",
        1,
        cited.quote,
        0,
        len(cited.quote),
        heading_path=cited.heading_path,
        document_name=cited.document,
        document_title=cited.title,
    )
    return Hit(passage, 1.0)


def _cited(start: int, end: int, passage: Passage, quote: str) -> Cited:
    return Cited(start, end, passage.document_name, quote, passage.document_title, passage.heading_path)


def _holds(answer: Answer, question: Question) -> bool:
    """Tell whether an answer, or what it quotes, holds one of the gold answers, in whatever case and spacing."""
    if answer.refused is not None:
        return False
    said = [_plain(text) for text in (answer.text, *(cited.quote for cited in answer.citations))]
    return any(_plain(gold) in text for gold in question.answers for text in said)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
