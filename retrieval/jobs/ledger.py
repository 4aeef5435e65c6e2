"""What is written of jobs: functions of a connection to the document store's file.

The main rule: an item is ended in the transaction that changes its document, by `end`; every other change here is a
transaction of its own. A job counts what is left of it, so that nothing has to look at all its items but who shows it.
"""

import json
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from retrieval.documents import Document, Scope
from retrieval.errors import JobEnded, NotExpected
from retrieval.ingesting import document_id_of, is_same, require_visible
from retrieval.jobs.nouns import STALE_SECONDS, Item, Job, Kind, Limits, Outcome
from retrieval.jobs.origins import remember
from retrieval.jobs.reading import select_items
from retrieval.scoping import visible, visible_jobs
from retrieval.sqlite_file import fetch, transaction
from retrieval.store import find_document

_OPEN = "('expected', 'held', 'waiting', 'running')"
_PUT_BACK = "UPDATE job_items SET state = 'waiting', attempts = attempts + ? WHERE state = 'running'"


def now() -> str:
    """This moment, as rows have it."""
    return datetime.now(UTC).isoformat()


# --- accepting ---


def insert_job(
    connection: sqlite3.Connection,
    *,
    tenant: str,
    kind: Kind,
    who: str,
    source: str = "",
    unchanged: int = 0,
    files: int = 0,
    deletions: int = 0,
    failed: int = 0,
) -> tuple[int, str]:
    """Write a job inside a transaction, ended if nothing is left to do; gives its number and id."""
    state = "open" if files or deletions else "failed" if failed else "done"
    moment, job_id = now(), str(uuid4())
    ended = None if state == "open" else moment
    connection.execute(
        "INSERT INTO jobs (id, tenant, kind, source, created_by, state, unchanged, files_left, deletions_left, failed,"
        " created_at, touched_at, finished_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (job_id, tenant, kind, source, who, state, unchanged, files, deletions, failed, moment, moment, ended),
    )
    return int(connection.execute("SELECT last_insert_rowid()").fetchone()[0]), job_id


def insert_items(connection: sqlite3.Connection, rows: Iterable[dict[str, Any]]) -> None:
    """Write items inside a transaction; what a row leaves out is empty."""
    empty = {
        "version": "",
        "media_type": None,
        "metadata": "{}",
        "size_bytes": 0,
        "spool": None,
        "outcome": None,
        "error": None,
        "message": None,
        "finished_at": None,
    }
    connection.executemany(
        "INSERT INTO job_items VALUES (:job, :n, :tenant, :action, :name, :document_id, :version, :media_type,"
        " :metadata, :size_bytes, :spool, :state, :outcome, 0, 0, :error, :message, 0, :finished_at, :for_groups,"
        " :groups_of_writer)",
        ({**empty, **row} for row in rows),
    )


def writing(scope: Scope, groups: Sequence[str]) -> dict[str, Any]:
    """What an item says of who writes and for whom."""
    writer = None if scope.groups is None else sorted(scope.groups)
    return {"tenant": scope.tenant, "for_groups": json.dumps(groups), "groups_of_writer": json.dumps(writer)}


def meant(
    connection: sqlite3.Connection,
    scope: Scope,
    name: str,
    document_id: str,
    groups: Sequence[str] | None,
    metadata: str = "null",
) -> dict[str, Any]:
    """Whom a document will be for and its facts, as JSON: what is asked, else as what it replaces has it, or will.

    Raises:
        DocumentOwned: The scope does not see what it would replace.
    """
    waiting = "tenant = ? AND document_id = ? AND state IN ('waiting', 'running') AND action = 'put'"
    query = f"SELECT for_groups, metadata FROM job_items WHERE {waiting} ORDER BY job DESC LIMIT 1"  # noqa: S608
    found = fetch(connection, query, (scope.tenant, document_id))
    for before, _ in found:
        require_visible(scope, name, json.loads(before))
    old = find_document(connection, Scope.whole(scope.tenant), document_id)
    if old is not None:
        require_visible(scope, name, old.groups)
        found = found or [(json.dumps(old.groups), json.dumps(old.metadata))]
    before, facts = found[0] if found else ("[]", "{}")
    its = json.loads(before) if groups is None else groups
    return {**writing(scope, its), "metadata": facts if metadata == "null" else metadata}


