"""Destroys the keys of subjects of whom nothing is left that they could open.

The main rule: a key that is being used is never destroyed. Whoever seals by one looks, in the transaction that writes
what he sealed, whether it is still there, and seals again if not; and here a key goes in a transaction that no such
one runs beside, after everything written before was looked through once more.
"""

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Select, literal, or_, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, dataset_examples, feature_values, feature_views, feedback, labels, predictions
from app.feedback.words import PREDICTION
from app.privacy.envelopes import key_mark
from app.privacy.subject_keys import WrappedKey
from app.privacy.subjects import CONVERSATION

KEYS_AT_ONCE = 100
EVERY_SECONDS = 3600.0
"""From the end of one round through all keys to the next."""

MIN_AGE_SECONDS = 3600.0
"""Younger keys are left alone: they were made for something, and it would only be sealed a second time."""

_p, _f, _l, _e, _v = predictions.c, feedback.c, labels.c, dataset_examples.c, feature_values.c


class Keys(Protocol):
    """The keys of one place."""

    async def page(self, after: str, *, made_until: int, limit: int) -> list[WrappedKey]:
        """List keys made by that moment, by their ids. Raises Unavailable."""
        ...

    async def alone(self, connection: AsyncConnection) -> None:
        """Wait until no transaction writes what is sealed, and keep others from it until this one ends."""
        ...

    async def let_go(self, connection: AsyncConnection, ids: Sequence[str]) -> int:
        """Destroy keys, in a transaction that is `alone`. Raises Unavailable."""
        ...

    async def empty_log(self) -> bool:
        """Leave nothing of them on the disk; False if that has to be tried again later. Raises Unavailable."""
        ...


class UnusedKeys:
    """Goes through the keys, a page at a time, in rounds.

    Args:
        database: has what is sealed by them.
        keys: those of that database.
        clock: milliseconds since 1970.
        elsewhere: tells which of these keys have sealed something that is in another database.
    """

    def __init__(
        self,
        database: Database,
        keys: Keys,
        clock: Callable[[], int],
        *,
        elsewhere: Callable[[Sequence[str]], Awaitable[Collection[str]]] | None = None,
    ) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock
        self._elsewhere = elsewhere
        self._after = ""
        self._rest_until = 0

    async def step(self) -> bool:
        """Look through a page of keys, and destroy the unused ones; tells whether there are more.

        Raises:
            Unavailable: the database, or where the keys are, does not answer.
        """
        if self._clock() < self._rest_until:
            return False
        until = self._clock() - round(MIN_AGE_SECONDS * 1000)
        page = await self._keys.page(self._after, made_until=until, limit=KEYS_AT_ONCE)
        await self._destroy_unused(page)
        if len(page) == KEYS_AT_ONCE:
            self._after = page[-1].id
            return True
        await self._keys.empty_log()  # What stayed on the disk because somebody read the file goes with a later round.
        self._after, self._rest_until = "", self._clock() + round(EVERY_SECONDS * 1000)
        return False

    async def _destroy_unused(self, page: Sequence[WrappedKey]) -> None:
        async with self._database.reading() as connection:
            found = await _unused(connection, page)
        if found and self._elsewhere is not None:
            used = await self._elsewhere([key.id for key in found])
            found = [key for key in found if key.id not in used]
        if not found:
            return
        async with self._database.writing() as connection:
            await self._keys.alone(connection)
            if ids := [key.id for key in await _unused(connection, found)]:
                await self._keys.let_go(connection, ids)


async def _unused(connection: AsyncConnection, keys: Sequence[WrappedKey]) -> list[WrappedKey]:
    """Those of the keys that open nothing in this database."""
    if not keys:
        return []
    opens = select(_p.subject_key).where(_p.subject_key.in_([key.id for key in keys])).distinct()
    used = set((await connection.execute(opens)).scalars())
    rest = [key for key in keys if key.id not in used]
    unused = []
    for key in rest:
        said = union_all(*(query.limit(1).subquery().select() for query in _words(key)))
        if (await connection.execute(said.limit(1))).first() is None:
            unused.append(key)
    return unused


def _words(key: WrappedKey) -> Iterator[Select[Any]]:
    """The queries for what a key has sealed beside predictions, by whose that is."""
    in_feedback = _in(key, _f.said, _f.metadata, _f.comment, _f.correction)
    in_labels = _in(key, _l.said, _l.comment, _l.answer)
    in_datasets = _in(key, _e.content)
    one = select(literal(1))
    yield one.where(_f.tenant == key.tenant, _f.author == key.subject, in_feedback)
    yield one.where(_l.tenant == key.tenant, _l.author == key.subject, in_labels)
    yield one.where(_e.tenant == key.tenant, _e.subject == key.subject, in_datasets)
    # The index has an entity behind its view; of a conversation's features it goes by its bare name.
    views = _v.view.in_(select(feature_views.c.name).where(feature_views.c.subject.is_not(None)))
    entity = _v.entity.in_([key.subject, key.subject.removeprefix(CONVERSATION)])
    yield one.where(_v.tenant == key.tenant, views, entity, _in(key, _v.content))
    if key.subject.startswith(CONVERSATION):
        yield one.where(_f.tenant == key.tenant, _f.conversation == key.subject.removeprefix(CONVERSATION), in_feedback)
    if about := _prediction_of(key.subject):
        yield one.where(_f.tenant == key.tenant, _f.prediction_id == about, in_feedback)
        yield one.where(_l.tenant == key.tenant, _l.prediction_id == about, in_labels)
        yield one.where(_e.tenant == key.tenant, _e.prediction_id == about, in_datasets)


def _in(key: WrappedKey, *columns: Any) -> Any:
    return or_(*(column.contains(key_mark(key.id)) for column in columns))


def _prediction_of(subject: str) -> str | None:
    """The prediction that words are about whose subject this is, unless a user is called like that."""
    try:
        return str(UUID(subject.removeprefix(PREDICTION))) if subject.startswith(PREDICTION) else None
    except ValueError:
        return None
