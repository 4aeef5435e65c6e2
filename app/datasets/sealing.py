"""The content of datasets' rows under the keys of those whose predictions they were made of.

The main rule: digests are of the content in the open, so that a version exports to the same bytes whether it is sealed
or not. A row whose key was destroyed has no content, as if it had been erased.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from app.feedback.words import prediction_subject
from app.privacy.envelopes import Ring, can_open, disclose, enclose, is_sealed, keys_for


async def sealed(ring: Ring | None, tenant: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows to be written, with the content of those that are of predictions sealed; raises Unavailable.

    What was imported is of no subject that could be erased.
    """
    of = {row["digest"]: subject for row in rows if (subject := _subject(row)) is not None}
    if ring is None or not of:
        return [dict(row) for row in rows]
    keys = await ring.sealing(tenant, sorted(set(of.values())))
    return [
        {**row, "content": enclose(row["content"].encode(), keys[of[row["digest"]]], _context(tenant, row["digest"]))}
        if row["digest"] in of
        else dict(row)
        for row in rows
    ]


async def lasting(
    ring: Ring | None,
    connection: AsyncConnection,
    tenant: str,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[dict[str, Any]],
) -> Sequence[dict[str, Any]]:
    """Of rows and what `sealed` made of them, what the transaction may write: sealed by keys that are there.

    Raises:
        Unavailable: where the keys are does not answer.
    """
    if await can_open(ring, connection, (row["content"] for row in kept)):
        return kept
    return await sealed(ring, tenant, rows)


async def opened(ring: Ring | None, tenant: str, rows: Sequence[Any]) -> Sequence[Any]:
    """Rows that were read, with their content in place; null where it was erased or cannot be read here.

    Raises:
        Unavailable: where the keys are does not answer.
    """
    if not any(is_sealed(row.content) for row in rows):
        return rows
    keys = await keys_for(ring, (row.content for row in rows))
    shown = []
    for row in rows:
        content = row.content
        if content is not None and is_sealed(content):
            plain = disclose(content, keys, _context(tenant, row.digest))
            content = None if plain is None else plain.decode()
        shown.append(SimpleNamespace(**{**row._asdict(), "content": content}))
    return shown


def _subject(row: Mapping[str, Any]) -> str | None:
    if row["subject"] is not None:
        return str(row["subject"])
    return None if row["prediction_id"] is None else prediction_subject(row["prediction_id"])


def _context(tenant: str, digest: str) -> bytes:
    return f"dataset row\0{tenant}\0{digest}".encode(errors="surrogatepass")
