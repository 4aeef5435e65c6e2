"""What windows are compared with: the questions and answers of a reference, kept under a version that never changes.

The main rule: a reference is only ever followed by another. It holds copies of embeddings, which are content, under the
ids of the predictions they are from, and otherwise figures and no text.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Row, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, dataset_rows, drift_reference_rows, drift_references, predictions
from app.drift.facts import MAX_QUESTIONS, SESSION, Outputs, Question, counted, questions_of, session_of
from app.drift.states import Reference
from app.errors import Conflict, InvalidRequest
from app.predictions import first_id
from app.privacy.envelopes import Ring, disclose, enclose, is_sealed, keys_for
from app.privacy.sealing import DataKey

MIN_REFERENCE_SESSIONS = 400
"""Twice what a window needs (`observability.drift.MIN_SESSIONS`): half of a reference is compared with the other."""

MAX_REFERENCE_SESSIONS = 4_000

KEPT_VERSIONS = 5
"""Versions of a reference whose questions are kept; of older ones the sizes and the source are."""

_MAX_ROWS_READ = 50_000
_ROWS_AT_ONCE = 500

_p, _r, _q = predictions.c, drift_references.c, drift_reference_rows.c
_outputs = msgspec.json.Decoder(Outputs).decode


class References:
    """The references in the database that all replicas share.

    Args:
        database: shared by all replicas.
        clock: gives milliseconds since 1970.
        ring: opens sealed predictions, and seals the copies of their embeddings.
    """

    def __init__(self, database: Database, clock: Callable[[], int], *, ring: Ring | None = None) -> None:
        self._database = database
        self._clock = clock
        self._ring = ring

    async def from_traffic(self, tenant: str, release: str, *, since: datetime, until: datetime, who: str) -> Reference:
        """Make a reference of what the tenant asked of a release in a window of time.

        Raises:
            InvalidRequest: there were too few sessions.
            Conflict: another reference was set at the same time.
        """
        mine = (*counted(release), _p.tenant == tenant, _p.id >= first_id(since), _p.id < first_id(until))
        query = select(_p.row, *SESSION).where(*mine).order_by(_p.id)
        source = {"kind": "traffic", "since": since.isoformat(), "until": until.isoformat()}
        return await self._of_predictions(tenant, release, query, source, who)

    async def from_dataset(self, tenant: str, release: str, digest: str, *, who: str) -> Reference:
        """Make a reference of the predictions that a registered dataset of the tenant was made of.

        Raises:
            InvalidRequest: too few of its rows are from predictions that are still there.
            Conflict: another reference was set at the same time.
        """
        rows = dataset_rows.c
        of = select(rows.prediction_id).where(rows.tenant == tenant, rows.dataset_digest == digest)
        query = select(_p.row, *SESSION, _p.release_name).where(*counted(), _p.tenant == tenant, _p.id.in_(of))
        return await self._of_predictions(
            tenant, release, query.order_by(_p.id), {"kind": "dataset", "digest": digest}, who
        )

    async def from_questions(
        self, tenant: str, release: str, embeddings: Sequence[tuple[bytes, bytes]], *, name: str, who: str
    ) -> Reference:
        """Make a reference of packed embeddings, each after the digest of its session: nothing is known of answers.

        Raises:
            InvalidRequest: there are too few sessions.
            Conflict: another reference was set at the same time.
        """
        questions = [Question(session, None, packed, None) for session, packed in embeddings]
        return await self._keep(tenant, release, questions, {"kind": "questions", "name": name}, who)

    async def _of_predictions(
        self, tenant: str, release: str, query: Select[Any], source: dict[str, Any], who: str
    ) -> Reference:
        async with self._database.reading() as connection:
            found = (await connection.execute(query.limit(_MAX_ROWS_READ))).all()
        seen: dict[bytes, int] = {}
        by_release: dict[str, list[int]] = {}
        for row in found:
            session = session_of(tenant, row.id, row.user, row.conversation)
            if session not in seen and len(seen) == MAX_REFERENCE_SESSIONS:
                continue
            seen[session] = seen.get(session, 0) + 1
            if seen[session] <= MAX_QUESTIONS:
                by_release.setdefault(getattr(row, "release_name", release), []).append(row.row)
        questions: list[Question] = []
        for name, rows in sorted(by_release.items()):
            questions += await questions_of(self._database, tenant, name, rows, ring=self._ring)
        if source["kind"] == "dataset":
            # Others' answers say nothing of what is to be expected of this release.
            questions = [msgspec.structs.replace(each, outputs=None) for each in questions]
        return await self._keep(tenant, release, questions, source, who)

    async def _keep(
        self, tenant: str, release: str, questions: Sequence[Question], source: dict[str, Any], who: str
    ) -> Reference:
        sessions = len({each.session for each in questions})
        if sessions < MIN_REFERENCE_SESSIONS:
            raise InvalidRequest(
                f"A reference takes at least {MIN_REFERENCE_SESSIONS} sessions, better 1,000: these are {sessions}. "
                "Choose a longer window, or give more questions.",
                param="reference",
            )
        keys = await sealing_keys(self._ring, questions)
        async with self._database.writing() as connection:
            version = await newest(connection, tenant, release)
            kept = await keep(
                self._database,
                connection,
                tenant,
                release,
                version + 1,
                questions,
                source,
                who=who,
                now=self._clock(),
                keys=keys,
            )
        if kept is None:
            raise Conflict("Another reference of this release was set at the same time: look at it and decide again.")
        return kept


async def newest(connection: AsyncConnection, tenant: str, release: str) -> int:
    """The version of a release's reference; 0 where there is none."""
    query = select(func.max(_r.version)).where(_r.tenant == tenant, _r.release == release)
    return (await connection.execute(query)).scalar_one() or 0


