"""One sentence's verdict: what it claims, whether the passages support it, and which of them to cite for it.

The main rule: the cheap and exact checks come first - numbers, words, negation - and the cosine is asked only where
they leave a doubt.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal

from retrieval.abstention import CheckPolicy, engine_abstains, is_polar, says_nothing, split_yes_no
from retrieval.documents import Hit
from retrieval.errors import RetrievalError
from retrieval.markers import Marker, cells, claim_text, is_code, is_item, is_text, read_markers, split_lead_in
from retrieval.ranking import Ranking, by_ratings, by_words, likeliest, reaches
from retrieval.support import Candidate, Evidence, Support, contradicts
from retrieval.terms import Terms, terms, word_set

_Place = tuple[int, int, int]  # A hit, and the first and the last of its sentences.
Similarity = Callable[[str, list[str]], Awaitable[list[float]]]
Rate = Callable[[str, list[str]], Awaitable[list[float] | None]]
Status = Literal["supported", "weak", "unsupported"]

# Two shares no further apart than this say the same.
_SAME_SHARE = 0.1
# Least share of what a sentence adds to the question that must stand at the places it rests on.
_NEW_SHARE = 0.5
# With so few new words a sentence says the question again, unless what is asked for is among them.
_AGAIN_SHARE = 0.3
# What follows a sentence that ends in a colon belongs to it, to so many lines.
_LONGEST_LIST = 8
# What "it" stands for is looked for in so many sentences before.
_FARTHEST_BACK = 2
_PRONOUNS = word_set(
    "it this that these those they he she its their his her such both each however also therefore then thus"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A checked sentence: `text` is what would be shown of it, `written` what the engine wrote.

    `cited` are hits by index; `shown` maps an index into `markers` to those of them it stays for, `added` are cited at
    the sentence's end. `supports` holds what each passage says to it.
    """

    kind: Literal["claim", "filler", "abstention"]
    text: str
    status: Status = "unsupported"
    share: float = 0.0
    cited: tuple[int, ...] = ()
    shown: dict[int, tuple[int, ...]] = field(default_factory=dict)
    added: tuple[int, ...] = ()
    markers: tuple[Marker, ...] = ()
    supports: dict[int, Support] = field(default_factory=dict)
    invented: tuple[int, ...] = ()
    written: str = ""
    written_markers: tuple[Marker, ...] = ()


