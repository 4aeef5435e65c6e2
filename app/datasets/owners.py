"""Whose rows are, where that becomes known after they were kept: an import names the user whom an earlier one left out.

The main rule: a row's subject is no part of its digest, so that it changes no version; but erasing somebody must reach
every row that somebody said is theirs. Who was named first stays.
"""

from collections.abc import Sequence

import msgspec
from sqlalchemy import bindparam, select, update

from app.database import dataset_examples
from app.datasets.sealing import lasting, sealed
from app.datasets.store import ROWS_AT_ONCE, Addition, Series, Store

_e = dataset_examples.c
_NOBODYS = (_e.subject.is_(None), _e.erased_at.is_(None))


async def nobodys(store: Store, tenant: str, digests: Sequence[str]) -> set[str]:
    """Those of these rows that are kept, and of which nobody has said whose they are."""
    found: set[str] = set()
    async with store.database.reading() as connection:
        for at in range(0, len(digests), ROWS_AT_ONCE):
            some = _e.digest.in_(digests[at : at + ROWS_AT_ONCE])
            query = select(_e.digest).where(_e.tenant == tenant, some, *_NOBODYS)
            found.update((await connection.execute(query)).scalars())
    return found


async def name_owners(store: Store, series: Series, build: str, given: Sequence[Addition]) -> None:
    """Say of rows that are kept whose they are, and seal them by the keys of those.

    Raises:
        Conflict: the claim is held no more: somebody was erased, who may be one of them.
    """
    rows = [{"tenant": series.tenant, **msgspec.structs.asdict(row)} for row in given]
    kept = await sealed(store.ring, series.tenant, rows)
    named = update(dataset_examples).where(_e.tenant == series.tenant, _e.digest == bindparam("row"), *_NOBODYS)
    named = named.values(subject=bindparam("whose"), content=bindparam("said"))
    async with store.database.writing() as connection:
        await store.held(connection, series.id, build)
        lasts = await lasting(store.ring, connection, series.tenant, rows, kept)
        told = [{"row": row["digest"], "whose": row["subject"], "said": row["content"]} for row in lasts]
        await connection.execute(named, told)
