"""The rows that a build has found so far: their facts in memory, what they say in a file without a name.

The main rule: nothing of it outlives the process, however that ends.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from app.datasets.examples import Example
from app.datasets.recipes import MAX_ROWS, Split
from app.errors import InvalidRequest


class Fact(msgspec.Struct, frozen=True, gc=False):
    """A row, but for what it says."""

    digest: str
    content_digest: str
    prediction_id: str | None
    label_id: str | None
    split: Split
    session: str
    conversation: str | None
    subject: str | None
    class_name: str | None
    at: int
    size: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a step of a build kept, and what it dropped and why."""

    name: str
    kept: int
    dropped: dict[str, int] = {}
    noted: dict[str, int] = {}
    """What was counted besides."""


class _Asking(msgspec.Struct):
    question: str


_asking = msgspec.json.Decoder(_Asking).decode


class Candidates:
    """Rows that may become a version's; close it when they have."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.dropped: Counter[str] = Counter()
        self._end = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed by whoever builds.

    def close(self) -> None:
        """Forget everything; again is nothing."""
        self._file.close()

    def add(self, examples: Iterable[Example]) -> None:
        """Take rows in; raises InvalidRequest where there are too many."""
        for example in examples:
            if len(self.facts) >= MAX_ROWS:
                raise InvalidRequest(
                    f"There are more than {MAX_ROWS:,} rows, which is all that a dataset may have: narrow the "
                    "recipe's `query`, or split the files.",
                    param="query",
                )
            written = example.content.encode()
            self._file.seek(self._end)
            self._file.write(written)
            fact = Fact(
                example.digest,
                example.content_digest,
                example.prediction_id,
                example.label_id,
                example.split,
                example.session,
                example.conversation,
                example.subject,
                example.class_name,
                self._end,
                len(written),
            )
            self.facts.append(fact)
            self._end += len(written)

    def content(self, fact: Fact) -> str:
        """What a row says."""
        self._file.seek(fact.at)
        return self._file.read(fact.size).decode()

    def question(self, fact: Fact) -> str:
        """What is asked in a row."""
        question: str = _asking(self.content(fact)).question
        return question

    def keep(
        self, name: str, kept: Sequence[Fact], dropped: Mapping[str, int], *, noted: Mapping[str, int] | None = None
    ) -> Step:
        """Go on with these rows alone, and say so."""
        self.facts = list(kept)
        return Step(name=name, kept=len(kept), dropped=dict(sorted(dropped.items())), noted=dict(noted or {}))
