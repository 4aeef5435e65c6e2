"""Labels: what somebody who can know states as true of an answer, whole: class, right answer, relevant passages."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Self

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, labels
from app.errors import InvalidRequest
from app.feedback.calls import Call, Row, Speaker, call, callers_key, canonical_id, latest_word_at
from app.feedback.feedback import amendment
from app.feedback.ledger import Ledger, Revision, Written
from app.feedback.words import Words

_WORDS = ("comment", "answer")

LabelSource = Literal["reviewer", "application", "review_queue"]


class Stated(msgspec.Struct, frozen=True, kw_only=True):
    """A label as somebody states it; it says at least one of class, answer and passages."""

    prediction_id: str
    source: LabelSource = "reviewer"
    class_name: str | None = None
    answer: str | None = None
    passages: Sequence[str] | None = None
    """The ids of the relevant passages, all of them; empty where none is."""
    comment: str | None = None
    policy: str | None = None
    """Why this prediction was labelled and not another: the name of a way of sampling."""
    sampling_probability: float | None = None
    """How likely that way was to choose it, above 0 and at most 1."""
    withdrawn: bool = False
    """Says that the author takes back whatever was stated before this."""
    said_at: int | None = None
    """When it was stated, in milliseconds since 1970; by default it is the latest word when it arrives."""
    idempotency_key: str | None = None


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """A label as it is on record; times are milliseconds since 1970."""

    id: str
    revision: int
    tenant: str
    prediction_id: str
    source: LabelSource
    author: str
    class_name: str | None
    answer: str | None
    passages: list[str] | None
    comment: str | None
    policy: str | None
    sampling_probability: float | None
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
                "class_name": row["class"],
                "passages": msgspec.json.decode(row["passages"]) if row["passages"] else None,
                "said_at": latest_word_at(row),
                "idempotency_key": callers_key(row["idempotency_key"]),
            }
        )


class LabelLog:
    """The labels of all tenants; use it in an `async with` block.

    Args:
        database: shared by all replicas.
        words: keeps and shows what is stated in words; by default all of it, as it was stated.
        capacity: calls that may wait for the database at a time.
    """

    def __init__(self, database: Database, *, words: Words | None = None, capacity: int = 4096) -> None:
        self._words = words or Words()
        self._ledger = Ledger(
            database,
            labels,
            noun="label",
            identity=("prediction_id", "author"),
            words_in=_WORDS,
            words=self._words,
            capacity=capacity,
        )

    async def __aenter__(self) -> Self:
        await self._ledger.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._ledger.__aexit__()

    async def state(self, speaker: Speaker, stated: Stated) -> Written:
        """Take a label in: it replaces, whole, what its author stated of the prediction before.

        Raises:
            Conflict: the idempotency key came with another content before.
            InvalidRequest: it states nothing.
            Overloaded: too many wait already.
            Unavailable: the database does not answer.
        """
        return await self._ledger.write(await self._call(speaker, stated))

    async def state_in(self, connection: AsyncConnection, stated: Sequence[tuple[Speaker, Stated]]) -> list[Written]:
        """Take labels in, in a transaction of the caller's and so with what else it writes; raises as `state` does.

        Whatever else the transaction has to wait for, it should have: no label is written anywhere until it ends.
        """
        return await self._ledger.write_in(connection, [await self._call(speaker, each) for speaker, each in stated])

    async def _call(self, speaker: Speaker, stated: Stated) -> Call:
        content = {name: getattr(stated, name) for name in _WORDS}
        kept = await self._words.kept(speaker.tenant, content, _WORDS)
        if stated.answer is not None and kept["answer"] is None and stated.class_name is stated.passages is None:
            raise InvalidRequest("`answer`: no answers are kept here: state a class or the passages.", param="answer")
        return _call(speaker, msgspec.structs.replace(stated, **kept))

    async def resample_in(
        self, connection: AsyncConnection, tenant: str, label_id: str, *, policy: str, sampling_probability: float
    ) -> Written:
        """Correct how a prediction came to be labelled, and nothing else of its label; raises NotFound."""
        row = await self._ledger.get(tenant, label_id)
        speaker = Speaker(tenant=tenant, key_id=row["key_id"], user=row["author"])
        says = {"policy": policy, "sampling_probability": sampling_probability}
        made = call(speaker, self._ledger.identity_of(row), says, is_whole=False, slot=row["slot"])
        (written,) = await self._ledger.write_in(connection, [made])
        return written

    async def withdraw(self, speaker: Speaker, label_id: str, *, said_at: int | None = None) -> Written:
        """Take a label back: it is nobody's truth any more, and stays on record.

        Raises:
            NotFound: the tenant has no such label.
            Forbidden: it is another author's.
        """
        row = await self._ledger.get(speaker.tenant, label_id)
        identity = self._ledger.identity_of(row)
        return await self._ledger.write(amendment(speaker, row, identity, {"withdrawn": True}, said_at))

    async def get(self, tenant: str, label_id: str) -> Label:
        """What an author states now; raises NotFound if the tenant has no such label."""
        return Label.of(await self._ledger.get(tenant, label_id))

    async def some(self, tenant: str, ids: Collection[str]) -> dict[str, Label]:
        """What the authors of these labels state now, by id; those that the tenant has not are left out."""
        query = self._ledger.current(tenant).where(labels.c.id.in_(ids))
        return {row["id"]: Label.of(row) for row in await self._ledger.read(query)} if ids else {}

    async def history(self, tenant: str, label_id: str) -> list[Revision]:
        """Every call about a label, in the order of arrival."""
        return [
            msgspec.structs.replace(revision, said=_said(revision.said))
            for revision in await self._ledger.history(tenant, label_id)
        ]

    async def find(
        self,
        tenant: str,
        *,
        prediction_id: str | None = None,
        source: LabelSource | None = None,
        since: int | None = None,
        withdrawn: bool = False,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Label]:
        """List a tenant's labels, newest first, from the id `before` on backwards.

        `since` leaves out what has not changed since then; `withdrawn` includes what was withdrawn.
        """
        query = self._ledger.current(tenant)
        if prediction_id is not None:
            query = query.where(labels.c.prediction_id == prediction_id)
        if source is not None:
            query = query.where(labels.c.source == source)
        if since is not None:
            query = query.where(labels.c.at >= since)
        if not withdrawn:
            query = query.where(labels.c.withdrawn.is_(False))
        return [Label.of(row) for row in await self._ledger.page(query, limit=limit, before=before)]

    async def known(self, tenant: str, ids: Collection[str]) -> dict[str, Label]:
        """Find those there are of these ids, as they hold now; also those that were withdrawn."""
        found: dict[str, Label] = {}
        wanted = sorted(ids)
        for at in range(0, len(wanted), 500):
            query = self._ledger.current(tenant).where(labels.c.id.in_(wanted[at : at + 500]))
            found |= {row["id"]: Label.of(row) for row in await self._ledger.read(query)}
        return found

    async def after(self, number: int, *, limit: int = 1_000) -> list[tuple[int, Label]]:
        """What was written for any tenant since the row of that number, as `FeedbackLog.after` gives it."""
        return [(at, Label.of(row)) for at, row in await self._ledger.after(number, limit=limit)]


def _said(columns: Mapping[str, Any]) -> dict[str, Any]:
    """What columns hold, as it was said."""
    said = dict(columns)
    if said.get("passages") is not None:
        said["passages"] = msgspec.json.decode(said["passages"])
    return said


def _call(speaker: Speaker, stated: Stated) -> Call:
    """The call that states a label; raises InvalidRequest if it states nothing."""
    content = {"class": stated.class_name, "answer": stated.answer, "passages": stated.passages}
    says = [name for name, value in content.items() if value is not None]
    if stated.withdrawn and says:
        raise InvalidRequest(f"`{says[0]}`: what withdraws a label states nothing else.", param=says[0])
    if not stated.withdrawn and not says:
        raise InvalidRequest("`class`: state a class, an answer or the relevant passages.", param="class")
    columns: dict[str, Any] = {"source": stated.source, "withdrawn": True}
    if not stated.withdrawn:
        columns = {
            **content,
            "passages": None if stated.passages is None else msgspec.json.encode(stated.passages).decode(),
            "comment": stated.comment,
            "policy": stated.policy,
            "sampling_probability": stated.sampling_probability,
            "source": stated.source,
            "withdrawn": False,
        }
    return call(
        speaker,
        {"prediction_id": canonical_id(stated.prediction_id), "author": speaker.author},
        columns,
        said_at=stated.said_at,
        idempotency_key=stated.idempotency_key,
        is_whole=not stated.withdrawn,
    )
