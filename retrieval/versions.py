"""Which index versions there are: a row for each in the document store's file, and what of the documents it has.

The main rule: the row that says `live` is the truth about which version answers, and changes in one transaction with
what the documents say of themselves; an index's own name for it (alias, pointer) follows. What a version lacks is not
noted anywhere: it is the documents that have no cut for it, so nothing can be forgotten.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from retrieval.documents import Passage
from retrieval.index import IndexSchema
from retrieval.sqlite_file import fetch, transaction
from retrieval.store import Note, StoredDocument, insert_passages, stored_document

State = Literal["building", "ready", "live", "retired", "dropped"]
"""`building` until it has had every document once, then `ready`; `live` answers, and is `retired` when another does.

A `dropped` one is being removed.
"""
_COLUMNS = "number, id, schema, state, comparison, created_at, ready_at, live_at, retired_at"


@dataclass(frozen=True, slots=True)
class IndexVersion:
    """One embedding model, splitting and schema, and how much of the documents is indexed by it."""

    number: int
    schema: IndexSchema
    state: State
    comparison: dict[str, Any] | None
    """What the last comparison with the live one came to."""
    created_at: datetime
    ready_at: datetime | None
    live_at: datetime | None
    retired_at: datetime | None
    documents: int
    passages: int
    missing_documents: int
    """Documents that are not in it, or not as they are by now."""
    missing_passages: int
    """Passages that those have in the live one."""

    @property
    def id(self) -> str:
        """What predictions call it."""
        return self.schema.index_version


def now() -> str:
    """This moment, as rows have it."""
    return datetime.now(UTC).isoformat()


def every(connection: sqlite3.Connection) -> list[IndexVersion]:
    """All versions, oldest first."""
    rows = fetch(connection, f"SELECT {_COLUMNS} FROM index_versions ORDER BY number")  # noqa: S608 - our own words.
    return [_version(connection, row) for row in rows]


def insert(connection: sqlite3.Connection, schema: IndexSchema, state: State, note: Note | None = None) -> int:
    """Write a new version; gives its number. The first is 1, which documents of old stores are cut for."""
    moment = now()
    began = moment if state == "live" else None
    with transaction(connection):
        connection.execute(
            "INSERT INTO index_versions (id, schema, state, created_at, ready_at, live_at) VALUES (?, ?, ?, ?, ?, ?)",
            (schema.index_version, json.dumps(asdict(schema)), state, moment, began, began),
        )
        number = int(connection.execute("SELECT last_insert_rowid()").fetchone()[0])
        if note:
            note(connection)
    return number


def remake(connection: sqlite3.Connection, number: int, schema: IndexSchema) -> None:
    """Have a version be made otherwise, whose points are gone."""
    version_id = schema.index_version
    with transaction(connection):
        connection.execute(
            "UPDATE index_versions SET id = ?, schema = ? WHERE number = ?",
            (version_id, json.dumps(asdict(schema)), number),
        )
        connection.execute("UPDATE documents SET index_version = ?", (version_id,))


def missing(connection: sqlite3.Connection, number: int, limit: int) -> list[StoredDocument]:
    """Some of the documents that a version lacks, the oldest first."""
    query = (
        "SELECT d.* FROM documents d LEFT JOIN cuts c ON c.generation = d.generation AND c.index_number = ?"
        " WHERE c.generation IS NULL ORDER BY d.generation LIMIT ?"
    )
    return [stored_document(row) for row in fetch(connection, query, (number, limit))]


def add(connection: sqlite3.Connection, number: int, generation: int, passages: Sequence[Passage]) -> bool:
    """Note how a document is cut for a version whose points are written; False where one of them is gone by now."""
    query = "SELECT 1 FROM documents, index_versions v WHERE generation = ? AND v.number = ? AND v.state != 'dropped'"
    with transaction(connection):
        if not fetch(connection, query, (generation, number)):
            return False
        insert_passages(connection, number, generation, passages)
    return True


def finish(connection: sqlite3.Connection, number: int) -> bool:
    """Call a version ready if it lacks nothing; gives whether it does not."""
    with transaction(connection):
        if missing(connection, number, 1):
            return False
        connection.execute(
            "UPDATE index_versions SET state = 'ready', ready_at = ? WHERE number = ? AND state = 'building'",
            (now(), number),
        )
    return True


def make_live(connection: sqlite3.Connection, number: int) -> bool:
    """Have a version answer in place of the one that does; False, and nothing done, where it lacks a document."""
    moment = now()
    with transaction(connection):
        if missing(connection, number, 1):
            return False
        connection.execute(
            "UPDATE index_versions SET state = 'retired', retired_at = ? WHERE state = 'live'", (moment,)
        )
        connection.execute(
            "UPDATE index_versions SET state = 'live', live_at = ?, retired_at = NULL WHERE number = ?",
            (moment, number),
        )
        connection.execute(
            "UPDATE documents SET index_version = (SELECT id FROM index_versions WHERE number = :number), passages ="
            " (SELECT passages FROM cuts c WHERE c.generation = documents.generation AND c.index_number = :number)",
            {"number": number},
        )
    return True


def compared(connection: sqlite3.Connection, number: int, comparison: dict[str, Any]) -> None:
    """Keep what a comparison came to."""
    connection.execute("UPDATE index_versions SET comparison = ? WHERE number = ?", (json.dumps(comparison), number))


def empty(connection: sqlite3.Connection, number: int) -> None:
    """Begin to drop a version: nothing is cut for it any more."""
    with transaction(connection):
        connection.execute("UPDATE index_versions SET state = 'dropped' WHERE number = ?", (number,))
        connection.execute("DELETE FROM passages WHERE index_number = ?", (number,))
        connection.execute("DELETE FROM cuts WHERE index_number = ?", (number,))


def forget(connection: sqlite3.Connection, number: int) -> None:
    """Drop a version whose points are gone."""
    connection.execute("DELETE FROM index_versions WHERE number = ?", (number,))


def _version(connection: sqlite3.Connection, row: tuple[Any, ...]) -> IndexVersion:
    number, _, schema, state, comparison, *moments = row
    ((documents, passages),) = fetch(
        connection, "SELECT count(*), coalesce(sum(passages), 0) FROM cuts WHERE index_number = ?", (number,)
    )
    ((lacking, their_passages),) = fetch(
        connection,
        "SELECT count(*), coalesce(sum(d.passages), 0) FROM documents d"
        " LEFT JOIN cuts c ON c.generation = d.generation AND c.index_number = ? WHERE c.generation IS NULL",
        (number,),
    )
    created, ready, live, retired = (datetime.fromisoformat(moment) if moment else None for moment in moments)
    assert created
    return IndexVersion(
        number=number,
        schema=IndexSchema.of(json.loads(schema)),
        state=state,
        comparison=json.loads(comparison) if comparison else None,
        created_at=created,
        ready_at=ready,
        live_at=live,
        retired_at=retired,
        documents=documents,
        passages=passages,
        missing_documents=lacking,
        missing_passages=their_passages,
    )