async def keep(
    database: Database,
    connection: AsyncConnection,
    tenant: str,
    release: str,
    version: int,
    questions: Sequence[Question],
    source: dict[str, Any],
    *,
    who: str,
    now: int,
    keys: Mapping[str, DataKey],
) -> Reference | None:
    """Write a reference and let old ones go; None, and nothing is written, where the version is taken.

    `keys` are those of `sealing_keys`: a copy of a sealed embedding whose key is gone is not made.
    """
    whose = {"tenant": tenant, "release": release, "version": version}
    facts: dict[str, Any] = {
        "source": msgspec.json.encode(source).decode(),
        "sessions": len({each.session for each in questions}),
        "questions": len(questions),
        "embedded": sum(each.embedding is not None for each in questions),
        "created_at": now,
        "created_by": who,
    }
    made = database.insert(drift_references).values(**whose, **facts).on_conflict_do_nothing()
    if not (await connection.execute(made)).rowcount:
        return None
    rows = [
        {
            **whose,
            "number": number,
            "session": each.session,
            "prediction_id": each.prediction_id,
            "embedding": _as_kept(each, number, keys),
            "outputs": msgspec.json.encode(each.outputs).decode() if each.outputs else None,
        }
        for number, each in enumerate(questions)
    ]
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        await connection.execute(drift_reference_rows.insert(), rows[at : at + _ROWS_AT_ONCE])
    mine = (_q.tenant == tenant, _q.release == release)
    await connection.execute(drift_reference_rows.delete().where(*mine, _q.version <= version - KEPT_VERSIONS))
    return Reference(version=version, **{**facts, "source": source})


async def sealing_keys(ring: Ring | None, questions: Sequence[Question]) -> Mapping[str, DataKey]:
    """The keys there are of the predictions that questions are from; raises Unavailable."""
    ids = sorted({each.key for each in questions if each.key is not None and each.embedding is not None})
    return await ring.opening(ids) if ring is not None and ids else {}


def _as_kept(question: Question, number: int, keys: Mapping[str, DataKey]) -> bytes | None:
    if question.key is None or question.embedding is None:
        return question.embedding
    key = keys.get(question.key)
    return None if key is None else enclose(question.embedding, key, _context(question.prediction_id, number)).encode()


def _context(prediction_id: str | None, number: int) -> bytes:
    return f"drift reference\0{prediction_id}\0{number}".encode()


async def questions_in(
    connection: AsyncConnection, tenant: str, release: str, version: int, *, ring: Ring | None = None
) -> list[Question]:
    """Read what a reference consists of, opened by the ring's keys; an embedding whose key is gone is null."""
    mine = (_q.tenant == tenant, _q.release == release, _q.version == version)
    rows = (await connection.execute(select(drift_reference_rows).where(*mine).order_by(_q.number))).all()
    keys = await keys_for(ring, (row.embedding for row in rows))
    return [
        Question(row.session, row.prediction_id, _shown(row, keys), _outputs(row.outputs) if row.outputs else None)
        for row in rows
    ]


def _shown(row: Row[Any], keys: Mapping[str, DataKey]) -> bytes | None:
    held: bytes | None = row.embedding
    if held is None or not is_sealed(held):
        return held
    return disclose(bytes(held).decode("ascii"), keys, _context(row.prediction_id, row.number))


async def forget(connection: AsyncConnection, tenant: str, prediction_ids: Collection[str]) -> None:
    """Drop what references hold of these predictions: whoever erases a prediction calls it."""
    mine = (_q.tenant == tenant, _q.prediction_id.in_(sorted(prediction_ids)))
    await connection.execute(drift_reference_rows.delete().where(*mine))
