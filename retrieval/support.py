"""Whether passages say what a sentence says, which sentence of which passage says it, and whether it answers.

The main rule: a number or an identifier of the claim must stand in the passage, whatever else matches. Then counts how
much of the claim's content stands in one place of the passage, and whether one of the two denies what the other
states. Words of the question weigh less, because a wrong answer repeats them just as well; a number that stands beside
another subject is not the claim's (`retrieval.subjects`).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log
from typing import NamedTuple

from retrieval.asking import asked
from retrieval.documents import Hit, Passage
from retrieval.sentences import sentences
from retrieval.subjects import of_others
from retrieval.terms import Terms, terms, word_set

_NOTHING: frozenset[str] = frozenset()
# A name or a number tells more about what a claim says than a common word does.
_NAME_WEIGHT = 2.0
# What the question already says may make up at most a third of a claim: the rest is what the answer adds.
_QUESTION_WEIGHT = 0.3
_QUESTION_CAP = 0.5
# Any weights from 0.7 and 0.6 to 0.8 and 0.3 tell near misses as well (AUC .78 to .80 on SQuAD with a word swapped);
# where all documents are about one thing, as in a handbook, the words tell more than the cosines.
_FOCUS_WORDS = 0.8
_FOCUS_COSINE = 0.4
# What a question ends with after "for" is its subject: "the retention period for audit logs". In SQuAD one such word is
# missing in 11 % of the paragraphs that answer, and in 42 % once a word was swapped.
_PURPOSE = re.compile(r"\bfor\s++(?:[\w'’-]++\s*+){1,4}+\W*+\Z")
# What a name, number or such subject that stands nowhere in the passage takes off their fit.
_ABSENT_NAME = 0.3
# A second sentence joins the quote, or a second passage the first, only when it adds this much of the claim.
_SECOND_SENTENCE_GAIN = 0.15
# What the support of the best place counts against that of the whole passage: a value from elsewhere in the right
# passage is wrong more often than it is a paraphrase.
_PLACE_WEIGHT = 0.7
# "Call" asks in "what is it called" and not in "who was on call".
_CALLED = re.compile(r"\bcalled\b", re.IGNORECASE)
# Words that ask, hedge, or say what to do with the answer, and not what it is about.
_TASK_WORDS = word_set(
    """answer approximat brief briefly compare describ detail explain giv happen kind
    list long many mean much name often outlin pleas question rough say sentenc short show stat
    summar summariz summary tell thank type word writ"""
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A passage, read once: its sentences, and the vocabulary of its text and of its title and headings.

    `sections` holds for each sentence the heading inside the passage that it stands under, `under` the words of that,
    `tables` the row that names the cells of a table's row.
    """

    spans: tuple[tuple[int, int], ...]
    sentences: tuple[Terms, ...]
    is_heading: tuple[bool, ...]
    sections: tuple[str, ...]
    under: tuple[frozenset[str], ...]
    tables: tuple[str, ...]
    head: frozenset[str]
    vocabulary: frozenset[str]

    def about(self, subject: frozenset[str]) -> list[tuple[frozenset[str], frozenset[str]]]:
        """Return for each sentence which words of a subject it has, and which with its neighbours and headings."""
        head = subject & self.head
        here = [subject & each.vocabulary for each in self.sentences]
        # The next section's heading stands beside the last sentence of this one and is about something else.
        beside = [_NOTHING if is_heading else words for is_heading, words in zip(self.is_heading, here, strict=True)]
        return [
            (words, head.union(words, *beside[max(0, place - 1) : place + 2], subject & self.under[place]))
            for place, words in enumerate(here)
        ]

    def without(self, places: Collection[int]) -> frozenset[str]:
        """Return the vocabulary of the passage without some of its sentences."""
        kept = (each.vocabulary for place, each in enumerate(self.sentences) if place not in places)
        return self.head.union(*kept, *self.under)


class Support(NamedTuple):
    """How far a passage supports a claim, and where: `start:end` of the passage's text, a sentence or two.

    `share` (0 to 1) is the weighted part of the claim's content that stands there; `missing` are its numbers and
    identifiers that stand nowhere in the passage, or only with another subject; `contradicted` says that one denies
    what the other states; `covered` are the words of the claim that stand at the place.
    """

    hit: int
    share: float
    start: int
    end: int
    covered: frozenset[str]
    missing: frozenset[str] = frozenset()
    contradicted: bool = False

    @property
    def score(self) -> float:
        """The share, lowered for what is missing or contradicted: one figure to compare claims by."""
        return self.share * (0.3 if self.missing else 1.0) * (0.5 if self.contradicted else 1.0)