def accept(
    connection: sqlite3.Connection, scope: Scope, who: str, upload: dict[str, Any], groups: Sequence[str] | None
) -> str:
    """Write the job of a single document that was spooled; gives its id. Raises what `meant` does."""
    with transaction(connection):
        its = meant(connection, scope, upload["name"], upload["document_id"], groups, upload["metadata"])
        job, job_id = insert_job(connection, tenant=scope.tenant, kind="upload", who=who, files=1)
        insert_items(connection, [{"job": job, "n": 1, "action": "put", "state": "waiting", **upload, **its}])
    return job_id


def settle(
    connection: sqlite3.Connection,
    scope: Scope,
    who: str,
    draft: Document,
    groups: Sequence[str] | None,
    metadata: dict[str, Any] | None,
    limits: Limits,
) -> str | None:
    """Write the job of a document that is there already, as it is; None where there is something to do."""
    with transaction(connection):
        old = find_document(connection, scope, draft.id)
        if old is None or _is_under_way(connection, draft.tenant, draft.id):
            return None
        its = old.groups if groups is None else tuple(groups)
        if not is_same(old, replace(draft, groups=its, metadata=old.metadata if metadata is None else metadata)):
            return None
        job, job_id = insert_job(connection, tenant=draft.tenant, kind="upload", who=who)
        item = {
            "job": job,
            "n": 1,
            **writing(scope, its),
            "action": "put",
            "name": draft.name,
            "document_id": draft.id,
            "version": draft.version,
            "size_bytes": draft.size_bytes,
            "state": "done",
            "outcome": "unchanged",
            "finished_at": now(),
        }
        insert_items(connection, [item])
        _forget_failure(connection, draft.tenant, draft.id)
        prune(connection, draft.tenant, limits)
    return job_id


def insert_build(connection: sqlite3.Connection, tenant: str, who: str, version_id: str) -> str:
    """Write inside a transaction the job that builds an index version; gives its id."""
    job, job_id = insert_job(connection, tenant=tenant, kind="build", who=who, files=1)
    item = {"action": "build", "name": version_id, "document_id": "", "state": "waiting"}
    insert_items(connection, [{"job": job, "n": 1, **writing(Scope.whole(tenant), ()), **item}])
    return job_id


def _is_under_way(connection: sqlite3.Connection, tenant: str, document_id: str) -> bool:
    where = "tenant = ? AND document_id = ? AND state IN ('waiting', 'running')"
    return bool(fetch(connection, f"SELECT 1 FROM job_items WHERE {where} LIMIT 1", (tenant, document_id)))  # noqa: S608


def deliver(connection: sqlite3.Connection, job: Job, name: str, etag: str, upload: dict[str, Any]) -> str:
    """Give a synchronisation one of the files it waits for; raises JobEnded or NotExpected."""
    with transaction(connection):
        key = expected(connection, job, name)
        facts = "version = :version, media_type = :media_type, size_bytes = :size_bytes, spool = :spool"
        connection.execute(
            f"UPDATE job_items SET {facts}, state = 'waiting' WHERE job = :job AND n = :n",  # noqa: S608
            {**upload, "job": key[0], "n": key[1]},
        )
        identity = document_id_of(job.tenant, name)
        remember(connection, job.tenant, identity, origin=job.source, etag=etag, version=upload["version"])
        connection.execute("UPDATE jobs SET touched_at = ? WHERE number = ?", (now(), job.number))
    return job.id


def expected(connection: sqlite3.Connection, job: Job, name: str) -> tuple[int, int]:
    """The item of a job that waits for this file; raises JobEnded or NotExpected."""
    (state,) = connection.execute("SELECT state FROM jobs WHERE number = ?", (job.number,)).fetchone()
    if state != "open":
        raise JobEnded(f"The job {job.id!r} has ended: {state}. Begin another synchronisation.")
    query = "SELECT n FROM job_items WHERE job = ? AND name = ? AND state = 'expected'"
    rows = fetch(connection, query, (job.number, name))
    if not rows:
        raise NotExpected(f"The job {job.id!r} does not wait for {name!r}: send what its reply listed, each once.")
    return job.number, int(rows[0][0])


def complete(connection: sqlite3.Connection, job: Job, limits: Limits) -> None:
    """Nothing more will come: the files that did not are failures."""
    with transaction(connection):
        missing = select_items(connection, "WHERE i.job = ? AND i.state = 'expected'", (job.number,))
        for item in missing:
            message = f"{item.name!r} was not uploaded"
            end(connection, item, "failed", limits, error=("NotUploaded", message), states="('expected')")


# --- working ---


