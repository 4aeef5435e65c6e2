"""Feedback: what somebody thinks of an answer, or of a whole conversation."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import msgspec
from sqlalchemy import func, select

from app.database import Database, feedback
from app.errors import Forbidden, InvalidRequest
from app.feedback.calls import Call, Row, Speaker, call, callers_key, canonical_id, latest_word_at
from app.feedback.ledger import Ledger, Revision, Written
from app.feedback.words import Words

FeedbackSource = Literal["end_user", "reviewer", "application", "judge"]

Rating = bool | float

_WORDS = ("comment", "correction", "metadata")

MAX_COUNTED = 1_000
"""Predictions that one call of `counts` may ask about."""


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """Feedback as somebody gives it."""

    prediction_id: str | None = None
    conversation: str | None = None
    source: FeedbackSource = "end_user"
    category: str | None = None
    """What is rated: each category of an author has a feedback of its own."""
    rating: Rating | None = None
    comment: str | None = None
    correction: str | None = None
    """What the answer should have been."""
    metadata: Mapping[str, Any] | None = None
    withdrawn: bool = False
    """Says that the author takes back whatever was given before this."""
    said_at: int | None = None
    """When it was said, in milliseconds since 1970; by default it is the latest word when it arrives."""
    idempotency_key: str | None = None


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """Feedback as it is on record; times are milliseconds since 1970."""

    id: str
    revision: int
    tenant: str
    prediction_id: str | None
    conversation: str | None
    source: FeedbackSource
    author: str
    category: str | None
    rating: Rating | None
    comment: str | None
    correction: str | None
    metadata: dict[str, Any] | None
    withdrawn: bool
    key_id: str
    at: int
    """When this revision arrived."""
    said_at: int
    """When the latest word of it was said."""
    idempotency_key: str | None

    @classmethod
    def of(cls, row: Row) -> Self:
        """Read a revision."""
        same = {name: row[name] for name in cls.__struct_fields__ if name in row}
        return cls(
            **same
            | {
                "rating": _rating(row["rating"], row["rating_type"]),
                "metadata": msgspec.json.decode(row["metadata"]) if row["metadata"] else None,
                "said_at": latest_word_at(row),
                "idempotency_key": callers_key(row["idempotency_key"]),
            }
        )


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How much feedback of one kind a prediction has: what holds now, without what was withdrawn."""

    prediction_id: str
    source: FeedbackSource
    category: str | None
    total: int
    positive: int
    """Ratings that are true."""
    negative: int
    """Ratings that are false."""
    numbers: int
    """Ratings that are numbers."""
    mean: float | None
    """Of the ratings that are numbers."""
    comments: int
    corrections: int


