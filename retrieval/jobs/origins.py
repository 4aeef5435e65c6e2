"""What the place where a document came from calls its bytes: an ETag, a date, a Git blob's id.

The main rule: it stands for bytes that came from there and were seen, whatever became of them. So a file that its
origin calls as before has the version it had, and need not come again to be compared.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from retrieval.ingesting import document_id_of
from retrieval.jobs.nouns import Entry, Item
from retrieval.sqlite_file import fetch
from retrieval.store import find_document


def remember(
    connection: sqlite3.Connection, tenant: str, document_id: str, *, origin: str, etag: str, version: str
) -> None:
    """Note inside a transaction what the origin calls these bytes; nothing where it calls them nothing."""
    if etag:
        connection.execute(
            "INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?, ?)", (tenant, document_id, origin, etag, version)
        )


def resolved(connection: sqlite3.Connection, tenant: str, source: str, manifest: Sequence[Entry]) -> list[Entry]:
    """A manifest with the versions that its ETags stand for, where that is known."""
    rows = fetch(
        connection, "SELECT document_id, etag, version FROM origins WHERE tenant = ? AND origin = ?", (tenant, source)
    )
    versions: dict[tuple[str, str], str] = {(document_id, etag): version for document_id, etag, version in rows}

    def known(entry: Entry) -> str:
        return versions.get((document_id_of(tenant, entry.name), entry.etag), "")

    return [entry if entry.version else replace(entry, version=known(entry)) for entry in manifest]


def validator(connection: sqlite3.Connection, item: Item, origin: str, index_version: str) -> str:
    """What the origin calls the bytes of the document that an item is to make; empty where there is none."""
    document = find_document(connection, item.scope, item.document_id)
    if document is None or frozenset(document.groups) != frozenset(item.groups):
        return ""
    facts = (item.name, item.metadata, index_version, item.source)
    if facts != (document.name, document.metadata, document.index_version, document.source):
        return ""
    query = "SELECT etag FROM origins WHERE tenant = ? AND document_id = ? AND origin = ? AND version = ?"
    rows = fetch(connection, query, (item.tenant, item.document_id, origin, document.version))
    return str(rows[0][0]) if rows else ""
