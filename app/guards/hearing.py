"""What a trial has to hear of: the answers of both arms, and what users said of them, since the last time.

The main rule: a session is observed once, by its first answer that came to an end, on the arm that gave it. Stable
sessions are thinned by chance where there are many more than the canary's could be compared with.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, Text, case, func, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, feedback, predictions
from app.guards.judging import Seen, session_of, signals
from app.guards.trials import Kind, TrialRecord, arms_of
from app.predictions import Settled, first_id
from app.predictions.derived import OPENING_CHARACTERS
from observability.sequential import Arm

STABLE_PER_CANARY = 8
"""Sessions of the stable arm that are heard for each of the canary's, twice what a comparison uses."""

_p, _f = predictions.c, feedback.c
_SEEN = (
    _p.id,
    _p.tenant,
    _p.user,
    _p.conversation,
    _p.assignment.label("arm"),
    _p.outcome,
    _p.finish_reason,
    _p.verdict,
    _p.retrieval_outcome,
    _p.total_seconds,
    # Without kept content the tokens say it; an abstention has none, and says something all the same.
    case(
        (_p.verdict.is_not(None), False),
        (_p.tool_calls.is_not(None) | _p.called_tools.is_not(None), False),
        (_p.completion_tokens.is_not(None), _p.completion_tokens == 0),
        else_=func.coalesce(_p.answer_characters == 0, _p.answer == "", False),
    ).label("is_wordless"),
    (
        _p.retrieval_outcome.in_(("empty", "irrelevant"))
        & (func.coalesce(func.length(sql_cast(_p.passages, Text)), 2) <= 2)
    ).label("found_nothing"),
    # Noted when the answer was written; of records from before they were, the answer itself says it.
    _p.declines,
    _p.stuck,
    case((_p.answer_characters.is_(None), func.substr(_p.answer, 1, OPENING_CHARACTERS))).label("opening"),
    (
        (_p.outcome == "finished")
        & _p.store
        & _p.verdict.is_(None)
        & _p.tool_calls.is_(None)
        & _p.called_tools.is_(None)
        & (func.coalesce(_p.answer_characters, func.length(_p.answer), 0) == 0)
        & (func.coalesce(_p.completion_tokens, 0) > 0)
    ).label("is_hollow"),
)


class Word(msgspec.Struct, frozen=True):
    """One session's word, not yet on record."""

    kind: Kind
    session: bytes
    arm: Arm
    prediction_id: str
    badness: dict[str, float]


class Batch(msgspec.Struct, frozen=True):
    """What there was to hear of, and how far that goes."""

    words: Sequence[Word]
    position: Settled | None
    feedback_position: int
    is_last: bool


async def hear(database: Database, trial: TrialRecord, settled: Settled | None, *, share: float, limit: int) -> Batch:
    """Read what came since a trial's positions; `share` is the canary's at present, 0 where the rollout is paused."""
    async with database.reading() as connection:
        # Before the answers are: a thumb is given to an answer that is there.
        thumbs = await _thumbs(connection, trial, _f.row > trial.feedback_position, limit=limit)
        rows: Sequence[Any] = ()
        if settled is not None and settled != trial.position:
            after = await _start(database, connection, trial, settled)
            query = select(_p.row, *_SEEN).where(*_of_trial(trial), _p.row > after, _p.row <= settled.row)
            rows = (await connection.execute(query.order_by(_p.row).limit(limit))).all()
        is_last = len(rows) < limit and len(thumbs) < limit
        end = settled if len(rows) < limit else Settled(rows[-1].row, rows[-1].id)
        words = _answers(trial, rows, share) if share else []
        known = await arms_of(connection, trial.id, "answer", [word.session for word in words])
        words = [word for word in words if word.session not in known]
        if share:
            # A thumb may come before its answer is in the database, and those of other answers be heard meanwhile.
            passed = (_f.row <= trial.feedback_position, _p.id.in_([row.id for row in rows]))
            early = await _thumbs(connection, trial, *passed) if rows else ()
            words += await _said(connection, trial, [*early, *thumbs], words, share)
    last = thumbs[-1].feedback_row if thumbs else trial.feedback_position
    return Batch(words, end or trial.position, last, is_last)