class Judge:
    """Judges the sentences of one answer."""

    def __init__(
        self,
        question: str,
        hits: Sequence[Hit],
        policy: CheckPolicy,
        similarity: Similarity | None = None,
        *,
        shown: int | None = None,
        rate: Rate | None = None,
    ) -> None:
        """`similarity(text, texts)` returns cosines; without it words alone decide.

        `rate(question, texts)` says how likely each text answers, 0 to 1, or None if nobody can tell.
        `shown` says that the engine was given only sentences, of so many of the hits: then its answer restates them.
        """
        self._question = question
        self._hits = hits
        self._policy = policy
        self._similarity = similarity
        self._rate = rate
        self._ranked: Ranking | None = None
        self._shown = range(len(hits) if shown is None else shown)
        self._restates = shown is not None
        self._is_polar = is_polar(question)
        self._evidence = Evidence(question, hits, polar=self._is_polar)

    async def judge(self, written: str, *, focused: bool) -> Finding:
        """Judge one sentence; `focused` says that one before it already answers the question."""
        written_markers = self._markers(written)
        text, led = split_lead_in(written)
        markers = self._markers(text) if led else written_markers
        named = tuple(dict.fromkeys([*led, *(number for marker in written_markers for number in marker.numbers)]))
        own = tuple(number - 1 for number in named if number <= len(self._shown))
        finding = await self._weigh(text, markers, own, focused)
        return replace(
            finding,
            invented=tuple(number for number in named if number > len(self._shown)),
            written=written,
            written_markers=written_markers,
        )

    async def extract(self) -> list[Finding]:
        """Return the sentence of the passages that answers the question best, or a few, cited; empty when none fits."""
        ranking = await self._ranking()
        if not ranking.fits:
            return []
        most = ranking.most - self._is_polar
        least = ranking.scored[0][0] - ranking.tie
        return [
            self._quotation(*place)
            for place in _joined([self._whole(each) for score, each in ranking.scored[:most] if score >= least])
        ]

    def _markers(self, text: str) -> tuple[Marker, ...]:
        """Find the markers of a sentence, but for brackets that are text of a passage."""
        if not (markers := read_markers(text)):
            return ()
        passages = [self._hits[hit].passage.text for hit in self._shown]
        return tuple(each for each in markers if not is_text(text, each, passages))

    async def _ranking(self) -> Ranking:
        """Order the likeliest sentences; in one answer more than one sentence may ask for it."""
        if self._ranked is None:
            candidates = likeliest(self._evidence)
            cosines = await self._cosines(self._question, [self._evidence.under_headings(each) for each in candidates])
            ratings = await self._ratings([self._evidence.in_context(each) for each in candidates])
            if ratings is None:
                self._ranked = by_words(self._evidence, self._policy, candidates, cosines)
            else:
                extra = self._policy.polar_extra if self._is_polar else 0.0
                self._ranked = by_ratings(self._evidence, self._policy.rated_fit + extra, candidates, cosines, ratings)
        return self._ranked

    async def _ratings(self, texts: list[str]) -> list[float] | None:
        return await self._rate(self._question, texts) if self._rate is not None and texts else None

    async def _weigh(self, text: str, markers: tuple[Marker, ...], own: tuple[int, ...], focused: bool) -> Finding:
        stated = claim_text(text, markers)
        yes_no, said = split_yes_no(stated) if self._is_polar else (None, stated)
        claim = terms(said)
        found = self._evidence.support(claim, self._shown) if claim.words else []
        status, kept = await self._grade(claim, stated, found)
        if engine_abstains(text) and not (kept and status == "supported" and claim.negations and not kept[0].missing):
            return Finding("abstention", text, markers=markers)
        if yes_no and not claim.words:
            return self._bare_yes_no(yes_no, text, markers)
        if not yes_no and not is_code(text) and says_nothing(text, claim, self._question, self._evidence.question):
            # A line that only lists sources has nothing to show once its markers are gone.
            return Finding("filler", "" if markers and not claim.words else text, markers=markers)
        if status != "unsupported" and not focused and not await self._is_answer(said, claim, kept):
            status = "unsupported"
        if status != "unsupported" and yes_no and not self._confirms(yes_no, kept[0]):
            text = _without_yes_no(text)
            markers = self._markers(text)
        return self._cite(text, markers, own, status, kept, found)

    async def _grade(self, claim: Terms, said: str, found: Sequence[Support]) -> tuple[Status, list[Support]]:
        """Return the sentence's status and the passages that give it, the best first."""
        sound = [each for each in found if not each.missing and not each.contradicted]
        if self._restates:
            restated = [each for each in sound if each.share >= self._policy.restated_share]
            return ("supported", restated) if restated else ("unsupported", list(found[:1]))
        supported = [each for each in sound if each.share >= self._policy.supported_share]
        if supported:
            return "supported", supported + [each for each in sound if self._weak(each) and each not in supported]
        share, pair = self._evidence.joint(claim, found)
        if len(pair) == 2 and share >= self._policy.supported_share:
            return "weak", pair
        if sound and self._weak(sound[0]):
            (cosine,) = await self._cosines(said, [self._passage_text(sound[0].hit, sound[0].start, sound[0].end)])
            if cosine is None or cosine >= self._policy.cosine:
                return "weak", [sound[0]]
        return "unsupported", list(found[:1])

    def _weak(self, support: Support) -> bool:
        return support.share >= self._policy.weak_share

    async def _is_answer(self, said: str, claim: Terms, kept: Sequence[Support]) -> bool:
        return self._answers(said, claim, kept) and await self._is_rated_an_answer(said, kept)

    def _answers(self, said: str, claim: Terms, kept: Sequence[Support]) -> bool:
        """Tell whether a supported sentence is an answer: of the kind asked for, from a place about the question."""
        suits = self._evidence.asked.suits(said, claim)
        if suits <= -1.0 or not (is_code(said) or self._adds(claim, kept)):
            return False
        if suits <= 0.0 and self._evidence.asked.kind and self._says_again(said, claim, kept):
            return False
        for each in kept:
            fit = self._evidence.focus(each.hit, each.start, each.end)
            behind = self._evidence.behind_best(each.hit, each.start, each.end)
            if behind <= self._policy.focus_gap and reaches(fit, self._policy.focus, self._policy.focus_words):
                return True
        return False

    async def _is_rated_an_answer(self, said: str, kept: Sequence[Support]) -> bool:
        """Tell whether the engine, where it rates texts, takes its own words for an answer, from the best place."""
        ratings = await self._ratings([said])
        if ratings is None:
            return True
        if ratings[0] < self._policy.rated_words:
            return False
        scored = (await self._ranking()).scored
        best = scored[0][1] if scored else None
        return best is not None and any(
            each.hit == best.hit and each.start < best.end and best.start < each.end for each in kept
        )

    def _adds(self, claim: Terms, kept: Sequence[Support]) -> bool:
        """Tell whether what a sentence adds to the question is from the passages: the question said again always is."""
        new = frozenset(claim.words) - self._evidence.question.vocabulary
        held = frozenset().union(*(each.covered for each in kept))
        return len(new & held) >= len(new) * _NEW_SHARE

    def _says_again(self, said: str, claim: Terms, kept: Sequence[Support]) -> bool:
        """Tell whether a sentence is the question put another way: a small model likes to answer with that.

        What a document says word for word is an answer, however few of its words are new.
        """
        words = frozenset(claim.words)
        if len(words - self._evidence.question.vocabulary) > len(words) * _AGAIN_SHARE:
            return False
        sentence = " ".join(said.split()).rstrip(".")
        return not any(sentence in " ".join(self._hits[each.hit].passage.text.split()) for each in kept)

    async def _cosines(self, text: str, texts: list[str]) -> list[float | None]:
        """Return the cosine of `text` to each, None where no embedder answers: the words then decide alone."""
        if self._similarity is None or not texts:
            return [None] * len(texts)
        try:
            return list(await self._similarity(text, texts))
        except RetrievalError:
            return [None] * len(texts)

    def _bare_yes_no(self, yes_no: Literal["yes", "no"], text: str, markers: tuple[Marker, ...]) -> Finding:
        """Keep a lone "Yes" only where one place says all that was asked, a lone "No" only where it denies it."""
        found = self._evidence.support(self._evidence.question, self._shown)
        for each in found:
            if not each.missing and each.share >= self._policy.polar_share and each.contradicted == (yes_no == "no"):
                return self._cite(text, markers, (), "weak", [each], found)
        return self._cite(text, markers, (), "unsupported", found[:1], found)

    def _confirms(self, yes_no: Literal["yes", "no"], support: Support) -> bool:
        """Tell whether the place that supports the rest of the sentence also bears out its "Yes" or "No"."""
        reading = self._evidence.readings[support.hit]
        place = [
            each
            for span, each in zip(reading.spans, reading.sentences, strict=True)
            if span[0] < support.end and support.start < span[1]
        ]
        question = self._evidence.question
        denied = contradicts(question, place)
        differs = bool(question.hard - reading.vocabulary)
        return (denied or differs) if yes_no == "no" else not denied and not differs

    def _cite(
        self,
        text: str,
        markers: tuple[Marker, ...],
        own: Sequence[int],
        status: Status,
        kept: Sequence[Support],
        found: Sequence[Support],
    ) -> Finding:
        """Choose what is cited: the engine's own choice among the passages that support the sentence, or the best."""
        by_hit = {each.hit: each for each in found} | {each.hit: each for each in kept}
        if status == "unsupported":
            cited = [hit for hit in own if self._policy.unsupported == "mark"]
        else:
            able = self._best_first(kept)
            joint = status == "weak" and len(able) == 2
            cited = able if joint else [hit for hit in own if hit in able] or able[:1]
        cited = cited[: self._policy.max_citations]
        shown = {
            index: tuple(dict.fromkeys(number - 1 for number in marker.numbers if number - 1 in cited))
            for index, marker in enumerate(markers)
        }
        in_place = {hit for hits in shown.values() for hit in hits}
        return Finding(
            kind="claim",
            text=text,
            status=status,
            share=kept[0].share if kept and status != "unsupported" else 0.0,
            cited=tuple(cited),
            shown=shown,
            added=tuple(hit for hit in cited if hit not in in_place),
            markers=markers,
            supports=by_hit,
        )

    def _whole(self, candidate: Candidate) -> _Place:
        """Widen a sentence to what it cannot be understood without: a list after its colon, what "it" stands for."""
        reading = self._evidence.readings[candidate.hit]
        texts = [self._passage_text(candidate.hit, *span) for span in reading.spans]
        first = last = candidate.place
        while (
            first > max(0, candidate.place - _FARTHEST_BACK)
            and _leans(texts[first])
            and not texts[first - 1].startswith("#")
        ):
            first -= 1
        if first and is_code(texts[first]) and texts[first - 1].endswith(":"):
            first -= 1
        if texts[last].endswith(":") and last + 1 < len(texts):
            last += 1
            while (
                last + 1 < len(texts)
                and is_item(texts[last])
                and is_item(texts[last + 1])
                and last - first < _LONGEST_LIST
            ):
                last += 1
        return candidate.hit, first, last

    def _best_first(self, kept: Sequence[Support]) -> list[int]:
        """Order hits that support a sentence: of those that do so about equally, the one that answers the question."""

        def order(each: Support) -> tuple[bool, float]:
            return each.share < kept[0].share - _SAME_SHARE, self._evidence.behind_best(each.hit, each.start, each.end)

        return [each.hit for each in sorted(kept, key=order)]

    def _quotation(self, hit: int, first: int, last: int) -> Finding:
        """Make sentences of a passage a sentence of the answer; marks of the passage's own sources are not ours."""
        reading = self._evidence.readings[hit]
        start, end = reading.spans[first][0], reading.spans[last][1]
        text = self._readable(hit, first, last)
        return Finding(
            kind="claim",
            text=text,
            markers=self._markers(text),
            status="supported",
            share=1.0,
            cited=(hit,),
            added=(hit,),
            supports={hit: Support(hit, 1.0, start, end, frozenset())},
        )

    def _readable(self, hit: int, first: int, last: int) -> str:
        """Return a quote as a sentence of an answer: without its list mark, a table's cells named by their heads."""
        reading = self._evidence.readings[hit]
        texts = [self._passage_text(hit, *span) for span in reading.spans[first : last + 1]]
        if all(text.startswith("|") for text in texts):
            return "; ".join(map(_named_cells, texts, reading.tables[first : last + 1]))
        quote = self._passage_text(hit, reading.spans[first][0], reading.spans[last][1])
        if any(is_code(text) or (is_item(text) and len(texts) > 1) for text in texts):
            return quote
        return claim_text(" ".join(quote.split()), ())

    def _passage_text(self, hit: int, start: int, end: int) -> str:
        return self._hits[hit].passage.text[start:end]


def _without_yes_no(text: str) -> str:
    _, rest = split_yes_no(text)
    return rest[:1].upper() + rest[1:]


def _named_cells(row: str, head: str) -> str:
    """Write a table's row as text, each cell after what the table's head calls it."""
    named = zip_longest(cells(head) if head else (), cells(" ".join(row.split())), fillvalue="")
    return ", ".join(f"{name}: {cell}" if name else cell for name, cell in named if cell)


def _leans(text: str) -> bool:
    """Tell whether a sentence points back within its first three words: "Use it as", "This means", not "All that"."""
    words = [word.lower().strip(",") for word in text.split(maxsplit=3)[:3]]
    return any(word in _PRONOUNS and (word != "that" or at == 0) for at, word in enumerate(words))


def _joined(places: Sequence[_Place]) -> list[_Place]:
    """Make one place of those that touch."""
    joined: list[_Place] = []
    for hit, first, last in places:
        for at, (other, start, end) in enumerate(joined):
            if hit == other and start <= last + 1 and first <= end + 1:
                joined[at] = hit, min(first, start), max(last, end)
                break
        else:
            joined.append((hit, first, last))
    return joined