def resume(connection: sqlite3.Connection, attempts: int) -> dict[str, int]:
    """Put back what was under way when the process ended, its attempts changed by so many.

    Gives the bytes of each spooled upload that waits.
    """
    with transaction(connection):
        connection.execute(_PUT_BACK, (attempts,))
        query = "SELECT spool, size_bytes FROM job_items WHERE state = 'waiting' AND spool IS NOT NULL"
        return dict(fetch(connection, query))


def claim(connection: sqlite3.Connection, live: Collection[tuple[int, int]]) -> Item | None:
    """Begin an item: the first of every job before the second of any, and those of one document in order.

    What was begun and is not among the `live` is put back first: it was stopped, or its end could not be written.
    """
    earlier = (
        "SELECT 1 FROM job_items e WHERE e.tenant = i.tenant AND e.document_id = i.document_id"
        " AND e.state IN ('waiting', 'running') AND (e.job < i.job OR e.job = i.job AND e.n < i.n)"
    )
    which = f"WHERE i.state = 'waiting' AND i.action != 'build' AND NOT EXISTS ({earlier}) ORDER BY i.n, i.job LIMIT 1"
    with transaction(connection):
        begun = fetch(connection, "SELECT job, n FROM job_items WHERE state = 'running' AND action != 'build'")
        connection.executemany(f"{_PUT_BACK} AND job = ? AND n = ?", [(-1, *key) for key in begun if key not in live])
        for item in select_items(connection, which, ()):
            connection.execute(
                "UPDATE job_items SET state = 'running', attempts = attempts + 1 WHERE job = ? AND n = ?", item.key
            )
            return replace(item, attempts=item.attempts + 1)
    return None


def claim_builds(connection: sqlite3.Connection) -> list[Item]:
    """Begin what builds index versions; what was begun before is given too."""
    with transaction(connection):
        connection.execute(
            "UPDATE job_items SET state = 'running', attempts = attempts + 1"
            " WHERE state = 'waiting' AND action = 'build'"
        )
        return select_items(connection, "WHERE i.state = 'running' AND i.action = 'build'", ())


def give_up(connection: sqlite3.Connection, item: Item, limits: Limits) -> None:
    """End a build whose index version is gone."""
    with transaction(connection):
        end(connection, item, "cancelled", limits)


def followed(connection: sqlite3.Connection, item: Item, url: str, validator: str) -> None:
    """Note what an item's link led to, as the item has it by now."""
    with transaction(connection):
        connection.execute(
            "UPDATE job_items SET version = ?, size_bytes = ? WHERE job = ? AND n = ?",
            (item.version, item.size_bytes, *item.key),
        )
        remember(connection, item.tenant, item.document_id, origin=url, etag=validator, version=item.version)


def put_back(connection: sqlite3.Connection, item: Item) -> None:
    """Let an item wait for its next turn."""
    connection.execute(f"{_PUT_BACK} AND job = ? AND n = ?", (0, *item.key))


def fail(connection: sqlite3.Connection, item: Item, limits: Limits, error: tuple[str, str]) -> None:
    """End an item as failed."""
    with transaction(connection):
        end(connection, item, "failed", limits, error=error)


def finish(connection: sqlite3.Connection, item: Item, limits: Limits, outcome: Outcome) -> None:
    """End an item that changed no document."""
    with transaction(connection):
        end(connection, item, "done", limits, outcome=outcome)


def end(
    connection: sqlite3.Connection,
    item: Item,
    state: str,
    limits: Limits,
    *,
    outcome: Outcome | None = None,
    embedded: int = 0,
    reused: int = 0,
    error: tuple[str, str] | None = None,
    states: str = "('running')",
) -> None:
    """End an item inside a transaction, and its job with its last one."""
    kind, message = error or (None, None)
    changed = connection.execute(
        "UPDATE job_items SET state = ?, outcome = ?, embedded = ?, reused = ?, error = ?, message = ?, spool = NULL,"  # noqa: S608
        f" finished_at = ? WHERE job = ? AND n = ? AND state IN {states}",
        (state, outcome, embedded, reused, kind, message, now(), *item.key),
    ).rowcount
    if not changed:
        return
    if error and item.action != "build":
        connection.execute(
            "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(item.tenant, item.document_id, item.name, item.source, item.version, kind, message, item.job_id),
                *(now(), json.dumps(item.groups)),
            ),
        )
    else:
        _forget_failure(connection, item.tenant, item.document_id)
    left = "deletions_left" if item.action == "delete" else "files_left"
    connection.execute(
        f"UPDATE jobs SET {left} = {left} - 1, failed = failed + ? WHERE number = ?",  # noqa: S608
        (int(bool(error)), item.job),
    )
    _after(connection, item.job, limits)


