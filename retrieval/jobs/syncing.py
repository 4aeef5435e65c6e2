"""What makes a source equal to a manifest, and the job that does it.

The main rule: a synchronisation touches what belongs to its source, and what has no source and the same name. So two
folders in one tenant never delete each other's documents, and what somebody added by hand stays.
"""

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from retrieval.errors import TooManyDeletions
from retrieval.ingesting import document_id_of
from retrieval.jobs.ledger import cancel_job, insert_items, insert_job, now
from retrieval.jobs.nouns import Entry, Failure, Item, Plan
from retrieval.jobs.reading import failure
from retrieval.sqlite_file import fetch, transaction

FREE_DELETIONS = 5
"""So many documents may always go; more of them, and more than half of the source, only if the caller says so."""


def plan(
    connection: sqlite3.Connection,
    tenant: str,
    source: str,
    manifest: Sequence[Entry],
    *,
    delete: bool,
    retry_failed: bool,
    index_version: str | None,
) -> Plan:
    """Compare a manifest with what there is; `index_version` is the one that documents should be of, if it is known."""
    known = _documents(connection, tenant)
    failed_before = _failures(connection, tenant)
    added: list[Entry] = []
    modified: list[Entry] = []
    failed: list[Failure] = []
    owned: list[tuple[Entry, str]] = []
    adopted: list[str] = []
    unchanged = 0
    wanted: set[str] = set()
    for entry in manifest:
        identity = document_id_of(tenant, entry.name)
        wanted.add(identity)
        before = failed_before.get(identity)
        its_source, *facts = known.get(identity, (None,))
        if its_source is not None and its_source not in ("", source):
            owned.append((entry, its_source))
        elif _is_as(entry, facts, index_version):
            unchanged += 1
            if its_source != source:
                adopted.append(identity)
        elif before and before.version == entry.version and not retry_failed:
            failed.append(before)
        else:
            (modified if facts else added).append(entry)
    own = {identity: facts for identity, facts in known.items() if facts[0] == source}
    gone = [(facts[-1], identity) for identity, facts in own.items() if identity not in wanted] if delete else []
    return Plan(
        added=tuple(added),
        modified=tuple(modified),
        deleted=tuple(sorted(gone)),
        failed=tuple(failed),
        owned=tuple(owned),
        adopted=tuple(adopted),
        unchanged=unchanged,
        present=len(own),
    )


def check_deletions(wanted: Plan, most: int | None) -> None:
    """Raise TooManyDeletions where a plan deletes more than it may: an empty folder is more often a mistake."""
    count = len(wanted.deleted)
    allowed = max(FREE_DELETIONS, wanted.present // 2) if most is None else most
    if count > allowed:
        raise TooManyDeletions(
            f"It would delete {count} of the source's {wanted.present} documents, and {allowed} may go: "
            f"give `max_deletes` as {count} or more if that is meant."
        )


def begin(
    connection: sqlite3.Connection, tenant: str, source: str, wanted: Plan, *, who: str
) -> tuple[int, list[Item]]:
    """Write the job of a plan, in place of the source's earlier ones; gives its number, and what those had left."""
    with transaction(connection):
        query = "SELECT number FROM jobs WHERE finished_at IS NULL AND kind = 'sync' AND tenant = ? AND source = ?"
        dropped = [
            item for (number,) in fetch(connection, query, (tenant, source)) for item in cancel_job(connection, number)
        ]
        files = len(wanted.added) + len(wanted.modified)
        job, _ = insert_job(
            connection,
            tenant=tenant,
            kind="sync",
            who=who,
            source=source,
            unchanged=wanted.unchanged,
            files=files,
            deletions=len(wanted.deleted),
            failed=len(wanted.owned) + len(wanted.failed),
        )
        insert_items(connection, ({"job": job, "tenant": tenant, **row} for row in _rows(tenant, source, wanted)))
        connection.executemany(
            "UPDATE documents SET source = ? WHERE tenant = ? AND id = ? AND source = ''",
            [(source, tenant, identity) for identity in wanted.adopted],
        )
        # A file that failed and is gone from the folder is no failure any more.
        _forget_gone(connection, tenant, source, wanted)
    return job, dropped


def _rows(tenant: str, source: str, wanted: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in (*wanted.added, *wanted.modified):
        row = {"action": "put", "name": entry.name, "state": "expected", "version": entry.version}
        rows.append({**row, "metadata": json.dumps(entry.metadata), "document_id": document_id_of(tenant, entry.name)})
    first_deletion = "held" if rows else "waiting"
    for name, identity in wanted.deleted:
        rows.append({"action": "delete", "name": name, "document_id": identity, "state": first_deletion})
    ended = {"action": "put", "state": "failed", "finished_at": now()}
    for known in wanted.failed:
        facts = {"name": known.name, "document_id": known.document_id, "version": known.version}
        rows.append({**ended, **facts, "error": known.error, "message": known.message})
    for entry, owner in wanted.owned:
        facts = {"name": entry.name, "document_id": document_id_of(tenant, entry.name), "version": entry.version}
        message = f"{entry.name!r} belongs to the source {owner!r}, not to {source!r}: give it another name"
        rows.append({**ended, **facts, "error": "DocumentOwned", "message": message})
    return [{**row, "n": n} for n, row in enumerate(rows, 1)]


def _forget_gone(connection: sqlite3.Connection, tenant: str, source: str, wanted: Plan) -> None:
    kept = {known.document_id for known in wanted.failed}
    query = "SELECT document_id FROM failures WHERE tenant = ? AND source = ?"
    gone = [(tenant, identity) for (identity,) in fetch(connection, query, (tenant, source)) if identity not in kept]
    connection.executemany("DELETE FROM failures WHERE tenant = ? AND document_id = ?", gone)


def _is_as(entry: Entry, facts: list[Any], index_version: str | None) -> bool:
    if not facts:
        return False
    version, metadata, its_index_version, _ = facts
    is_current = index_version is None or its_index_version == index_version
    return bool(is_current and version == entry.version and json.loads(metadata) == entry.metadata)


def _documents(connection: sqlite3.Connection, tenant: str) -> dict[str, tuple[str, ...]]:
    """Source, version, metadata, index version and name of each of the tenant's documents, by id."""
    query = "SELECT id, source, version, metadata, index_version, name FROM documents WHERE tenant = ?"
    return {identity: tuple(facts) for identity, *facts in fetch(connection, query, (tenant,))}


def _failures(connection: sqlite3.Connection, tenant: str) -> dict[str, Failure]:
    query = (
        "SELECT document_id, name, source, version, error, message, job_id, failed_at FROM failures WHERE tenant = ?"
    )
    return {row[0]: failure(row) for row in fetch(connection, query, (tenant,))}
