"""Turns what an engine writes into what may be said: every sentence checked against the passages, cited or withheld.

The main rule: a sentence leaves only when a passage supports it, with the passage's number behind it and the passage's
own words as the quote. What leaves depends on the text alone, never on how the stream was cut.

    checker = AnswerChecker(question, hits, policy, similarity=similarity)
    async for text in stream:
        send(await checker.feed(text))
    send(await checker.finish())
    checker.citations, checker.verdict
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from retrieval.abstention import ABSTENTION_TEXT, CheckPolicy, Relevance, relevance
from retrieval.documents import Hit, Passage
from retrieval.judging import Finding, Judge, Rate, Similarity, Status
from retrieval.links import LinkFilter
from retrieval.markers import claim_text, is_code, place
from retrieval.sentences import sentence_ends

__all__ = [
    "AnswerChecker",
    "CheckPolicy",
    "Citation",
    "Rate",
    "Relevance",
    "Similarity",
    "Verdict",
    "best_sentences",
    "relevance",
]

_MARK = "\ue000"
"""Stands for a mark while the text around it is looked at: a character that no text has."""

Reason = Literal[
    "none", "nothing_relevant", "unsupported_answer", "engine_abstained", "empty_answer", "engine_unavailable"
]
Fallback = Literal["extract", "abstain", "keep"]


@dataclass(frozen=True, slots=True)
class Citation:
    """A link from a span of the answer to the words of a passage it rests on.

    All offsets count characters: `answer_*` and `marker_*` in the final answer, `source_*` in the document's source
    text, so that `quote == source[source_start:source_end]`. A citation without a marker of its own (of a code block,
    or in an answer that was not rewritten) has `marker_start == marker_end`.
    """

    n: int
    answer_start: int
    answer_end: int
    marker_start: int
    marker_end: int
    passage: Passage
    source_start: int
    source_end: int
    quote: str
    score: float
    """The passage's score in the search."""
    status: Status
    support: float
    """The share of the sentence that the passage supports, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the answer and why; `support` is the mean over its kept sentences."""

    status: Literal["answered", "replaced", "abstained"]
    reason: Reason = "none"
    support: float = 0.0
    dropped_sentences: int = 0
    unsupported: tuple[tuple[int, int], ...] = ()
    """Spans of the final answer that no passage supports, where such sentences are kept."""
    invented_numbers: tuple[int, ...] = ()
    """Markers of the engine that name no passage, by number."""

    @property
    def label(self) -> str:
        """`answered`, `replaced:unsupported_answer`, `abstained:engine_abstained` and so on."""
        return self.status if self.reason == "none" else f"{self.status}:{self.reason}"


@dataclass(slots=True)
class _Held:
    """A sentence that waits for one that is supported: a pleasantry, a heading, or an unsupported one to be marked."""

    gap: str
    finding: Finding


def plain_marker(n: int, _passage: Passage) -> str:
    """Write a marker as `[n]`."""
    return f"[{n}]"


async def best_sentences(
    question: str,
    hits: Sequence[Hit],
    policy: CheckPolicy,
    similarity: Similarity | None = None,
    rate: Rate | None = None,
) -> list[tuple[Hit, str]]:
    """Find what answers a question best: a few hits with the sentences as they would be quoted from them.

    Empty when no sentence is about what is asked.
    """
    found: dict[int, list[str]] = {}
    for each in await Judge(question, hits, policy, similarity, rate=rate).extract():
        found.setdefault(each.cited[0], []).append(each.text)
    return [(hits[hit], "\n".join(texts)) for hit, texts in found.items()]


