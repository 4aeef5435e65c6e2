"""What every answer tells by itself, without labels: pages of rows in, sums by release and session out."""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row

from app.errors import InvalidRequest
from app.predictions.signals import covered, read_citations
from app.quality.figures import MAX_RELEASES, Figure, figure
from observability.estimates import Floats
from observability.tallies import Sample, Sessions, Tally

MAX_GUESSED = 4_000
"""Answers of a release whose signals a guess without labels looks at: chance alone then moves it by 0.008 at most."""
MAX_CONVERSATIONS = 20_000
"""Conversations whose last question is known, to tell whether the next is the same again: the latest."""

SHARES = (
    "failed",
    "abstained",
    "refused",
    "empty",
    "truncated",
    "valid",
    "regenerated",
    "citations_supported",
    "citation_coverage",
    "thumbs_up",
)
"""The figures between 0 and 1 that need no label, in the order of a report."""
_TOKENS = ("prompt_tokens", "completion_tokens")
_SECONDS = ("first_token_seconds", "total_seconds")
_QUANTILES = {"median": 0.5, "p95": 0.95}


class ReleaseTallies:
    """The sums of one release."""

    def __init__(self) -> None:
        self.answers = 0
        self.sessions = Sessions()
        self.shares = {name: Tally() for name in SHARES}
        self._means = {name: Tally() for name in _TOKENS}
        self._samples = {name: Sample() for name in _SECONDS}
        self._some = Sample(MAX_GUESSED)

    def add(self, sessions: NDArray[np.intp], rows: dict[str, list[Any]]) -> None:
        """Add closed rows, column by column."""
        finished = np.array([outcome == "finished" for outcome in rows["outcome"]])
        ended = finished | np.array([outcome in ("failed", "interrupted") for outcome in rows["outcome"]])
        self.answers += int(finished.sum())
        self.shares["failed"].add(sessions, (ended & ~finished).astype(float), ended.astype(float))
        verdicts = [verdict or "" for verdict in rows["verdict"]]
        reasons = rows["finish_reason"]
        told = finished & np.array([reason is not None for reason in reasons])
        stored = finished & np.array(rows["store"], bool)
        judged = np.array([valid is not None for valid in rows["valid"]])
        for name, is_so, counts in (
            ("abstained", _each(_is_abstained, verdicts), finished),
            ("refused", [_is_refusal(*each) for each in zip(verdicts, reasons, strict=True)], finished),
            ("empty", list(_emptiness(rows)), stored),
            ("truncated", [reason == "length" for reason in reasons], told),
            # An answer that does not fit its task is an error to the caller: it has failed, and says what it was.
            ("valid", [bool(valid) for valid in rows["valid"]], ended & judged),
        ):
            self.shares[name].add(sessions, (np.array(is_so) & counts).astype(float), counts.astype(float))
        supported, citations, covered, checked = _cited(rows, verdicts, finished)
        self.shares["citations_supported"].add(sessions, supported, citations)
        self.shares["citation_coverage"].add(sessions, covered, checked)
        self._add_numbers(sessions, rows, finished)

    def _add_numbers(self, sessions: NDArray[np.intp], rows: dict[str, list[Any]], finished: NDArray[np.bool_]) -> None:
        keys = np.array([int(id_[-12:], 16) for id_ in rows["id"]], np.uint64)
        self._some.add(keys[finished], sessions[finished], np.array(rows["row"], float)[finished])
        for name in (*_TOKENS, *_SECONDS):
            values = np.array(rows[name], float)
            known = finished & np.isfinite(values)
            if name in self._means:
                self._means[name].add(sessions[known], values[known])
            else:
                self._samples[name].add(keys[known], sessions[known], values[known])

    def some(self) -> list[int]:
        """The row numbers of a few finished answers that chance chose, or of all."""
        return [int(row) for row in self._some.values()]

    def figures(self) -> Iterator[Figure]:
        """Give every figure, also those without rows."""
        for name, tally in self.shares.items():
            yield figure(name, tally.share())
        for name, tally in self._means.items():
            yield figure(name, tally.mean(), unit="tokens")
        for name, sample in self._samples.items():
            for suffix, share in _QUANTILES.items():
                yield figure(f"{name}_{suffix}", sample.quantile(share), unit="seconds")


