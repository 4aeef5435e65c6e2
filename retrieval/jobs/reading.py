"""What is read of jobs: functions of a connection to the document store's file."""

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from retrieval.documents import Scope
from retrieval.errors import JobNotFound
from retrieval.jobs.nouns import Failure, Item, Job
from retrieval.scoping import visible, visible_jobs
from retrieval.sqlite_file import fetch

_ITEM = "SELECT i.*, j.id, j.source FROM job_items i JOIN jobs j ON j.number = i.job"
_SHOWN_FAILURES = 10


def job(connection: sqlite3.Connection, scope: Scope, job_id: str) -> Job:
    """A job; raises JobNotFound."""
    condition, parameters = visible_jobs(scope)
    found = select_jobs(connection, f"WHERE {condition} AND id = :id", {**parameters, "id": job_id})
    if not found:
        raise JobNotFound(f"There is no job {job_id!r}.")
    return found[0]


def jobs(
    connection: sqlite3.Connection, scope: Scope, *, limit: int, before: str | None, is_open: bool | None
) -> list[Job]:
    """The jobs that the scope sees, the newest first; raises JobNotFound where `before` is none of them."""
    number = job(connection, scope, before).number if before else 2**62
    only = "" if is_open is None else f" AND finished_at IS {'' if is_open else 'NOT '}NULL"
    condition, parameters = visible_jobs(scope)
    which = f"WHERE {condition} AND number < :number{only} ORDER BY number DESC LIMIT :limit"
    return select_jobs(connection, which, {**parameters, "number": number, "limit": limit})


def items(connection: sqlite3.Connection, found: Job, *, state: str | None, after: int, limit: int) -> list[Item]:
    """The items of a job in order, all or those of one state."""
    states = {None: "", "waiting": " AND i.state IN ('waiting', 'held')"}.get(state, " AND i.state = :state")
    values = {"job": found.number, "after": after, "limit": limit, "state": state}
    return select_items(connection, f"WHERE i.job = :job AND i.n > :after{states} ORDER BY i.n LIMIT :limit", values)


def failures(connection: sqlite3.Connection, scope: Scope, *, after: str, limit: int) -> list[Failure]:
    """The scope's documents that could not be taken, by id."""
    condition, parameters = visible(scope, "failures")
    query = (
        "SELECT document_id, name, source, version, error, message, job_id, failed_at FROM failures"  # noqa: S608
        f" WHERE {condition} AND document_id > :after ORDER BY document_id LIMIT :limit"
    )
    rows = fetch(connection, query, {**parameters, "after": after, "limit": limit})
    return [_failure(row) for row in rows]


def _failure(row: tuple[Any, ...]) -> Failure:
    document_id, name, source, version, error, message, job_id, failed_at = row
    moment = datetime.fromisoformat(failed_at)
    return Failure(document_id, name, source, version, error, message, job_id, moment)


def depths(connection: sqlite3.Connection) -> dict[str, int]:
    """How many jobs wait and how many are under way."""
    begun = "EXISTS (SELECT 1 FROM job_items i WHERE i.job = jobs.number AND i.attempts > 0)"
    rows = fetch(connection, f"SELECT {begun}, count(*) FROM jobs WHERE finished_at IS NULL GROUP BY 1")  # noqa: S608
    found = {"running" if is_begun else "waiting": count for is_begun, count in rows}
    return {"waiting": 0, "running": 0, **found}


def select_jobs(connection: sqlite3.Connection, which: str, parameters: Sequence[Any] | dict[str, Any]) -> list[Job]:
    """Jobs by a condition, each with what its items come to."""
    columns = "number, id, tenant, kind, source, created_by, state, unchanged, created_at, finished_at"
    return [_job(connection, row) for row in fetch(connection, f"SELECT {columns} FROM jobs {which}", parameters)]  # noqa: S608


def _job(connection: sqlite3.Connection, row: tuple[Any, ...]) -> Job:
    number, *facts, state, unchanged, created_at, finished_at = row
    query = (
        "SELECT state, outcome, count(*), sum(embedded), sum(reused), sum(attempts) FROM job_items"
        " WHERE job = ? GROUP BY state, outcome"
    )
    counts: dict[Any, int] = {}
    outcomes: dict[Any, int] = {}
    embedded = reused = attempts = 0
    for its, outcome, count, its_embedded, its_reused, its_attempts in fetch(connection, query, (number,)):
        shown = "waiting" if its == "held" else its
        counts[shown] = counts.get(shown, 0) + count
        if outcome:
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        embedded, reused, attempts = embedded + its_embedded, reused + its_reused, attempts + its_attempts
    failed = select_items(
        connection, "WHERE i.job = ? AND i.state = 'failed' ORDER BY i.n LIMIT ?", (number, _SHOWN_FAILURES)
    )
    running = select_items(connection, "WHERE i.job = ? AND i.state = 'running' ORDER BY i.n", (number,))
    if state == "open":
        state = "running" if attempts else "waiting"
    id_, tenant, kind, source, created_by = facts
    return Job(
        number=number,
        id=id_,
        tenant=tenant,
        kind=kind,
        source=source,
        created_by=created_by,
        state=state,
        unchanged=unchanged,
        created_at=datetime.fromisoformat(created_at),
        finished_at=datetime.fromisoformat(finished_at) if finished_at else None,
        counts=counts,
        outcomes=outcomes,
        embedded=embedded,
        reused=reused,
        failures=tuple(failed),
        running=tuple(running),
    )


def select_items(connection: sqlite3.Connection, which: str, parameters: Sequence[Any] | dict[str, Any]) -> list[Item]:
    """Items by a condition on `i`, the item, and `j`, its job."""
    return [_item(row) for row in fetch(connection, f"{_ITEM} {which}", parameters)]


def _item(row: tuple[Any, ...]) -> Item:
    job_number, n, *facts, metadata, size_bytes, spool, state, outcome, embedded, reused = row[:15]
    error, message, attempts, finished_at, groups, writer, job_id, source = row[15:]
    tenant, action, name, document_id, version, media_type = facts
    return Item(
        job=job_number,
        n=n,
        job_id=job_id,
        source=source,
        tenant=tenant,
        action=action,
        name=name,
        document_id=document_id,
        version=version,
        media_type=media_type,
        metadata=json.loads(metadata),
        size_bytes=size_bytes,
        spool=spool,
        state="waiting" if state == "held" else state,
        outcome=outcome,
        embedded=embedded,
        reused=reused,
        error=error,
        message=message,
        attempts=attempts,
        finished_at=datetime.fromisoformat(finished_at) if finished_at else None,
        groups=tuple(json.loads(groups)),
        groups_of_writer=None if writer == "null" else frozenset(json.loads(writer)),
    )