class AnswerChecker:
    """Checks one answer as it streams.

    With `check="sentence"` a sentence is held until it is complete and has been checked; numbers count passages in the
    order of their first citation. With `check="end"` the text passes untouched, numbers are the engine's own (the n-th
    passage it was given), and citations and verdict are there after `finish()`. `marker` writes a marker; any text
    will do, such as a Markdown link. `similarity(text, texts)` returns cosines; without it words alone decide.
    """

    def __init__(
        self,
        question: str,
        hits: Sequence[Hit],
        policy: CheckPolicy | None = None,
        *,
        check: Literal["sentence", "end"] = "sentence",
        fallback: Fallback | None = None,
        abstention: str = ABSTENTION_TEXT,
        similarity: Similarity | None = None,
        rate: Rate | None = None,
        marker: Callable[[int, Passage], str] = plain_marker,
        shown: int | None = None,
        links: LinkFilter | None = None,
    ) -> None:
        """`fallback` and `abstention` say what takes the place of an answer without a supported sentence.

        `shown` says that the engine was given only the best sentences, of so many of the hits, the first ones. `links`
        takes links and images out of what is written, whatever it is taken from.
        """
        self.citations: list[Citation] = []
        self.verdict = Verdict("answered")
        self._hits = hits
        self._policy = policy or CheckPolicy()
        self._fallback = fallback or self._policy.fallback
        self._abstention = abstention
        self._rewrites = check == "sentence"
        self._marker = marker
        self._links = links
        self._judge = Judge(question, hits, self._policy, similarity, shown=shown, rate=rate)
        self._buffer = ""
        self._scan_at = 0
        self._length = 0  # Characters handed out, or in "end" mode checked.
        self._gap = ""  # White space before what comes next.
        self._held: list[_Held] = []
        self._numbers: dict[int, int] = {}
        self._told: set[str] = set()
        self._shares: list[float] = []
        self._dropped = 0
        self._said: list[Finding] = []  # The engine's own abstentions.
        self._unsupported: list[tuple[int, int]] = []
        self._invented: list[int] = []

    async def feed(self, text: str) -> str:
        """Take what the engine wrote next; return what may be sent now, possibly nothing."""
        if not self._rewrites:
            text = self._links.feed(text) if self._links else text
            self._buffer += text
            return text
        self._buffer += text
        # A long sentence is looked at again only when it has grown by a part, to stay linear in its length.
        if len(self._buffer) < self._scan_at:
            return ""
        checked = await self._check(final=False)
        self._scan_at = len(self._buffer) + len(self._buffer) // 64
        return checked

    async def finish(self) -> str:
        """Take the end of the engine's text; return the rest of the answer, or what takes its place."""
        rest = self._links.finish() if self._links and not self._rewrites else ""
        self._buffer += rest
        checked = await self._check(final=True)
        if self._shares or not self._rewrites:
            abstained = self._said and not self._shares
            self._conclude("abstained" if abstained else "answered", self._reason())
            return rest + checked
        return checked + await self._replace()

    async def _check(self, *, final: bool) -> str:
        ends = sentence_ends(self._buffer, final)
        start, out = 0, []
        for end in ends:
            out.append(await self._take(self._buffer[start:end]))
            start = end
        self._buffer = self._buffer[start:]
        return "".join(out)

    async def _take(self, text: str) -> str:
        """Check one sentence, with the white space before it."""
        body = text.lstrip()
        gap = text[: len(text) - len(body)]
        finding = await self._judge.judge(body, focused=bool(self._shares))
        self._invented += finding.invented
        if not self._rewrites:
            self._observe(finding, len(gap))
            return ""
        if self._is_said_again(finding):
            return ""
        self._gap = _stronger(self._gap, gap)
        if self._may_go(finding):
            return self._release(finding)
        if finding.kind == "abstention":
            self._said.append(finding)
        if finding.kind != "claim":
            self._hold(finding)
            return ""
        if self._policy.unsupported == "drop":
            self._dropped += 1
        if self._policy.unsupported == "mark" or self._fallback == "keep":
            self._hold(finding)
        return ""

    def _is_said_again(self, finding: Finding) -> bool:
        """Tell whether a sentence was there before, word for word: a small model in a loop adds nothing."""
        if finding.kind != "claim" or is_code(finding.text):
            return False
        plain = " ".join(claim_text(finding.text, finding.markers).split())
        if plain in self._told:
            return True
        self._told.add(plain)
        return False

    def _may_go(self, finding: Finding) -> bool:
        """Tell whether a sentence can be sent now; what answers nothing waits for a supported sentence to go with."""
        if finding.kind == "claim" and finding.status != "unsupported":
            return True
        if finding.kind == "claim":
            return self._policy.unsupported == "mark" and (bool(self._shares) or self._fallback == "keep")
        return finding.kind == "abstention" and bool(self._shares)

    def _hold(self, finding: Finding) -> None:
        if not finding.text:
            return
        if finding.text.startswith("#"):
            # The heading of a section of which nothing was left.
            while self._held and self._held[-1].finding.text.startswith("#"):
                self._gap = _stronger(self._held.pop().gap, self._gap)
        self._held.append(_Held(self._gap, finding))
        self._gap = ""

    def _release(self, finding: Finding) -> str:
        """Write the sentences that were waiting, then this one."""
        waiting = [held for held in self._held if held.finding.kind != "claim" or self._policy.unsupported == "mark"]
        out = [self._write(held.gap, held.finding) for held in waiting]
        self._held.clear()
        out.append(self._write(self._gap, finding))
        self._gap = ""
        return "".join(out)

    def _write(self, gap: str, finding: Finding) -> str:
        """Render one sentence and note its citations."""
        out = gap if self._length else ""
        start = at = self._length + len(out)
        spots: list[tuple[int, int, int]] = []
        parts = (
            [finding.text]
            if is_code(finding.text)
            else place(finding.text, finding.markers, finding.shown, finding.added)
        )
        for part in self._without_links(parts, at_line_start=not start or "\n" in out):
            written = part
            if isinstance(part, int):
                number = self._numbers.setdefault(part, len(self._numbers) + 1)
                written = self._marker(number, self._hits[part].passage)
                spots.append((part, at, at + len(written)))
            out += str(written)
            at += len(str(written))
        self._length = at
        if is_code(finding.text):
            for hit in finding.cited:
                self._numbers.setdefault(hit, len(self._numbers) + 1)
            spots = [(hit, at, at) for hit in finding.cited]
        self._note(finding, start, at, [(hit, self._numbers[hit], left, right) for hit, left, right in spots])
        return out

    def _without_links(self, parts: Sequence[str | int], *, at_line_start: bool) -> Sequence[str | int]:
        """Filter the text around the marks: only now is it as it will be read."""
        if self._links is None:
            return parts
        text = "".join([_MARK if isinstance(part, int) else part.replace(_MARK, "") for part in parts])
        if (kept := self._links.whole(text, at_line_start=at_line_start)) == text:
            return parts
        marks = [part for part in parts if isinstance(part, int)]
        if kept.count(_MARK) != len(marks):  # One stood inside of what was taken out.
            return [kept.replace(_MARK, ""), *marks]
        texts = kept.split(_MARK)
        return [texts[0], *(part for pair in zip(marks, texts[1:], strict=True) for part in pair)]

    def _note(self, finding: Finding, start: int, end: int, spots: Sequence[tuple[int, int, int, int]]) -> None:
        """Note the citations of a sentence at `start:end`; a spot is hit, number, and the marker's span."""
        if finding.kind == "claim" and finding.status != "unsupported":
            self._shares.append(finding.share)
        elif finding.kind == "claim":
            self._unsupported.append((start, end))
        for hit, n, left, right in spots:
            support = finding.supports[hit]
            passage = self._hits[hit].passage
            self.citations.append(
                Citation(
                    n=n,
                    answer_start=start,
                    answer_end=end,
                    marker_start=left,
                    marker_end=right,
                    passage=passage,
                    source_start=passage.start + support.start,
                    source_end=passage.start + support.end,
                    quote=passage.text[support.start : support.end],
                    score=self._hits[hit].score,
                    status=finding.status if hit in finding.cited else "unsupported",
                    support=support.share,
                )
            )

    def _observe(self, finding: Finding, gap: int) -> None:
        """Note the citations of a sentence that was sent as it is."""
        start = self._length + gap
        self._length = start + len(finding.written)
        spots: list[tuple[int, int, int, int]] = []
        for marker in finding.written_markers:
            for number in marker.numbers:
                if number - 1 in finding.supports and number - 1 not in {hit for hit, *_ in spots}:
                    spots.append((number - 1, number, start + marker.start, start + marker.end))
        end = self._length
        marked = {hit for hit, *_ in spots}
        spots += [(hit, hit + 1, end, end) for hit in finding.cited if hit not in marked]
        if finding.kind == "abstention":
            self._said.append(finding)
        self._note(finding, start, end, spots)

    async def _replace(self) -> str:
        """Answer in place of an engine that said nothing supported."""
        reason = self._reason()
        if self._fallback == "keep" and self._held:
            held, self._held = self._held, []
            kept = "".join(self._write(each.gap, each.finding) for each in held)
            self._dropped = 0
            self._conclude("answered", reason)
            return kept
        if reason == "engine_abstained":
            self._conclude("abstained", reason)
            self._held.clear()
            return " ".join(self._write("", each) for each in self._said)
        extracts = await self._judge.extract() if self._fallback == "extract" else []
        self._held.clear()
        if not extracts:
            self._conclude("abstained", reason)
            return self._abstention
        replacement = "".join(self._write("\n\n" if is_code(each.text) else " ", each) for each in extracts)
        self._conclude("replaced", reason)
        return replacement

    def _reason(self) -> Reason:
        if self._shares:
            return "none"
        if self._said:
            return "engine_abstained"
        return "unsupported_answer" if self._dropped or self._unsupported or self._held else "empty_answer"

    def _conclude(self, status: Literal["answered", "replaced", "abstained"], reason: Reason) -> None:
        self.verdict = Verdict(
            status=status,
            reason=reason,
            support=sum(self._shares) / len(self._shares) if self._shares else 0.0,
            dropped_sentences=self._dropped,
            unsupported=tuple(self._unsupported),
            invented_numbers=tuple(dict.fromkeys(self._invented)),
        )


def _stronger(one: str, other: str) -> str:
    """Return the white space that separates more, the later of equals."""
    return one if one.count("\n") > other.count("\n") or not other else other