def _after(connection: sqlite3.Connection, number: int, limits: Limits) -> None:
    """Deletions begin when every file is done with, so that what was renamed is found throughout; then the job ends."""
    query = "SELECT tenant, files_left, deletions_left, failed FROM jobs WHERE number = ? AND state = 'open'"
    for tenant, files, deletions, failed in fetch(connection, query, (number,)):
        if not files and deletions:
            connection.execute("UPDATE job_items SET state = 'waiting' WHERE job = ? AND state = 'held'", (number,))
        elif not files:
            kept = fetch(
                connection, "SELECT 1 FROM job_items WHERE job = ? AND state != 'cancelled' LIMIT 1", (number,)
            )
            state = "failed" if failed else "done" if kept else "cancelled"
            connection.execute("UPDATE jobs SET state = ?, finished_at = ? WHERE number = ?", (state, now(), number))
            prune(connection, tenant, limits)


def prune(connection: sqlite3.Connection, tenant: str, limits: Limits) -> None:
    """Forget inside a transaction the tenant's jobs that have ended, but for so many of the newest."""
    query = "SELECT number FROM jobs WHERE tenant = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
    for (number,) in fetch(connection, query, (tenant, limits.keep_jobs)):
        if connection.execute("DELETE FROM jobs WHERE number = ? AND state != 'open'", (number,)).rowcount:
            connection.execute("DELETE FROM job_items WHERE job = ?", (number,))


def _forget_failure(connection: sqlite3.Connection, tenant: str, document_id: str) -> None:
    connection.execute("DELETE FROM failures WHERE tenant = ? AND document_id = ?", (tenant, document_id))


# --- giving up ---


def cancel(connection: sqlite3.Connection, scope: Scope, number: int, limits: Limits) -> list[Item]:
    """End a job with what is left of it; gives those items as they were."""
    condition, parameters = visible_jobs(scope)
    with transaction(connection):
        # Before it ends, so that whoever ends an old one is still told how it ended.
        prune(connection, scope.tenant, limits)
        query = f"SELECT 1 FROM jobs WHERE {condition} AND number = :number"  # noqa: S608
        return cancel_job(connection, number) if fetch(connection, query, {**parameters, "number": number}) else []


def cancel_job(connection: sqlite3.Connection, number: int) -> list[Item]:
    """End a job inside a transaction."""
    items = select_items(connection, f"WHERE i.job = ? AND i.state IN {_OPEN}", (number,))
    connection.execute(
        f"UPDATE job_items SET state = 'cancelled', spool = NULL, finished_at = ? WHERE job = ? AND state IN {_OPEN}",  # noqa: S608
        (now(), number),
    )
    connection.execute(
        "UPDATE jobs SET state = 'cancelled', finished_at = ? WHERE number = ? AND state = 'open'", (now(), number)
    )
    return items


def withdraw(connection: sqlite3.Connection, scope: Scope, document_id: str, limits: Limits) -> list[Item]:
    """End what waits for a document inside the transaction that deletes it, and forget that it failed.

    Gives the items as they were.
    """
    states = "('waiting', 'running')"
    condition, parameters = visible(scope, "i")
    failure, _ = visible(scope, "failures")
    parameters["id"] = document_id
    which = f"WHERE {condition} AND i.document_id = :id AND i.state IN {states}"
    items = select_items(connection, which, parameters)
    for item in items:
        end(connection, item, "cancelled", limits, states=states)
    connection.execute(f"DELETE FROM failures WHERE {failure} AND document_id = :id", parameters)  # noqa: S608
    return items


def stale(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    """Tenant and number of each synchronisation that has waited too long for its next file."""
    since = (datetime.now(UTC) - timedelta(seconds=STALE_SECONDS)).isoformat()
    waits = "EXISTS (SELECT 1 FROM job_items i WHERE i.job = jobs.number AND i.state = 'expected')"
    query = (
        f"SELECT tenant, number FROM jobs WHERE finished_at IS NULL AND kind = 'sync' AND touched_at < ? AND {waits}"  # noqa: S608
    )
    return fetch(connection, query, (since,))


def upload_row(tenant: str, name: str, version: str, **facts: Any) -> dict[str, Any]:
    """What an item says of a file."""
    metadata = json.dumps(facts.pop("metadata"))
    return {
        "name": name,
        "document_id": document_id_of(tenant, name),
        "version": version,
        "metadata": metadata,
        **facts,
    }
