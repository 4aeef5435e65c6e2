"""When not to answer: nothing relevant was found, the engine says so itself, or what it says is no answer.

The main rule: every threshold is a field of `CheckPolicy`, with the evidence for its default beside it. It comes from
public questions (SQuAD 2, WiCE) that the defaults were also chosen on: `tests/benchmarks/support.py` measures them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from retrieval.documents import Hit
from retrieval.support import read, subject_of
from retrieval.terms import Terms, stem, word_set

ABSTENTION_TEXT = "The sources do not answer this question."


@dataclass(frozen=True, slots=True)
class CheckPolicy:
    """How strictly answers are checked."""

    relevance: float = 0.5
    """Least cosine plus 0.4 times the share of the question's words, for passages to be worth asking an engine.

    This sum tells SQuAD's questions from those of other fields with AUC .997 (800 and 300; the cosine alone: .987).
    At 0.5 it refuses 88 % of the latter and 1 % of the former, and the checks below nearly all the rest."""
    relevance_rated: float = 0.4
    """The same where the engine rates sentences, and the less relevant passages are read too."""
    relevance_words: float = 0.34
    """Least share of the question's words where no cosine is known (a search without the dense leg)."""
    supported_share: float = 0.6
    """Least share of a sentence's content that its passage must hold for `supported`.

    At 0.6, 97 % of true SQuAD claims are, 3 % of those held against another passage of the article, and 1 % of those
    with another answer put in; in WiCE 56 % of the supported sentences and 5 % of the unsupported."""
    restated_share: float = 0.75
    """The same where the engine was given a sentence or two and not whole passages: then it has little else to say."""
    weak_share: float = 0.4
    """Least share for `weak`; between the two the cosine decides, where it is known.

    `supported` and `weak` together keep 79 % of WiCE's supported sentences and 12 % of the unsupported."""
    cosine: float = 0.55
    """Least cosine of such a sentence and its quote."""
    focus: float = 0.42
    """Least fit of the question and the place an answer rests on: 0.8 times words plus 0.4 times cosine.

    At 0.42 one right answer in ten is refused on SQuAD, and 38 % of the answers to questions with a word swapped."""
    focus_words: float = 0.25
    """The same by words alone, where no cosine is known."""
    focus_gap: float = 0.65
    """Most that the place an answer rests on may fall behind the sentence of the passages that fits the question best,
    by the words' rank score. Of the places that gold answers of SQuAD rest on, 2 % fall further behind."""
    extract_focus: float = 0.3
    """The same as `focus` for a passage's sentence that no engine chose, where none rates sentences.

    Of 200 answerable questions of SQuAD it gives right / wrong answers and none, and it lets through of 100 near
    misses and of 200 questions of other fields: 0.30: 86 / 8 / 6 %, 83 and 4 %; 0.38: 83 / 7 / 10 %, 77 and 1 %;
    0.46: 77 / 6 / 16 %, 69 and 0 %; 0.50: 74 / 6 / 21 %, 66 and 0 %. Chosen on one half of them, where 5 % get no
    answer, and 7 % of the other. Higher refuses more of what is absent from documents that are all about one thing, as
    in a handbook: of our own 90 questions 0.46 gives 41 right and 12 wrong answers, and refuses 23 of the 30 that are
    absent."""
    extract_focus_words: float = 0.37
    """The same by words alone."""
    rated_fit: float = 0.74
    """The same where the engine rates sentences: share of words plus cosine plus a fifth of the rating's log odds plus
    two fifths of how well its kind suits.

    Of the 85 answerable and 42 absent questions of examples/questions.jsonl for tuning 0.74 answers 78 % right and 8 %
    wrong, and refuses 81 % of the absent ones; by their candidates alone 0.70 refuses 79 %, and 0.78 answers 74 % right
    and 7 % wrong."""
    polar_extra: float = 0.3
    """How much more it takes for a question that asks for yes or no: what is about it seldom says which."""
    rated_words: float = 0.2
    """Least rating of a sentence in the engine's own words, where it rates.

    Of 33 such sentences to the questions for tuning, all supported, 2 of 22 right and 7 of 11 wrong ones fall below."""
    polar_share: float = 0.75
    """Least share of a yes-or-no question that must stand in one place for a bare "Yes" or "No" to be kept."""
    max_citations: int = 3
    """Most passages cited for one sentence."""
    unsupported: Literal["drop", "mark"] = "drop"
    """Withhold an unsupported sentence, or let it pass and say so."""
    fallback: Literal["extract", "abstain", "keep"] = "extract"
    """What takes the place of an answer without a supported sentence."""


@dataclass(frozen=True, slots=True)
class Relevance:
    """Whether anything found is about the question, how much (the best passage's score), and what to give an engine."""

    relevant: bool
    score: float
    hits: tuple[Hit, ...]