class Focus(NamedTuple):
    """How well a place of a passage fits the question: by words alone (0 to 1), and with what cosines are known."""

    words: float
    whole: float | None


class Candidate(NamedTuple):
    """A sentence of a passage as an answer to the question; only the order of `rank_score` means something.

    `suits` tells whether it holds the kind of thing that is asked for (`retrieval.asking`).
    """

    hit: int
    place: int
    start: int
    end: int
    rank_score: float
    suits: float


@lru_cache(maxsize=2048)
def read(passage: Passage) -> Reading:
    """Read a passage; the same passages come back for many questions, so that the last few are kept."""
    spans = tuple(sentences(passage.text))
    head = terms("\n".join((passage.document_title, passage.document_name, *passage.heading_path))).vocabulary
    texts = [passage.text[start:end] for start, end in spans]
    tables = _table_heads(texts, passage.heading_path)
    named = {table: terms(table).vocabulary for table in set(tables)}
    said = tuple(_with_names(terms(text), named[table]) for text, table in zip(texts, tables, strict=True))
    sections = _sections(texts)
    under = {section: terms(section).vocabulary for section in set(sections)}
    vocabulary = head.union(*(each.vocabulary for each in said), *under.values())
    is_heading = tuple(text.startswith("#") for text in texts)
    return Reading(
        spans, said, is_heading, sections, tuple(under[section] for section in sections), tables, head, vocabulary
    )


def _table_heads(texts: Sequence[str], heading_path: Sequence[str]) -> tuple[str, ...]:
    """Find for each row of a table the row that names its cells: the table's first, or the last heading's.

    A table that goes on from the passage before has its head among the headings.
    """
    found = []
    head = heading_path[-1] if heading_path and " | " in heading_path[-1] else ""
    inside = bool(head)
    for text in texts:
        is_row = text.startswith("|")
        found.append(head if is_row and inside else "")
        head = text if is_row and not inside else head
        inside = is_row
    return tuple(found)


def _with_names(said: Terms, names: frozenset[str]) -> Terms:
    """What a table's row says also with the names of its cells; other sentences have none."""
    return said._replace(vocabulary=said.vocabulary | names) if names else said


def _sections(texts: Sequence[str]) -> tuple[str, ...]:
    """Find for each sentence the heading inside its passage that it stands under, empty where there is none."""
    found = []
    section = ""
    for text in texts:
        section = text.lstrip("# ") if text.startswith("#") else section
        found.append(section)
    return tuple(found)


@lru_cache(maxsize=512)
def subject_of(question: str) -> frozenset[str]:
    """The words of what a question is about."""
    return frozenset(terms(_CALLED.sub(" ", question)).words) - _TASK_WORDS


