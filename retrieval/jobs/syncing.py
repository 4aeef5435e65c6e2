"""What makes a source equal to a manifest, and the job that does it.

The main rule: a synchronisation touches what belongs to its source, and what has no source and the same name. So two
folders in one tenant never delete each other's documents, and what somebody added by hand stays.
"""

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from retrieval.documents import Scope
from retrieval.errors import TooManyDeletions
from retrieval.ingesting import document_id_of
from retrieval.jobs.ledger import cancel_job, insert_items, insert_job, meant, now, prune, writing
from retrieval.jobs.nouns import Entry, Failure, Item, Limits, Plan
from retrieval.jobs.origins import resolved
from retrieval.jobs.reading import failures
from retrieval.scoping import may_see, visible_jobs
from retrieval.sqlite_file import fetch, transaction

FREE_DELETIONS = 5
"""So many documents may always go; more of them, and more than half of the source, only if the caller says so."""


def plan(
    connection: sqlite3.Connection,
    scope: Scope,
    source: str,
    manifest: Sequence[Entry],
    *,
    delete: bool,
    retry_failed: bool,
    groups: tuple[str, ...] | None,
    index_version: str | None,
) -> Plan:
    """Compare a manifest with what there is; `index_version` is the one that documents should be of, if it is known."""
    tenant = scope.tenant
    known, taken = _documents(connection, scope)
    failed_before = _failures(connection, scope)
    added: list[Entry] = []
    modified: list[Entry] = []
    failed: list[Failure] = []
    owned: list[tuple[Entry, str]] = []
    adopted: list[str] = []
    unchanged = 0
    wanted: set[str] = set()
    for entry in resolved(connection, tenant, source, manifest):
        identity = document_id_of(tenant, entry.name)
        wanted.add(identity)
        before = failed_before.get(identity)
        its_source, *facts = known.get(identity, (None,))
        if identity in taken:
            owned.append((entry, ""))
        elif its_source is not None and its_source not in ("", source):
            owned.append((entry, its_source))
        elif _is_as(entry, facts, index_version, groups):
            unchanged += 1
            if its_source != source:
                adopted.append(identity)
        elif before and entry.version and before.version == entry.version and not retry_failed:
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
        groups=groups,
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


def earlier(connection: sqlite3.Connection, scope: Scope, source: str) -> list[int]:
    """The numbers of the source's synchronisations that have not ended."""
    condition, parameters = visible_jobs(scope)
    query = f"SELECT number FROM jobs WHERE finished_at IS NULL AND kind = 'sync' AND {condition} AND source = :source"  # noqa: S608
    return [int(number) for (number,) in fetch(connection, query, {**parameters, "source": source})]


def begin(
    connection: sqlite3.Connection, scope: Scope, source: str, wanted: Plan, limits: Limits, *, who: str
) -> tuple[int, list[Item]]:
    """Write the job of a plan, in place of the source's earlier ones; gives its number, and what those had left.

    Raises:
        DocumentOwned: A name was taken meanwhile by a document that the scope does not see.
    """
    tenant = scope.tenant
    with transaction(connection):
        dropped = [item for number in earlier(connection, scope, source) for item in cancel_job(connection, number)]
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
        insert_items(connection, ({"job": job, **row} for row in _rows(connection, scope, source, wanted)))
        connection.executemany(
            "UPDATE documents SET source = ? WHERE tenant = ? AND id = ? AND source = ''",
            [(source, tenant, identity) for identity in wanted.adopted],
        )
        # A file that failed and is gone from the folder is no failure any more.
        _forget_gone(connection, scope, source, wanted)
        prune(connection, tenant, limits)
    return job, dropped


def _rows(connection: sqlite3.Connection, scope: Scope, source: str, wanted: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    ended = {"action": "put", "state": "failed", "finished_at": now()}

    def add(
        name: str, identity: str, groups: tuple[str, ...] | None, metadata: dict[str, Any] | None = None, **facts: Any
    ) -> None:
        its = meant(connection, scope, name, identity, groups, json.dumps(metadata))
        rows.append({**its, "name": name, "document_id": identity, **facts})

    for entry in (*wanted.added, *wanted.modified):
        facts = {"action": "put", "state": "expected", "version": entry.version}
        identity = document_id_of(scope.tenant, entry.name)
        add(entry.name, identity, wanted.groups, entry.metadata, **facts)
    first_deletion = "held" if rows else "waiting"
    for name, identity in wanted.deleted:
        add(name, identity, None, action="delete", state=first_deletion)
    for known in wanted.failed:
        facts = {"version": known.version, "error": known.error, "message": known.message}
        add(known.name, known.document_id, wanted.groups, None, **ended, **facts)
    for entry, owner in wanted.owned:
        whose = f"belongs to the source {owner!r}, not to {source!r}" if owner else "is taken by a document for others"
        facts = {"version": entry.version, "error": "DocumentOwned"}
        facts |= {"message": f"{entry.name!r} {whose}: give it another name"}
        identity = document_id_of(scope.tenant, entry.name)
        rows.append(
            {**writing(scope, wanted.groups or ()), "name": entry.name, "document_id": identity, **ended, **facts}
        )
    return [{**row, "n": n} for n, row in enumerate(rows, 1)]


def _forget_gone(connection: sqlite3.Connection, scope: Scope, source: str, wanted: Plan) -> None:
    kept = {known.document_id for known in wanted.failed}
    before = _failures(connection, scope).values()
    gone = [
        (scope.tenant, known.document_id)
        for known in before
        if known.source == source and known.document_id not in kept
    ]
    connection.executemany("DELETE FROM failures WHERE tenant = ? AND document_id = ?", gone)


def _is_as(entry: Entry, facts: list[Any], index_version: str | None, groups: tuple[str, ...] | None) -> bool:
    if not facts:
        return False
    version, metadata, its_index_version, its_groups, _ = facts
    is_current = index_version is None or its_index_version == index_version
    is_for_them = groups is None or frozenset(groups) == frozenset(json.loads(its_groups))
    has_its_facts = entry.metadata is None or json.loads(metadata) == entry.metadata
    return bool(is_current and is_for_them and has_its_facts and version == entry.version)


def _documents(connection: sqlite3.Connection, scope: Scope) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Source, version, metadata, index version, groups and name of each document that the scope sees, by id.

    And the ids of the tenant's others.
    """
    query = "SELECT id, source, version, metadata, index_version, for_groups, name FROM documents WHERE tenant = ?"
    rows = fetch(connection, query, (scope.tenant,))
    seen = {identity: tuple(facts) for identity, *facts in rows if may_see(scope, scope.tenant, json.loads(facts[-2]))}
    return seen, {identity for identity, *_ in rows if identity not in seen}


def _failures(connection: sqlite3.Connection, scope: Scope) -> dict[str, Failure]:
    return {known.document_id: known for known in failures(connection, scope, after="", limit=-1)}