class FeedbackLog:
    """The feedback of all tenants; use it in an `async with` block.

    Args:
        database: shared by all replicas.
        words: keeps and shows what is said in words; by default all of it, as it was said.
        capacity: calls that may wait for the database at a time.
    """

    def __init__(self, database: Database, *, words: Words | None = None, capacity: int = 4096) -> None:
        self._words = words or Words()
        self._ledger = Ledger(
            database,
            feedback,
            noun="feedback",
            identity=("prediction_id", "conversation", "source", "author", "category"),
            words_in=_WORDS,
            words=self._words,
            capacity=capacity,
        )

    async def __aenter__(self) -> Self:
        await self._ledger.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._ledger.__aexit__()

    async def give(self, speaker: Speaker, given: Given) -> Written:
        """Take feedback in: it replaces what its author said before of the same thing, source and category.

        Raises:
            Conflict: the idempotency key came with another content before.
            InvalidRequest: it is about nothing, about two things, or says nothing.
            Overloaded: too many wait already.
            Unavailable: the database does not answer.
        """
        _check(given)
        speaker = self._words.named(speaker, given.source)
        identity = {
            "prediction_id": None if given.prediction_id is None else canonical_id(given.prediction_id),
            "conversation": given.conversation,
            "source": given.source,
            "author": speaker.author,
            "category": given.category,
        }
        says: dict[str, Any] = {"withdrawn": True}
        if not given.withdrawn:
            content = {name: getattr(given, name) for name in ("rating", "comment", "correction", "metadata")}
            says = _columns(await self._words.kept(speaker.tenant, content, _WORDS)) | {"withdrawn": False}
        made = call(
            speaker,
            identity,
            says,
            said_at=given.said_at,
            idempotency_key=given.idempotency_key,
            is_whole=not given.withdrawn,
        )
        return await self._ledger.write(made)

    async def change(
        self, speaker: Speaker, feedback_id: str, changes: Mapping[str, Any], *, said_at: int | None = None
    ) -> Written:
        """Change rating, comment, correction or metadata, as far as `changes` names them; null takes one back.

        Raises:
            NotFound: the tenant has no such feedback.
            Forbidden: it is another author's.
        """
        kept = await self._words.kept(speaker.tenant, changes, _WORDS)
        return await self._say(speaker, feedback_id, _columns(kept), said_at)

    async def withdraw(self, speaker: Speaker, feedback_id: str, *, said_at: int | None = None) -> Written:
        """Take feedback back: it counts no more, and stays on record. Raises as `change` does."""
        return await self._say(speaker, feedback_id, {"withdrawn": True}, said_at)

    async def get(self, tenant: str, feedback_id: str) -> Feedback:
        """What an author says now; raises NotFound if the tenant has no such feedback."""
        return Feedback.of(await self._ledger.get(tenant, feedback_id))

    async def history(self, tenant: str, feedback_id: str) -> list[Revision]:
        """Every call about a feedback, in the order of arrival."""
        return [
            msgspec.structs.replace(revision, said=_said(revision.said))
            for revision in await self._ledger.history(tenant, feedback_id)
        ]

    async def find(
        self,
        tenant: str,
        *,
        prediction_id: str | None = None,
        conversation: str | None = None,
        source: FeedbackSource | None = None,
        category: str | None = None,
        since: int | None = None,
        withdrawn: bool = False,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Feedback]:
        """List a tenant's feedback, newest first, from the id `before` on backwards.

        `since` leaves out what has not changed since then; `withdrawn` includes what was withdrawn.
        """
        query = self._ledger.current(tenant)
        about = {"prediction_id": prediction_id, "conversation": conversation, "source": source, "category": category}
        for name, value in about.items():
            if value is not None:
                query = query.where(feedback.c[name] == value)
        if since is not None:
            query = query.where(feedback.c.at >= since)
        if not withdrawn:
            query = query.where(feedback.c.withdrawn.is_(False))
        return [Feedback.of(row) for row in await self._ledger.page(query, limit=limit, before=before)]

    async def counts(self, tenant: str, prediction_ids: Sequence[str]) -> list[Counts]:
        """Count what holds now about at most `MAX_COUNTED` predictions, for each source and category there is."""
        c = feedback.c
        is_number = c.rating_type == "number"
        is_word = c.rating_type == "boolean"

        def count(condition: Any) -> Any:
            return func.count().filter(condition)

        query = (
            select(
                c.prediction_id,
                c.source,
                c.category,
                func.count().label("total"),
                count(is_word & (c.rating > 0)).label("positive"),
                count(is_word & (c.rating == 0)).label("negative"),
                count(is_number).label("numbers"),
                func.avg(c.rating).filter(is_number).label("mean"),
                count(c.comment.is_not(None)).label("comments"),
                count(c.correction.is_not(None)).label("corrections"),
            )
            .where(c.tenant == tenant, c.prediction_id.in_(prediction_ids[:MAX_COUNTED]))
            .where(self._ledger.is_latest, c.withdrawn.is_(False))
            .group_by(c.prediction_id, c.source, c.category)
            .order_by(c.prediction_id, c.source, c.category)
        )
        return [Counts(**row) for row in await self._ledger.read(query)]

    async def after(self, number: int, *, limit: int = 1_000) -> list[tuple[int, Feedback]]:
        """What was written for any tenant since the row of that number, each with its own number, in order.

        Whoever asks again with the last number follows everything: no row ever appears before one that was seen.
        """
        return [(at, Feedback.of(row)) for at, row in await self._ledger.after(number, limit=limit)]

    async def is_stored(self, tenant: str, prediction_id: str) -> bool:
        """Whether a prediction of the tenant is on record in the shared database."""
        return await self._ledger.stored(tenant, prediction_id)

    async def _say(self, speaker: Speaker, feedback_id: str, says: Mapping[str, Any], said_at: int | None) -> Written:
        row = await self._ledger.get(speaker.tenant, feedback_id)
        speaker = self._words.named(speaker, row["source"])
        return await self._ledger.write(amendment(speaker, row, self._ledger.identity_of(row), says, said_at))


def amendment(
    speaker: Speaker, row: Row, identity: Mapping[str, Any], says: Mapping[str, Any], said_at: int | None
) -> Call:
    """A call about what is there; raises Forbidden if it is another author's."""
    if speaker.author != row["author"] and not speaker.is_admin:
        raise Forbidden(
            "This is another author's. Name in `author` the one you speak for, or use a key with the scope 'admin'.",
            param="author",
        )
    return call(speaker, identity, says, said_at=said_at, is_whole=False, slot=row["slot"])


def _check(given: Given) -> None:
    if (given.prediction_id is None) == (given.conversation is None):
        raise InvalidRequest(
            "`prediction_id`: feedback is about a prediction or about a conversation: give one of the two.",
            param="prediction_id",
        )
    content = {name: getattr(given, name) for name in ("rating", "comment", "correction", "metadata")}
    says = [name for name, value in content.items() if value is not None]
    if given.withdrawn and says:
        raise InvalidRequest(f"`{says[0]}`: what withdraws feedback says nothing else.", param=says[0])
    if not given.withdrawn and not says and given.category is None:
        raise InvalidRequest("`rating`: give a rating, a comment, a correction or a category.", param="rating")


def _columns(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, by the columns that hold it."""
    columns = dict(content)
    if "rating" in columns:
        rating = columns["rating"]
        columns["rating_type"] = None if rating is None else "boolean" if isinstance(rating, bool) else "number"
        columns["rating"] = None if rating is None else float(rating)
    if columns.get("metadata") is not None:
        columns["metadata"] = msgspec.json.encode(columns["metadata"], order="deterministic").decode()
    return columns


def _said(columns: Mapping[str, Any]) -> dict[str, Any]:
    """What columns hold, as it was said."""
    said = {name: value for name, value in columns.items() if name != "rating_type"}
    if "rating" in said:
        said["rating"] = _rating(said["rating"], columns["rating_type"])
    if said.get("metadata") is not None:
        said["metadata"] = msgspec.json.decode(said["metadata"])
    return said


def _rating(value: float | None, kind: str | None) -> Rating | None:
    return value if kind != "boolean" or value is None else value > 0