class Evidence:
    """The passages found for one question, ready to be asked what they support."""

    def __init__(self, question: str, hits: Sequence[Hit], *, polar: bool = False) -> None:
        """`polar` says that the question asks for yes or no: then its numbers may be what the passages deny."""
        self.hits = hits
        self.readings = [read(hit.passage) for hit in hits]
        self.asked = asked(question)
        self.question = self.asked.said
        self.subject = subject_of(question)
        literal = self.question.names if polar else self.question.names | self.question.hard
        purpose = _PURPOSE.search(question)
        self._must_stand = self.subject & literal.union(terms(purpose[0]).words if purpose else ())
        self._about = [reading.about(self.subject) for reading in self.readings]
        self._documents: dict[str, frozenset[str]] = {}
        for hit, reading in zip(hits, self.readings, strict=True):
            said = self._documents.get(hit.passage.document_id, _NOTHING)
            self._documents[hit.passage.document_id] = said | (self._must_stand & reading.vocabulary)
        self._weights = _Weights(self._rarity())
        self._candidates: list[Candidate] | None = None
        self._of_hit: dict[int, list[Candidate]] = {}
        by_score = sorted(range(len(hits)), key=lambda hit: -hits[hit].score)
        self._rank = {hit: rank for rank, hit in enumerate(by_score)}

    def support(self, claim: Terms, among: Iterable[int] | None = None) -> list[Support]:
        """Weigh `claim` against each passage (`among` these hits), the best supporting one first."""
        weights = _Weights(self._claim_weights(claim))
        hard = claim.hard
        found = [
            self._support(claim, hard, weights, hit) for hit in (range(len(self.hits)) if among is None else among)
        ]
        return sorted(found, key=lambda each: (bool(each.missing), each.contradicted, -each.share, each.hit))

    def joint(self, claim: Terms, found: Sequence[Support]) -> tuple[float, list[Support]]:
        """Return how much of `claim` the two best complementary places say together, and those two."""
        weights = _Weights(self._claim_weights(claim))
        total, hard = weights.total, claim.hard
        best, pair = 0.0, list(found[:1])
        for i, one in enumerate(found):
            for other in found[i + 1 :]:
                covered = one.covered | other.covered
                if hard <= covered and covered != one.covered and covered != other.covered:
                    share = weights.sum(covered) / total if total else 0.0
                    least = min(weights.sum(covered - one.covered), weights.sum(covered - other.covered))
                    if (
                        share > best
                        and least >= _SECOND_SENTENCE_GAIN * total
                        and not (one.contradicted or other.contradicted)
                    ):
                        best, pair = share, [one, other]
        return best, pair

    def focus(self, hit: int, start: int, end: int, cosine: float | None = None) -> Focus:
        """Return how well `start:end` of a passage fits the question; `cosine` is that of the question and the span.

        Words weigh by their rarity and count in the sentence, in it with its neighbours and headings, and in the whole
        passage. A name or number of the question counts against it that stands in no passage found of its document:
        a text names its subject once and goes on with "the service".
        """
        reading = self.readings[hit]
        places = [i for i, span in enumerate(reading.spans) if span[0] < end and start < span[1]]
        if not self.subject or not places:
            return Focus(1.0, 1.0)
        about = self._about[hit]
        here = _NOTHING.union(*(about[i][0] for i in places))
        near = _NOTHING.union(*(about[i][1] for i in places))
        shares = [self._weights.sum(words) for words in (here, near, self.subject & reading.vocabulary)]
        total = self._weights.total
        words = (shares[0] / 4 + shares[1] / 4 + shares[2] / 2) / total
        words -= _ABSENT_NAME * len(self._must_stand - self._documents[self.hits[hit].passage.document_id])
        known = [each for each in (self._dense_score(hit), cosine) if each is not None]
        whole = _FOCUS_WORDS * words + _FOCUS_COSINE * sum(known) / len(known) if known else None
        return Focus(words, whole)

    def _dense_score(self, hit: int) -> float | None:
        """Return the cosine of question and passage; one that the dense leg did not find is no nearer than its last."""
        scores = [each.dense_score for each in self.hits if each.dense_score is not None]
        own = self.hits[hit].dense_score
        return own if own is not None or not scores else min(scores)

    def under_headings(self, candidate: Candidate) -> str:
        """Return a sentence with the title and headings it stands under, as passages are embedded."""
        passage = self.hits[candidate.hit].passage
        section = self.readings[candidate.hit].sections[candidate.place]
        path = passage.heading_path if not section else (*passage.heading_path, section)
        return replace(passage, text=passage.text[candidate.start : candidate.end], heading_path=path).embedded_text

    def in_context(self, candidate: Candidate) -> str:
        """Return a sentence with the one before it, which it may lean on, under title and headings."""
        passage, reading = self.hits[candidate.hit].passage, self.readings[candidate.hit]
        first = reading.spans[max(0, candidate.place - 1)][0]
        start = candidate.start if passage.text[first] == "#" else first
        section = reading.sections[candidate.place]
        path = passage.heading_path if not section else (*passage.heading_path, section)
        return replace(passage, text=passage.text[start : candidate.end], heading_path=path).embedded_text

    def candidates(self) -> list[Candidate]:
        """Return every sentence of every passage but its headings, the likeliest answer first."""
        if self._candidates is None:
            found = [each for hit in range(len(self.hits)) for each in self._candidates_of(hit)]
            self._candidates = sorted(found, key=lambda each: -each.rank_score)
            for each in self._candidates:
                self._of_hit.setdefault(each.hit, []).append(each)
        return self._candidates

    def behind_best(self, hit: int, start: int, end: int) -> float:
        """Return how far `start:end` of a passage falls behind the sentence that is the likeliest answer."""
        best = self.candidates()
        # The likeliest comes first, here as well.
        for each in self._of_hit.get(hit, ()):
            if each.start < end and start < each.end:
                return best[0].rank_score - each.rank_score
        return 0.0

    def _candidates_of(self, hit: int) -> Iterator[Candidate]:
        reading, passage = self.readings[hit], self.hits[hit].passage.text
        total = self._weights.total or 1.0
        known = self.question.vocabulary | reading.head
        for place, (said, (here, near)) in enumerate(zip(reading.sentences, self._about[hit], strict=True)):
            if not said.words or reading.is_heading[place]:
                continue
            start, end = reading.spans[place]
            text = passage[start:end]
            suits = self.asked.suits(text, said)
            score = (0.6 * self._weights.sum(here) + 0.35 * self._weights.sum(near)) / total
            score += 0.35 * suits - 0.07 * self._rank[hit]
            if said.vocabulary <= known or _is_label(text):
                score -= 0.25  # It repeats the question or leads in: whatever answers it stands elsewhere.
            yield Candidate(hit, place, start, end, score, suits)

    def _support(self, claim: Terms, hard: frozenset[str], weights: "_Weights", hit: int) -> Support:
        reading = self.readings[hit]
        total = weights.total
        if not total or not reading.spans:
            return Support(hit, 0.0, 0, 0, frozenset(), hard)
        words = weights.words
        head = words & reading.head
        others = of_others(claim, self.subject, reading.sentences, reading.under) if claim.numbers else ()
        singles = [
            head if place in others else head | (words & each.vocabulary)
            for place, each in enumerate(reading.sentences)
        ]
        shares = [weights.sum(each) / total for each in singles]
        first = last = max(range(len(shares)), key=lambda i: (shares[i], -i))
        covered, share = singles[first], shares[first]
        for i in range(max(0, first - 1), min(len(singles) - 1, first + 1)):
            both = singles[i] | singles[i + 1]
            if (together := weights.sum(both) / total) >= share + _SECOND_SENTENCE_GAIN:
                first, last, covered, share = i, i + 1, both, together
        vocabulary = reading.without(others) if others else reading.vocabulary
        whole = weights.sum(words & vocabulary) / total
        return Support(
            hit=hit,
            share=_PLACE_WEIGHT * share + (1 - _PLACE_WEIGHT) * whole,
            start=reading.spans[first][0],
            end=reading.spans[last][1],
            covered=covered,
            missing=hard - vocabulary,
            contradicted=contradicts(claim, reading.sentences[first : last + 1]),
        )

    def _claim_weights(self, claim: Terms) -> dict[str, float]:
        telling = claim.names | claim.hard
        weights = {word: _NAME_WEIGHT if word in telling else 1.0 for word in claim.words}
        known = [word for word in weights if word in self.question.vocabulary]
        new = sum(weights.values()) - sum(weights[word] for word in known)
        if new and known:
            scale = min(_QUESTION_WEIGHT, _QUESTION_CAP * new / sum(weights[word] for word in known))
            weights.update({word: weights[word] * scale for word in known})
        return weights

    def _rarity(self) -> dict[str, float]:
        """Weigh the question's words by how few of the found sentences have them (inverse document frequency)."""
        heads = [self.subject & reading.head for reading in self.readings]
        everything = [head | here for head, about in zip(heads, self._about, strict=True) for here, _ in about]
        seen = Counter(word for each in everything for word in each)
        return {word: log((len(everything) + 1) / (seen[word] + 0.5)) for word in sorted(self.subject)}