class Answers:
    """The sums of all releases, or of those in `only`."""

    def __init__(self, only: Collection[str] | None = None) -> None:
        self._only = only
        self.releases: dict[str, ReleaseTallies] = {}
        # Of each conversation the last question (its hash: it may be long), and the release and session of its answer.
        self._last: OrderedDict[str, tuple[int, str, int]] = OrderedDict()
        # By release the sessions of answers before, and whether each was asked for again.
        self._followed: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))

    def add(self, tenant: str, page: Sequence[Row[Any]]) -> None:
        """Add a page of closed rows, which follow those of the pages before.

        Raises:
            InvalidRequest: there are more than `MAX_RELEASES` releases.
        """
        for release, (numbers, rows) in self._by_release(tenant, page).items():
            self.releases[release].add(np.array(numbers, np.intp), rows)
        self._count_regenerated()

    def add_thumbs(self, tenant: str, page: Sequence[Row[Any]]) -> None:
        """Add a page of thumbs."""
        for release, (numbers, rows) in self._by_release(tenant, page, follow=False).items():
            up = (np.array(rows["rating"]) > 0).astype(float)
            self.releases[release].shares["thumbs_up"].add(np.array(numbers, np.intp), up)

    def finish(self) -> None:
        """Count the last answers of conversations, which nobody asked for again."""
        while self._last:
            self._forget_oldest()
        self._count_regenerated()

    def session(self, tenant: str, row: Row[Any]) -> int:
        """The number of the session an answer belongs to."""
        return self._release(row.release_name).sessions.number(session_of(tenant, row.id, row.conversation, row.user))

    def _by_release(
        self, tenant: str, page: Sequence[Row[Any]], *, follow: bool = True
    ) -> dict[str, tuple[list[int], dict[str, list[Any]]]]:
        names = page[0]._fields
        at = [names.index(name) for name in ("release_name", "id", "conversation", "user")]
        groups: dict[str, tuple[list[int], list[Row[Any]]]] = defaultdict(lambda: ([], []))
        for row in page:
            release, *whose = (row[each] for each in at)
            if self._only is None or release in self._only:
                number = self._release(release).sessions.number(session_of(tenant, *whose))
                groups[release][0].append(number)
                groups[release][1].append(row)
                if follow:
                    self._follow(tenant, row, number)
        return {
            release: (numbers, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
            for release, (numbers, rows) in groups.items()
        }

    def _follow(self, tenant: str, row: Row[Any], session: int) -> None:
        """Tell whether the answer before in the conversation was asked for again: with the same question."""
        asked = row.question if row.question_digest is None else row.question_digest
        if row.conversation is None or asked is None or row.shadow_of is not None or row.outcome != "finished":
            return
        conversation = f"{tenant}\0{row.conversation}"
        before, question = self._last.pop(conversation, None), hash(asked)
        if before is not None:
            self._regenerated(before, again=before[0] == question)
        self._last[conversation] = question, row.release_name, session
        if len(self._last) > MAX_CONVERSATIONS:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._regenerated(self._last.popitem(last=False)[1], again=False)

    def _regenerated(self, answer: tuple[int, str, int], *, again: bool) -> None:
        _, release, session = answer
        sessions, flags = self._followed[release]
        sessions.append(session)
        flags.append(float(again))

    def _count_regenerated(self) -> None:
        for release, (sessions, flags) in self._followed.items():
            self.releases[release].shares["regenerated"].add(np.array(sessions), np.array(flags))
        self._followed.clear()

    def _release(self, name: str) -> ReleaseTallies:
        found = self.releases.get(name)
        if found is None:
            if len(self.releases) == MAX_RELEASES:
                raise InvalidRequest(
                    f"`release`: the window has answers of more than {MAX_RELEASES} releases: name one release, or "
                    "choose a shorter window.",
                    param="release",
                )
            found = self.releases[name] = ReleaseTallies()
        return found


def session_of(tenant: str, id_: str, conversation: str | None, user: str | None) -> str:
    """What an answer belongs to and must not be counted twice with: a conversation, else a user, else itself."""
    if conversation is not None:
        return f"{tenant}\0c{conversation}"
    return f"{tenant}\0u{user}" if user is not None else id_


def _each(test: Any, values: Sequence[str]) -> list[bool]:
    return [test(value) for value in values]


def _is_abstained(verdict: str) -> bool:
    return verdict.startswith("abstained")


def _is_refusal(verdict: str, finish_reason: str | None) -> bool:
    """Whether the engine would not answer: it said so itself, or its filter did."""
    return verdict == "abstained:engine_abstained" or finish_reason == "content_filter"


def _emptiness(rows: dict[str, list[Any]]) -> Iterator[bool]:
    """Whether the engine gave nothing: neither text nor a call, or so little that something else was said for it."""
    for characters, has_calls, verdict in zip(
        rows["answer_characters"], rows["has_tool_calls"], rows["verdict"], strict=True
    ):
        yield (not characters and not has_calls) or (verdict or "").endswith(":empty_answer")


def _cited(
    rows: dict[str, list[Any]], verdicts: Sequence[str], finished: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats, Floats]:
    """By answer: supported citations of all, and the share of its characters that a citation covers."""
    count = len(verdicts)
    supported, citations, shares, checked = ([0.0] * count for _ in range(4))
    for at, (text, characters) in enumerate(zip(rows["citations"], rows["answer_characters"], strict=True)):
        if text is None or not finished[at]:
            continue
        found = read_citations(text)
        citations[at] = len(found)
        supported[at] = sum([each.status == "supported" for each in found])
        if characters and not _is_abstained(verdicts[at]):
            checked[at], shares[at] = 1.0, min(1.0, covered(found) / characters)
    return np.array(supported, float), np.array(citations, float), np.array(shares), np.array(checked)
