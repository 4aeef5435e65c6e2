"""Which rows ask what another dataset asks, word for word or nearly, or stand in a conversation that it has."""

from collections import Counter
from collections.abc import Sequence

from app.datasets.candidates import Candidates, Fact
from app.datasets.reading import Asked
from app.datasets.sieve import MIN_TELLING
from app.datasets.similarity import Texts, bare
from app.errors import InvalidRequest

MAX_KNOWN = 200_000
"""Different questions of other datasets that a build compares with."""


class Leaks:
    """Questions of other datasets, and rows that are compared with them: first all of those, then all of these."""

    def __init__(self) -> None:
        self.telling: dict[str, bool] = {}
        """Of each row, whether its question is long enough to be known again."""
        self._texts = Texts()
        self._known: dict[str, str] = {}
        self._sessions: dict[str, str] = {}
        self._rows: list[tuple[Fact, str]] = []

    def know(self, page: Sequence[Asked]) -> None:
        """Take questions in; raises InvalidRequest where there are too many."""
        for each in page:
            question = bare(each.question)
            if question not in self._known:
                self._known[question] = each.dataset
                self._texts.add([question])
            for session in filter(None, (each.session, each.conversation)):
                self._sessions.setdefault(session, each.dataset)
        if len(self._known) > MAX_KNOWN:
            raise InvalidRequest(
                f"Other datasets ask more than {MAX_KNOWN:,} questions, which are too many to compare with.",
                param="leakage",
            )

    def add(self, facts: Sequence[Fact], found: Candidates) -> None:
        """Take rows in."""
        for fact in facts:
            question = bare(found.question(fact))
            self._rows.append((fact, question))
            self.telling[fact.digest] = len(question) >= MIN_TELLING
            self._texts.add([question])

    def find(self, threshold: float) -> tuple[dict[str, str], Counter[str]]:
        """Give the rows that leak, by their digests, each with why; and how many there are of which dataset."""
        if not self._known:
            return {}, Counter()
        near = self._texts.near(threshold, keeping=len(self._known))[len(self._known) :]
        names = list(self._known.values())
        leaking: dict[str, str] = {}
        sets: Counter[str] = Counter()
        for (fact, question), original in zip(self._rows, near, strict=True):
            if question in self._known:
                reason, name = "leak_exact", self._known[question]
            elif session := next((each for each in (fact.session, fact.conversation) if each in self._sessions), None):
                reason, name = "leak_session", self._sessions[session]
            elif original is not None and original < len(names):
                reason, name = "leak_near", names[original]
            else:
                continue
            leaking[fact.digest] = reason
            sets[f"in {name}"] += 1
        return leaking, sets