def relevance(question: str, hits: Sequence[Hit], policy: CheckPolicy) -> Relevance:
    """Judge hits before an engine is asked: none is kept when not even the best is about the question."""
    subject = subject_of(question)
    scores = []
    for hit in hits:
        words = len(subject & read(hit.passage).vocabulary) / len(subject) if subject else 1.0
        known = hit.dense_score is not None
        scores.append(
            (hit.dense_score or 0.0) + 0.4 * words if known else words * policy.relevance / policy.relevance_words
        )
    best = max(scores, default=0.0)
    if not hits or best < policy.relevance:
        return Relevance(False, best, ())
    # What is half as relevant as the best distracts a small engine more than it helps.
    return Relevance(True, best, tuple(hit for hit, score in zip(hits, scores, strict=True) if score >= best / 2))


_SOURCE = r"(?:passages?|sources?|documents?|documentation|context|texts?|excerpts?|information|article|references?)"
_SAY = r"(?:say|mention|state|contain|provide|specify|include|answer|give|indicate|address|discuss|cover|explain|tell)"
_SAID = (
    r"(?:mentioned|stated|specified|provided|given|discussed|found|available|described|covered|included|answered|known)"
)
_ABSTENTIONS = (
    r"\b(?:I|we)(?:['’]m| am| are)? (?:do not|don['’]t|cannot|can['’]t|could not|couldn['’]t|not able to|unable to)\b",
    r"\b(?:I|we)(?:['’]m| am| are) not (?:sure|aware)\b",
    rf"\b{_SOURCE}(?: (?:above|provided|given|here))? (?:(?:do|does|did) not|(?:do|does|did)n['’]t|never) {_SAY}",
    rf"\b(?:is|are|was|were) (?:not|nowhere) (?:\w+ly )?{_SAID}\b(?: (?:in|by|from)\b.{{0,20}}\b{_SOURCE}|\W*\Z)",
    r"\bno (?:information|mention|answer|details?|evidence)\b",
    r"\b(?:not enough|insufficient) (?:information|context|evidence)",
    r"\bcan(?:not|['’]t) be (?:determined|answered|found|inferred)|\bunanswerable\b",
    rf"\A\W*(?:n/?a|unknown|no answer|not {_SAID})\W*\Z",
)
_ABSTAINS = re.compile("|".join(_ABSTENTIONS), re.IGNORECASE)
# Each of these abstentions holds one of these, and few other sentences do: the patterns take twenty times as long.
_ABSTAINING = ("no", "n't", "n’t", "never", "unable", "unan", "uff", "na", "n/a")
_POLAR = re.compile(
    r"\s*(?:(?:and|so|but|ok|okay|please)\b[, ]*)*"
    r"(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|may|might|must|shall|"
    r"isn['’]t|aren['’]t|don['’]t|doesn['’]t|can['’]t|won['’]t)\b",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"[\s*_\"'“]*(?P<word>yes|no)\b[*_\"'”]*(?:\s*[,.;:!–—-]\s*|\s*\Z)", re.IGNORECASE)
_CHOICE = re.compile(r"\bor\b", re.IGNORECASE)
_FILLER_WORDS = frozenset(
    map(
        stem,
        word_set(
            """absolutely according additional answer answers ask asked based below certainly clarify context course
            details document documents excerpt explain explanation find following follows given glad great happy help
            helpful hello here hope information know let mentioned note ok okay passage passages please provided
            question questions reference references regarding response result right say says see sorry source sources
            stated step steps summarize summary sure text thank thanks understand well welcome"""
        ),
    )
)


def engine_abstains(text: str) -> bool:
    """Tell whether a sentence says that the sources do not answer, in one of the usual English ways."""
    lower = text.lower()
    return any(mark in lower for mark in _ABSTAINING) and _ABSTAINS.search(text) is not None


def is_polar(question: str) -> bool:
    """Tell whether a question asks for yes or no."""
    return _POLAR.match(question) is not None


def split_yes_no(text: str) -> tuple[Literal["yes", "no"] | None, str]:
    """Take a leading "Yes" or "No" off a sentence."""
    found = _YES_NO.match(text)
    if found is None:
        return None, text
    return ("yes" if found["word"].lower() == "yes" else "no"), text[found.end() :]


def says_nothing(text: str, claim: Terms, question: str, asked: Terms) -> bool:
    """Tell whether a sentence claims nothing that could be right or wrong as an answer.

    That is a pleasantry, a heading, a lead-in with a colon, a question back, or the question said again.
    """
    stripped = text.strip().strip("*_")
    said = frozenset(claim.words) - _FILLER_WORDS
    if not said or stripped.startswith("#") or stripped.endswith("?"):
        return True
    if stripped.endswith((":", "：")) and not claim.hard - asked.vocabulary:
        return True
    may_repeat = is_polar(question) or _CHOICE.search(question)
    return said <= asked.vocabulary and not may_repeat