def _moment(milliseconds: int) -> datetime:
    """A time of the tables as a time."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _of_trial(trial: TrialRecord) -> Iterable[Any]:
    yield _p.release_name.in_((trial.label("stable"), trial.label("canary")))
    yield _p.assignment.in_(("stable", "canary"))
    yield _p.id >= first_id(_moment(trial.started_at))


async def _start(database: Database, connection: AsyncConnection, trial: TrialRecord, settled: Settled) -> int:
    """The row after which a trial goes on."""
    at = trial.position
    if at is None:
        return 0
    if database.kind == "sqlite":
        there = (await connection.execute(select(_p.id).where(_p.row == at.row))).scalar_one_or_none()
        if there != at.id:
            # It was erased, and SQLite may have given its number to another: to look again does no harm.
            first = select(func.min(_p.row)).where(_p.id >= first_id(_moment(trial.started_at)))
            found = (await connection.execute(first)).scalar_one()
            return settled.row if found is None else int(found) - 1
    return at.row


def _answers(trial: TrialRecord, rows: Sequence[Row[Any]], share: float) -> list[Word]:
    words: dict[bytes, Word] = {}
    for row in rows:
        facts = row._asdict()
        del facts["row"]
        truths = {name: bool(facts[name]) for name in ("is_wordless", "found_nothing", "is_hollow")}
        seen = Seen(**{**facts, **truths})
        session, badness = session_of(trial.id, seen), signals(seen, trial.plan)
        if badness and session not in words and _is_heard(session, seen.arm, share):
            words[session] = Word("answer", session, seen.arm, seen.id, badness)
    return list(words.values())


def _is_heard(session: bytes, arm: str, share: float) -> bool:
    """Whether chance takes a session; which it takes has nothing to do with the answer."""
    if arm == "canary" or share >= 1:
        return True
    return int.from_bytes(session[:8]) / (1 << 64) < STABLE_PER_CANARY * share / (1 - share)


async def _thumbs(
    connection: AsyncConnection, trial: TrialRecord, *which: ColumnElement[bool], limit: int | None = None
) -> Sequence[Any]:
    """Thumbs, up or down, for answers of the trial, in the order in which they came."""
    if not any(guard.name == "disliked" for guard in trial.plan.bets.guards):
        return ()
    whose = (_p.tenant == _f.tenant) & (_p.id == _f.prediction_id)
    query = select(_f.row.label("feedback_row"), _f.rating, _p.id, _p.tenant, _p.user, _p.conversation, _p.assignment)
    query = query.join_from(feedback, predictions, whose).where(
        *_of_trial(trial),
        *which,
        _f.rating_type == "boolean",
        _f.withdrawn.is_(False),
    )
    return (await connection.execute(query.order_by(_f.row).limit(limit))).all()


async def _said(
    connection: AsyncConnection, trial: TrialRecord, thumbs: Sequence[Row[Any]], answers: Collection[Word], share: float
) -> list[Word]:
    words: dict[bytes, Word] = {}
    for row in thumbs:
        who = Seen(
            id=row.id, tenant=row.tenant, user=row.user, conversation=row.conversation, arm=row.assignment,
            outcome="finished", finish_reason=None, verdict=None, retrieval_outcome=None, total_seconds=None,
            is_wordless=False, found_nothing=False, opening=None,
        )  # fmt: skip
        session = session_of(trial.id, who)
        if session not in words and _is_heard(session, who.arm, share):
            words[session] = Word("feedback", session, who.arm, row.id, {"disliked": 1.0 - float(row.rating)})
    before = await arms_of(connection, trial.id, "feedback", list(words))
    # A session that changed its arm when the share did belongs to the one on which it was first heard.
    arms = await arms_of(connection, trial.id, "answer", list(words)) | {word.session: word.arm for word in answers}
    return [
        word for word in words.values() if word.session not in before and arms.get(word.session, word.arm) == word.arm
    ]