class _Weights:
    """Words and what each counts. Sums are kept: the sentences of passages hold the same few of a question's words."""

    __slots__ = ("_of", "_sums", "total", "words")

    def __init__(self, of: Mapping[str, float]) -> None:
        self._of = of
        self._sums: dict[frozenset[str], float] = {}
        self.words = frozenset(of)
        self.total = sum(of.values())

    def sum(self, words: frozenset[str]) -> float:
        """Add the weights of words, which all have one."""
        found = self._sums.get(words)
        if found is None:
            # In a fixed order, since a sum of floats depends on it and a set's order changes between processes.
            found = self._sums[words] = sum(map(self._of.__getitem__, sorted(words)))
        return found


def contradicts(claim: Terms, place: Sequence[Terms]) -> bool:
    """Tell whether one side denies a word that the other only states; where both deny something, nothing is told."""
    denials = sum(each.negations for each in place)
    if bool(claim.negations) == bool(denials):
        return False
    if claim.negations:
        stated = frozenset().union(*(each.affirmed for each in place))
        return bool((claim.negated - claim.affirmed) & stated)
    denied = frozenset().union(*(each.negated - each.affirmed for each in place))
    return bool(claim.affirmed & denied)


def _is_label(text: str) -> bool:
    return text.rstrip("*_ ").endswith((":", "?"))
